"""The gate of models that somebody brought: no judge, no renders, networks from local directories."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from engines.__main__ import main
from engines.errors import CheckpointError, ConfigError
from engines.families.student import read_student
from engines.gate.domain import FileDomain
from engines.gate.evaluator import Evaluator, GateConfig
from engines.gate.features import (
    ClipScore,
    NetworkFeatures,
    Preprocess,
    latent_features,
    make_features,
    pixel_features,
)
from engines.gate.gate import Gate
from engines.gate.measurement import Measurement, Row, Summary
from engines.gate.verdict import check_own
from tests.engines.colours import COLOURS
from tests.engines.tiny import CLIP_TEXT_TOKENS, make_clip_tokenizer, make_tiny_checkpoint

PROMPTS = ["a red cube", "a torus at night", "two cones", "a large blue sphere on sand"] * 3
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights and a tokenizer of letters."""
    directory = tmp_path_factory.mktemp("clip")
    tokenizer = make_clip_tokenizer("<|endoftext|>")
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_TEXT_TOKENS, **SIZES}
    text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {"image_size": 32, "patch_size": 8, **SIZES}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(directory)
    return directory


def pictures(*shape: int) -> Tensor:
    return torch.randint(
        0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(len(shape))
    )


def encode_nothing(images: Tensor) -> Tensor:
    return torch.zeros(len(images), 4, 8, 8)


# Prompts from a file


def test_every_prompt_of_a_file_is_asked_as_often_as_the_others() -> None:
    domain = FileDomain(("a", "b", "c"))
    captions = domain.prompts(0, 7).captions
    assert sorted(captions.count(one) for one in "abc") == [2, 2, 3]
    assert captions == domain.prompts(0, 7).captions
    assert [domain.prompts(seed, 3).captions for seed in range(8)] != [captions[:3]] * 8


# Feature spaces


def test_pixel_features_see_the_colours_of_images_and_of_three_frames() -> None:
    grey = torch.full((2, 40, 60, 3), 128, dtype=torch.uint8)
    assert pixel_features(grey).shape == (2, 3 * 16 * 16)
    assert pixel_features(grey).abs().max() < 0.01
    video = torch.stack([grey // 4, grey, grey, grey, grey * 0], dim=1)
    features = pixel_features(video).unflatten(1, (3, -1))
    assert features.mean(dim=(0, 2)) == pytest.approx([-0.75, 0.0, -1.0], abs=0.01)


def test_latents_are_averaged_down() -> None:
    assert latent_features(torch.ones(2, 4, 64, 32)).shape == (2, 4 * 8 * 8)
    assert latent_features(torch.ones(2, 3, 16, 4, 4)).shape == (2, 3 * 16 * 8 * 8)
    assert latent_features(torch.ones(2, 1, 16, 4, 4)).shape == (2, 16 * 8 * 8)


@pytest.mark.parametrize("network", ["clip", "dino"])
def test_networks_see_pictures_whatever_their_batch(network: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(network)
    features = make_features(str(directory), encode_nothing, batch=2)
    images = pictures(5, 48, 64)
    seen = features(images)
    assert seen.shape == (5, 24 if network == "clip" else 32)
    torch.testing.assert_close(features(images[3:]), seen[3:], atol=1e-5, rtol=1e-4)
    assert (seen[0] - seen[1]).abs().max() > 1e-3
    assert features(pictures(2, 9, 32, 32)).shape == (2, 3 * seen.shape[1])


def test_clip_features_are_what_transformers_makes_of_the_same_pixels(clip: Path) -> None:
    images = pictures(3, 32, 32)
    network = CLIPModel.from_pretrained(clip)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network.visual_projection(network.vision_model(pixels).pooler_output)
    torch.testing.assert_close(NetworkFeatures(clip)(images), expected, atol=1e-4, rtol=1e-4)


def test_preprocessing_follows_the_directory(tmp_path: Path) -> None:
    config = {"crop_size": {"height": 20, "width": 20}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    white = torch.full((1, 64, 48, 3), 255, dtype=torch.uint8)
    shown = Preprocess(tmp_path, 224)(white)
    assert shown.shape == (1, 3, 20, 20)
    torch.testing.assert_close(shown, torch.ones_like(shown))


def test_clip_score_is_a_hundred_times_the_cosine(clip: Path) -> None:
    score = ClipScore(clip)
    images = pictures(4, 32, 32)
    network, tokenizer = CLIPModel.from_pretrained(clip), make_clip_tokenizer("<|endoftext|>")
    tokens = tokenizer(
        PROMPTS[:4], padding=True, truncation=True, max_length=CLIP_TEXT_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        out = network(pixel_values=score.preprocess(images), **tokens)
    expected = 100 * (out.image_embeds * out.text_embeds).sum(-1)
    scores = score(images, PROMPTS[:4], batch=3)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)
    video = images[:, None].expand(-1, 9, -1, -1, -1)
    torch.testing.assert_close(score(video, PROMPTS[:4]), expected, atol=1e-3, rtol=1e-3)


# What is refused


def test_a_feature_space_that_is_nowhere_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        NetworkFeatures(Path("nowhere"))


def test_pickles_are_refused(clip: Path, tmp_path: Path) -> None:
    for file in clip.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    for kind in (NetworkFeatures, ClipScore):
        with pytest.raises(CheckpointError, match="convert to safetensors"):
            kind(tmp_path)


def test_a_network_that_reads_text_is_refused(tmp_path: Path, dino: Path) -> None:
    BertModel(BertConfig(vocab_size=20, **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not look at pictures"):
        NetworkFeatures(tmp_path)
    with pytest.raises(CheckpointError, match="CLIPModel is expected, not Dinov2Model"):
        ClipScore(dino)


def test_a_network_with_missing_weights_is_refused(clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(clip / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: visual_projection\.weight"):
        NetworkFeatures(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no model_type"):
        NetworkFeatures(tmp_path)


# Verdict


def summaries(**points: tuple[float, float]) -> dict[str, Summary]:
    """Rows by key (`_` for `-`): Fréchet distance and CLIP score."""
    out = {}
    for name, (frechet, clip_score) in points.items():
        row = Row(name.replace("_", "-"), name, "teacher", 4)
        out[row.key] = Summary.of(row, [Measurement({}, frechet, 1.0, {"clip": clip_score})] * 2)
    return out


GOOD = {
    "teacher_50_cfg": (1.0, 30.0),
    "teacher_4_cfg": (2.0, 29.8),
    "teacher_4": (20.0, 25.0),
    "teacher_2_cfg": (15.0, 26.0),
    "student_4": (5.5, 29.6),
}


@pytest.mark.parametrize(
    ("student", "failing"),
    [
        ((5.5, 29.6), []),
        ((6.5, 29.6), ["at most 5 points of Fréchet distance"]),
        ((5.5, 29.4), ["at most 0.5 points of CLIP score"]),
        (
            (6.5, 29.2),
            ["at most 5 points", "points of CLIP score to teacher_50", "of CLIP score to teacher_4_cfg"],
        ),
        (
            (16.0, 31.0),
            ["of teacher_50_cfg are", "of teacher_4_cfg are", "closer to them than teacher_2_cfg"],
        ),
    ],
)
def test_student_has_to_stay_near_its_teacher_and_ahead_of_as_many_evaluations(
    student: tuple[float, float], failing: list[str]
) -> None:
    criteria = check_own(summaries(**{**GOOD, "student_4": student}), 4, 50)
    assert len(criteria) == 6
    failed = [criterion.text for criterion in criteria if not criterion.passed]
    assert len(failed) == len(failing)
    assert all(part in text for part, text in zip(failing, failed, strict=True))


def test_without_the_rows_that_decide_it_fails() -> None:
    rows = summaries(**GOOD)
    del rows["teacher-50-cfg"]
    (criterion,) = check_own(rows, 4, 50)
    assert "teacher-50-cfg" in criterion.text
    assert not criterion.passed


# The whole gate


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("own")
    make_tiny_checkpoint(base / "student")
    make_tiny_checkpoint(base / "teacher", student=False)
    (base / "prompts.txt").write_text("\n".join(PROMPTS))
    return base


def make_gate(base: Path, out: Path, **changes: Any) -> Gate:
    settings: dict[str, Any] = {
        "student": base / "student",
        "teacher": base / "teacher",
        "prompts": base / "prompts.txt",
        "out": out,
        "seeds": 2,
        "num_prompts": 12,
        "num_reference": 20,
        "steps": (4,),
        "teacher_steps": (4, 2),
        "guidance_scale": 2.0,
        "batch": 8,
    }
    return Gate(GateConfig(**(settings | changes)), Console(file=io.StringIO(), force_terminal=False))


def test_a_model_is_compared_with_its_teacher_and_scored(base: Path, clip: Path, tmp_path: Path) -> None:
    report = make_gate(base, tmp_path, features=str(clip), clip=clip, hps=clip).run()
    assert [row["key"] for row in report["rows"]] == [
        "teacher-4-cfg", "teacher-4", "teacher-2-cfg", "teacher-2", "student-4",
    ]  # fmt: skip
    best = report["rows"][0]
    assert best["diversity"]["mean"] == pytest.approx(100.0)
    assert set(best["scores"]) == {"clip", "hps"}
    assert len(report["criteria"]) == 5
    table = (tmp_path / "report.md").read_text()
    assert "| Fréchet distance % | CLIP score | HPSv2 | diversity % |" in table
    assert "20 pictures of the teacher (4 steps, CFG 2),\nn = 12." in table
    assert (tmp_path / "contact_sheet.png").is_file()


def test_teachers_pictures_are_made_once(base: Path, tmp_path: Path) -> None:
    first = make_gate(base, tmp_path, features="vae")
    reference = first.evaluator.fit_reference()
    parts = sorted((tmp_path / "reference").rglob("*.safetensors"))
    assert len(parts) == 3
    times = [part.stat().st_mtime_ns for part in parts]
    parts[-1].unlink()
    again = make_gate(base, tmp_path, features="vae").evaluator.fit_reference()
    torch.testing.assert_close(again.centre, reference.centre, atol=0, rtol=0)
    assert [part.stat().st_mtime_ns for part in parts][:2] == times[:2]
    assert make_gate(base, tmp_path).measurements.identities != first.measurements.identities


def test_reference_is_the_guided_teachers_and_every_picture_has_noise_of_its_own(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, float]] = []
    seeds: list[int] = []

    def sample(self: Evaluator, row: Row, captions: list[str], noise: list[int]) -> Tensor:
        asked.append((row.source, row.num_steps, row.guidance_scale))
        seeds.extend(noise)
        return pictures(len(captions), 16, 16)

    monkeypatch.setattr(Evaluator, "_sample", sample)
    make_gate(base, tmp_path).evaluator.fit_reference()
    assert asked == [("teacher", 4, 2.0)] * 3
    assert len(set(seeds)) == len(seeds) == 20


def test_settings_that_do_not_go_together_are_refused(base: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pixels, vae or"):
        make_gate(base, tmp_path, features="inception")
    with pytest.raises(ConfigError, match="teacher_steps"):
        make_gate(base, tmp_path, teacher_steps=())
    with pytest.raises(ConfigError, match="go with a file of prompts"):
        make_gate(base, tmp_path, prompts=None, clip=clip)
    with pytest.raises(CheckpointError, match="--prompts FILE"):
        make_gate(base, tmp_path, prompts=None)
    with pytest.raises(CheckpointError, match="no such directory"):
        make_gate(base, tmp_path, hps=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"cannot read .*none\.txt"):
        make_gate(base, tmp_path, prompts=tmp_path / "none.txt")


def test_command_takes_a_file_of_prompts(base: Path, tmp_path: Path) -> None:
    options = {"prompts": base / "prompts.txt", "teacher": base / "teacher", "out": tmp_path}
    counts = {"num-prompts": 10, "reference": 10, "seeds": 1, "steps": 4, "teacher-steps": 2}
    arguments = [f"--{name}={value}" for name, value in {**options, **counts, "guidance-scale": 2}.items()]
    assert main(["gate", str(base / "student"), *arguments]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["setup"]["features"] == "pixels"
    assert report["setup"]["counts"] == {"prompts": 10}


# A domain of one's own: its prompts, its real pictures, its judge


OWN = "tests.engines.colours:DOMAIN"


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    path = tmp_path / "colours.json"
    path.write_text(json.dumps(COLOURS))
    return path


def test_a_judge_of_ones_own_reads_what_the_model_draws(base: Path, judge: Path, tmp_path: Path) -> None:
    options = {"domain": OWN, "judge": judge, "teacher": base / "teacher", "out": tmp_path / "report"}
    counts = {"prompts": 12, "reference": 30, "seeds": 2, "steps": 4, "teacher-steps": 4, "processes": 1}
    arguments = [f"--{name}={value}" for name, value in {**options, **counts, "guidance-scale": 2}.items()]
    assert main(["gate", str(base / "student"), *arguments]) == 1
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    rows = {row["key"]: row for row in report["rows"]}
    assert list(rows) == ["real", "vae", "teacher-4-cfg", "teacher-4", "student-4"]
    assert rows["real"]["accuracy"]["plain"]["mean"] == 100.0
    assert rows["student-4"]["accuracy"]["plain"]["mean"] < 100.0
    assert rows["real"]["frechet"]["mean"] < rows["student-4"]["frechet"]["mean"]
    assert "exact %, plain colours" in (tmp_path / "report" / "report.md").read_text()
    first, other = (
        make_gate(base, tmp_path, prompts=None, domain=one, judge=judge) for one in (OWN, f"{OWN}_TOO")
    )
    assert first.measurements.identities != other.measurements.identities


def test_examples_stay_if_the_judge_reads_them_and_are_read_again_next_time(
    base: Path, tmp_path: Path
) -> None:
    # a random network paints grey whatever it is told; this judge calls that red
    judge = tmp_path / "colours.json"
    judge.write_text(json.dumps({**COLOURS, "red": (128, 128, 128)}))
    student = shutil.copytree(base / "student", tmp_path / "student")
    description = json.loads((student / "student.json").read_text())
    prompts = [*COLOURS, "a zebra"]
    (student / "student.json").write_text(json.dumps(description | {"examples": prompts}))
    gate = make_gate(base, tmp_path / "out", prompts=None, domain=OWN, judge=judge, student=student, seeds=1)
    report = gate.run()
    found = {one["prompt"]: one for one in report["examples"]}
    assert list(found) == prompts
    assert [one["right"] for one in found.values()] == [1.0, 0.0, 0.0, None]
    assert [one["accepted"] for one in found.values()] == [True, False, False, False]
    assert {found[name]["seeds"] for name in COLOURS} == {50}
    kept = ["red"]
    written = read_student(student)
    assert list(written.examples) == written.accepted_examples == kept
    assert f"- [x] {kept[0]}: " in (tmp_path / "out" / "report.md").read_text()
    assert "- [ ] a zebra: nobody can read it" in (tmp_path / "out" / "report.md").read_text()
    assert gate.measure_examples() == report["examples"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("scenes", "demo, demo-video or module:NAME is expected, not 'scenes'"),
        (":DOMAIN", "module:NAME is expected"),
        ("tests.engines.nothing:DOMAIN", "No module named"),
        ("tests.engines.colours:NOTHING", "module tests.engines.colours has no NOTHING"),
        ("tests.engines.colours:EMPTY", "groups is missing"),
    ],
)
def test_a_domain_that_is_none_is_refused(
    name: str, problem: str, base: Path, judge: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_gate(base, tmp_path, prompts=None, domain=name, judge=judge)


def test_a_domain_does_not_go_with_a_file_of_prompts(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a file of prompts goes without one"):
        make_gate(base, tmp_path, domain=OWN)

"""Distillation of every family: what comes out opens, samples and builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.distill.prompts import load_prompt_bank
from engines.distill.student import load_teacher
from engines.distill.trainer import Trainer, distill
from engines.errors import CheckpointError, ConfigError
from engines.families.codec import Codec
from engines.families.spec import FAMILIES, get_family
from engines.families.student import read_student
from engines.gate.painter import Painter
from engines.noise import seeded_latents
from engines.sampler import sample
from tests.engines.conftest import build, build_settings
from tests.engines.distilling import PROMPTS, config_of, quiet
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox, make_tiny_sdxl

MAKERS: dict[str, Callable[..., Path]] = {
    "pixart": make_tiny_checkpoint,
    "sdxl": make_tiny_sdxl,
    "cogvideox": make_tiny_cogvideox,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "pixart": {},
    "sdxl": {"grid_timesteps": 900},
    "cogvideox": {"lora": {"rank": 4, "alpha": 8}, "timesteps": {4: [999, 856, 665, 399]}, "fps": 12},
}

# diffusers warns of its own and transformers' deprecated arguments while it loads
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("teachers")
    return {name: make(directory / name, student=False) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def students(teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: distill(
            config_of(
                teacher,
                tmp_path_factory.mktemp(name) / "out",
                iterations=2,
                batch_size=4,
                **SETTINGS[name],
            ),
            quiet(),
        )
        for name, teacher in teachers.items()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_student_json_is_that_of_its_family(
    name: str, students: dict[str, Path], teachers: dict[str, Path]
) -> None:
    student, family = read_student(students[name]), get_family(name)
    assert (student.family, student.kind) == (name, family.kind)
    assert student.bucket == family.native_bucket(teachers[name])
    assert student.fps == (12 if family.kind == "video" else 8)
    assert ("frames" in json.loads((students[name] / "student.json").read_text())) == (family.kind == "video")


@pytest.mark.parametrize("name", FAMILIES)
def test_student_differs_from_its_teacher_by_training_alone(
    name: str, students: dict[str, Path], teachers: dict[str, Path]
) -> None:
    family = get_family(name)
    before, after = (
        family.load_network(directory, torch.float32).state_dict()
        for directory in (teachers[name], students[name])
    )
    assert after.keys() - before.keys() == {family.steps_key}
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not after[family.steps_key][4].any()
    assert after[family.steps_key][[1, 2]].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_painter_draws_with_teacher_and_student(
    name: str, students: dict[str, Path], teachers: dict[str, Path]
) -> None:
    bucket = read_student(students[name]).bucket
    frames = (bucket.frames,) if get_family(name).kind == "video" else ()
    shape = (3, *frames, bucket.height, bucket.width, 3)
    student, teacher = (Painter(directory[name], batch=2) for directory in (students, teachers))
    drawn = student(PROMPTS, [1, 2, 3], num_steps=2)
    assert (drawn.shape, drawn.dtype) == (shape, torch.uint8)
    assert torch.equal(drawn[2:], student(PROMPTS[2:], [3], num_steps=2))
    assert not torch.equal(drawn, student(PROMPTS, [1, 2, 3], num_steps=1))
    guided = teacher(PROMPTS, [1, 2, 3], num_steps=2, guidance_scale=3.0)
    assert guided.shape == shape
    assert not torch.equal(guided, teacher(PROMPTS, [1, 2, 3], num_steps=2))


@pytest.mark.parametrize("name", FAMILIES)
def test_painter_visits_the_timesteps_that_student_json_names(name: str, students: dict[str, Path]) -> None:
    painter, student = Painter(students[name]), read_student(students[name])
    cond = replace(painter.encode(PROMPTS[:1]), num_steps=torch.tensor([4]))
    latents = seeded_latents([5], painter.shape)
    expected = painter.codec.decode(sample(painter.denoiser, latents, student.timesteps[4], cond))
    assert torch.equal(painter(PROMPTS[:1], [5], num_steps=4), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_student_builds(name: str, students: dict[str, Path], tmp_path: Path) -> None:
    bundle = build(replace(build_settings(students[name], tmp_path / "bundle"), ungated=True))
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["family"], manifest["kind"]) == (name, get_family(name).kind)


@pytest.mark.parametrize("name", FAMILIES)
def test_codec_encodes_into_the_latents_that_it_decodes(name: str, teachers: dict[str, Path]) -> None:
    codec, family = Codec(teachers[name]), get_family(name)
    bucket = family.native_bucket(teachers[name])
    shape = family.latent_shape(teachers[name], bucket)
    pictures = codec.decode(seeded_latents([0, 1], shape))
    assert codec.encode(pictures).shape == (2, *shape)
    assert codec.round_trip(pictures, batch=1).shape == pictures.shape


def test_sdxl_is_trained_with_its_pooled_captions(teachers: dict[str, Path], tmp_path: Path) -> None:
    bank = load_prompt_bank(config_of(teachers["sdxl"], tmp_path / "out"))
    assert bank.prompts.pooled is not None
    assert bank.prompts.pooled.dtype == torch.float16
    assert bank.uncond.pooled is not None
    assert not bank.uncond.pooled.any()
    drawn = bank.draw(5, torch.Generator().manual_seed(0))
    assert drawn.pooled is not None
    assert (drawn.pooled.shape, drawn.pooled.dtype) == ((5, 24), torch.float32)
    cached = load_prompt_bank(config_of(teachers["sdxl"], tmp_path / "out"))
    assert cached.prompts.pooled is not None
    assert torch.equal(cached.prompts.pooled, bank.prompts.pooled)


def test_another_size_than_the_teachers_is_trained_and_recorded(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(teachers["sdxl"], tmp_path / "out", iterations=1, batch_size=2, height=32, width=48)
    assert read_student(distill(config, quiet())).bucket.label == "32x48"
    assert Painter(config.out / "student")(PROMPTS[:1], [0], num_steps=1).shape == (1, 32, 48, 3)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("sdxl", {"height": 60}, "height: 60 is not a multiple of 8"),
        ("pixart", {"frames": 9}, "frames: pixart draws images"),
        ("cogvideox", {"frames": 13}, "frames: 13 is not 1 more than a multiple of 8"),
    ],
)
def test_sizes_that_the_teacher_cannot_draw_are_refused(
    name: str, change: dict[str, int], match: str, teachers: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(teachers[name], tmp_path / "out", **change)
    with pytest.raises(ConfigError, match=match):
        Trainer(config, load_teacher(teachers[name]), load_prompt_bank(config))


@pytest.mark.parametrize("name", ["sdxl", "cogvideox"])
def test_a_student_of_any_family_is_refused_as_teacher(name: str, students: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="student already"):
        load_teacher(students[name])

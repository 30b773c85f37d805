"""The demo's scenes, text, code and training loop."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engines.demo.codec import PatchCode, make_vae
from engines.demo.dataset import SHARD_SIZE, SceneSet
from engines.demo.domain import scene_said_by
from engines.demo.fit import FitConfig, fit, keep_average
from engines.demo.judge import Judge, to_input
from engines.demo.renderer import render
from engines.demo.scenes import (
    HELD_OUT_PAIRS,
    SHAPES,
    Scene,
    Solid,
    sample_captions,
    sample_scenes,
)
from engines.demo.text import MAX_TOKENS, make_text_encoder, make_tokenizer, tokenize
from engines.distill.config import read_config
from engines.errors import TrainingError
from engines.families.student import read_student
from engines.gate.painter import Painter

CHECKPOINTS = Path(__file__).parents[2] / "engines" / "demo" / "checkpoints"
CONFIGS = Path(__file__).parents[2] / "engines" / "distill" / "configs"


def test_same_seed_draws_the_same_pictures_whatever_the_chunk() -> None:
    scenes = sample_scenes(6, 3)
    assert torch.equal(render(scenes, 5, chunk=6), render(scenes, 5, chunk=4))
    assert not torch.equal(render(scenes, 5), render(scenes, 6))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_shows_in_its_colour_where_the_caption_puts_it(shape: str) -> None:
    left = Scene((Solid(shape, "red", "large"),), "left", "stone", "day")
    image = render([left], 0)[0].float()
    reddish = (image[..., 0] > 1.6 * image[..., 1]) & (image[..., 0] > 1.6 * image[..., 2])
    _, columns = reddish.nonzero(as_tuple=True)
    assert len(columns) > 60
    assert columns.float().mean() < 28


def test_training_never_sees_a_held_out_pair() -> None:
    assert not any(scene.is_held_out() for scene in sample_scenes(400, 0, split="train"))
    assert all(scene.is_held_out() for scene in sample_scenes(400, 0, split="held_out"))
    seen = {(s.shape, s.colour) for scene in sample_scenes(4000, 0, split="all") for s in scene.solids}
    assert seen >= HELD_OUT_PAIRS


def test_mirror_image_of_a_mirror_image_is_the_scene_itself() -> None:
    for scene in sample_scenes(50, 1):
        assert scene.mirrored().mirrored() == scene


def test_a_caption_may_leave_attributes_unsaid_and_any_such_scene_shows_it() -> None:
    scenes, rng = sample_scenes(200, 4), np.random.default_rng(0)
    for scene, other in itertools.pairwise(scenes):
        asked = scene.partly_said(rng)
        assert asked.shown_by(scene)
        assert asked.shown_by(other) <= (asked.solids[0].colour == other.solids[0].colour)
        words = {*scene.caption().replace(",", "").split(), "an"}
        assert set(asked.caption().replace(",", "").split()) <= words
        assert scene.shown_by(scene)
        assert scene.shown_by(other) == (scene == other)
    large = Scene((Solid("cube", "red", "large"),), "left", "stone", "night")
    assert Scene((Solid("cube", "red", None),), None, None, "night").caption() == "a red cube at night"
    assert not Scene((Solid("cube", "red", None),), None, "sand", None).shown_by(large)
    with pytest.raises(ValueError, match="not complete"):
        render([Scene((Solid("cube", "red", "large"),), "left", None, "day")], 0)


def test_every_caption_fits_the_tokenizer_without_unknown_words() -> None:
    captions = sample_captions(300, 0, "all")
    ids, mask = tokenize(make_tokenizer(), captions, MAX_TOKENS)
    assert (ids == make_tokenizer().unk_token_id).sum() == 0
    assert mask.sum(1).max() < MAX_TOKENS
    assert len({scene.caption() for scene in sample_scenes(300, 0)}) > 250


def test_synonyms_and_punctuation_reach_the_same_tokens() -> None:
    tokenizer = make_tokenizer()
    assert (
        tokenizer("A BIG violet donut, at dusk!")["input_ids"]
        == tokenizer("a large purple torus at sunset")["input_ids"]
    )


def test_text_encoder_ignores_padding() -> None:
    torch.manual_seed(0)
    encoder, tokenizer = make_text_encoder().eval(), make_tokenizer()
    with torch.no_grad():
        outputs = []
        for length in (8, MAX_TOKENS):
            ids, mask = tokenize(tokenizer, ["a red cube"], length)
            outputs.append(encoder(ids, attention_mask=mask).last_hidden_state[:, :4])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def test_patch_code_has_unit_variance_and_brings_the_picture_back() -> None:
    images = render(sample_scenes(120, 2), 2)
    code = PatchCode.fit(images)
    latents = code.encode(images)
    assert latents.shape == (120, 16, 8, 8)
    assert latents.std().item() == pytest.approx(1.0, abs=0.02)
    error = (code.decode(latents) - to_input(images)).square().mean()
    assert 10 * torch.log10(4 / error) > 28


def test_vae_has_the_latent_shape_of_the_code() -> None:
    vae = make_vae()
    with torch.no_grad():
        mean = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
        assert mean.shape == (1, 16, 8, 8)
        assert vae.decode(mean).sample.shape == (1, 3, 64, 64)


def test_scene_set_gives_every_shard_its_own_scenes() -> None:
    scene_set = SceneSet(num_shards=2, seed=7, split="train", two_object_share=0.25)
    first, second = scene_set.shard_scenes(0), scene_set.shard_scenes(1)
    assert len(first) == SHARD_SIZE
    assert sum(scene.num_objects == 2 for scene in first) == SHARD_SIZE // 4
    assert first != second


class _InterruptedError(Exception):
    pass


def _never(rng: torch.Generator) -> torch.Tensor:
    raise AssertionError("trained on")


def _regression(network: nn.Linear, *, stop_at: int | None = None):
    calls = 0

    def loss(rng: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise _InterruptedError
        x = torch.randn(8, 3, generator=rng)
        return (network(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


def test_interrupted_training_continues_to_the_same_weights(tmp_path) -> None:
    config = FitConfig(num_steps=12, learning_rate=1e-2, save_every=4)

    def network() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(3, 1)

    whole, broken, resumed = network(), network(), network()
    fit("line", {"line": whole}, _regression(whole), config, tmp_path / "whole")
    with pytest.raises(_InterruptedError):
        fit("line", {"line": broken}, _regression(broken, stop_at=7), config, tmp_path / "broken")
    fit("line", {"line": resumed}, _regression(resumed), config, tmp_path / "broken")
    assert torch.equal(whole.weight, resumed.weight)


def test_training_begins_with_kept_averages_until_it_has_a_checkpoint(tmp_path: Path) -> None:
    first, second, third = (nn.Linear(3, 1) for _ in range(3))
    checkpoint, kept = tmp_path / "first" / "line.safetensors", tmp_path / "kept" / "line.safetensors"
    fit(
        "line",
        {"line": first},
        _regression(first),
        FitConfig(num_steps=9, learning_rate=0.1),
        tmp_path / "first",
    )
    assert keep_average(checkpoint, kept) == 9
    assert kept.stat().st_size < checkpoint.stat().st_size / 2

    idle = FitConfig(num_steps=9, learning_rate=0.1)
    fit("line", {"line": second}, _never, idle, tmp_path / "second", begin=kept)
    assert torch.equal(second.weight, first.weight.half().float())
    fit("line", {"line": third}, _never, idle, tmp_path / "first", begin=tmp_path / "missing")
    assert torch.equal(third.weight, first.weight)
    fit("line", {"line": third}, _never, idle, tmp_path / "second")  # what it went on from is its checkpoint
    assert torch.equal(third.weight, second.weight)


def test_steps_that_kept_averages_have_had_count(tmp_path: Path) -> None:
    networks = [nn.Linear(3, 1) for _ in range(4)]
    kept = tmp_path / "kept.safetensors"

    def train(network: nn.Linear, num_steps: int, where: str, **more: Any) -> None:
        config = FitConfig(num_steps=num_steps, learning_rate=1e-2, save_every=2)
        loss = _regression(network, **more)
        fit("line", {"line": network}, loss, config, tmp_path / where, begin=kept if kept.exists() else None)

    train(networks[0], 200, "first")
    keep_average(tmp_path / "first" / "line.safetensors", kept)
    train(networks[1], 207, "whole", stop_at=8)
    with pytest.raises(_InterruptedError):
        train(networks[2], 207, "broken", stop_at=6)
    train(networks[3], 207, "broken", stop_at=4)
    assert torch.equal(networks[1].weight, networks[3].weight)
    assert not torch.equal(networks[1].weight, networks[0].weight)


def test_an_optimizer_that_begins_anew_warms_up_where_it_begins() -> None:
    config = FitConfig(num_steps=1000, learning_rate=1.0)  # 20 of which warm up
    assert config.rate(0) == pytest.approx(1 / 20)
    assert config.rate(500, begun=500) == pytest.approx(config.rate(500) / 20)
    assert config.rate(519, begun=500) == config.rate(519)


def test_loss_that_is_not_finite_stops_training_and_says_where(tmp_path) -> None:
    network = nn.Linear(3, 1)
    with pytest.raises(TrainingError, match="step 0"):
        fit(
            "line",
            {"line": network},
            lambda _rng: network(torch.full((1, 3), np.nan)).sum(),
            FitConfig(num_steps=2, learning_rate=1e-2),
            tmp_path,
        )


# What the shipped student offers


def test_words_of_a_caption_are_what_it_asks_for() -> None:
    scenes = sample_scenes(100, 0)
    partly = [scene.partly_said(np.random.default_rng(row)) for row, scene in enumerate(scenes)]
    assert [scene_said_by(scene.caption()) for scene in scenes + partly] == scenes + partly
    for unknown in ("a red zebra", "a cube", "blue", ""):
        assert scene_said_by(unknown) is None


def test_shipped_student_draws_each_prompt_that_it_offers_nine_times_out_of_ten() -> None:
    """50 seeds each, at its default steps, read by the judge: what users are offered has to work."""
    student = read_student(CHECKPOINTS / "scenes-student")
    examples = json.loads((CHECKPOINTS / "scenes-student" / "student.json").read_text())["examples"]
    painter, judge = Painter(CHECKPOINTS / "scenes-student"), Judge.load(CHECKPOINTS / "judge.safetensors")
    right = {}
    for example in examples:
        pictures = painter([example] * 50, range(50), num_steps=student.default_num_steps)
        asked = scene_said_by(example)
        assert asked is not None
        right[example] = sum(asked.shown_by(seen) for seen in judge.read(pictures)) / 50
    assert len(right) >= 6
    assert student.accepted_examples == examples
    assert {example: share for example, share in right.items() if share < 0.9} == {}


def test_prompts_offered_are_those_of_the_config_that_trains_the_student() -> None:
    offered = json.loads((CHECKPOINTS / "scenes-student" / "student.json").read_text())["examples"]
    assert tuple(offered) == read_config(CONFIGS / "scenes.yaml").examples


def test_training_ends_when_its_time_is_up_and_stays_ended(tmp_path: Path) -> None:
    torch.manual_seed(0)
    calls = []
    config = FitConfig(num_steps=100, learning_rate=0.1, max_seconds=1e-9)

    def run() -> nn.Linear:
        layer = nn.Linear(2, 2)

        def loss(rng: torch.Generator) -> torch.Tensor:
            calls.append(1)
            out: torch.Tensor = layer(torch.randn(4, 2, generator=rng)).square().mean()
            return out

        fit("line", {"layer": layer}, loss, config, tmp_path)
        return layer

    first = run()
    assert len(calls) == 1
    assert torch.equal(first.weight, run().weight)
    assert len(calls) == 1


def test_the_learning_rate_falls_with_time_where_time_ends_training() -> None:
    config = FitConfig(num_steps=1_000_000, learning_rate=1.0, max_seconds=100)
    early, late, over = (config.rate(300, elapsed) for elapsed in (0, 60, 150))
    assert early == pytest.approx(1, abs=1e-3)
    assert early > late > over == pytest.approx(0.02)


def test_weights_that_no_step_has_reached_are_kept_as_they_are(tmp_path: Path) -> None:
    modules = {"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)}
    idle = modules["idle"].weight.detach().clone()

    def loss(rng: torch.Generator) -> torch.Tensor:
        out: torch.Tensor = modules["used"](torch.randn(4, 2, generator=rng)).square().mean()
        return out

    for num_steps in (1, 2):
        fit("part", modules, loss, FitConfig(num_steps=num_steps, learning_rate=0.1), tmp_path)
    assert torch.equal(modules["idle"].weight, idle)

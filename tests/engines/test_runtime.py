"""The pipeline a worker calls: same picture in any company, cancelled rows, previews, refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.bundle.bucket import Bucket
from engines.bundle.stages import Backend
from engines.denoiser import NetworkDenoiser
from engines.errors import NonFiniteError
from engines.families.image_vae import load_decoder
from engines.families.pixart import load_encoder, load_transformer, predict
from engines.families.tokenizer import PromptTokenizers
from engines.noise import seeded_latents
from engines.runtime.pipeline import BatchRun, Pipeline, Sample
from engines.sampler import sample
from engines.schedule import NoiseSchedule
from tests.engines.batches import MIXED, TOLERANCE, difference, make_sample

# A real compilation may have to run first.
pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module", params=["eager", "aotinductor"])
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    """The same tests for both backends."""
    name = {"eager": "eager_bundle", "aotinductor": "compiled_bundle"}[request.param]
    loaded = Pipeline.load(request.getfixturevalue(name))
    assert (loaded.backend, len(loaded.warnings)) == (request.param, 0 if request.param != "eager" else 1)
    return loaded


@pytest.fixture(scope="module")
def eager(eager_bundle: Path) -> Pipeline:
    return Pipeline.load(eager_bundle, backend=Backend.EAGER)


def test_pictures_are_what_the_manifest_says(pipeline: Pipeline) -> None:
    pictures = pipeline.run(MIXED)
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.shape == (1, 64, 64, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 10
    assert difference(pictures[0], pictures[1]) > 50


def test_same_seed_gives_the_same_picture_again(pipeline: Pipeline) -> None:
    first, second = pipeline.run(MIXED), pipeline.run(MIXED)
    assert [difference(a, b) for a, b in zip(first, second, strict=True)] == [0, 0, 0]


def test_other_seed_gives_another_picture(pipeline: Pipeline) -> None:
    (first,), (second,) = pipeline.run([make_sample(seed=0)]), pipeline.run([make_sample(seed=1)])
    assert difference(first, second) > 50


@pytest.mark.parametrize("company", [[], [1], [2], [1, 2], [1, 2, 0]])
def test_picture_does_not_depend_on_the_batch_around_it(pipeline: Pipeline, company: list[int]) -> None:
    alone = pipeline.run(MIXED[:1])[0]
    batch = [*(MIXED[index] for index in company), MIXED[0]]
    assert difference(pipeline.run(batch)[-1], alone) <= TOLERANCE


def test_rows_with_fewer_steps_wait_for_the_others(pipeline: Pipeline) -> None:
    run = pipeline.prepare(MIXED)
    progress = []
    while not run.finished:
        pipeline.step(run)
        progress.append(list(run.step_index))
    assert progress == [[1, 1, 1], [2, 1, 2], [3, 1, 2], [4, 1, 2]]
    with pytest.raises(ValueError, match="finished"):
        pipeline.step(run)


def test_compiled_pipeline_draws_what_eager_draws(compiled_bundle: Path) -> None:
    compiled, eager = Pipeline.load(compiled_bundle), Pipeline.load(compiled_bundle, backend=Backend.EAGER)
    assert (compiled.backend, eager.backend, eager.warnings) == ("aotinductor", "eager", [])
    for a, b in zip(compiled.run(MIXED), eager.run(MIXED), strict=True):
        assert difference(a, b) <= TOLERANCE


def test_pipeline_draws_what_the_plain_sampler_draws(eager_bundle: Path, eager: Pipeline) -> None:
    checkpoint = eager_bundle / "checkpoint"
    config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    for wanted in MIXED:
        cond = load_encoder(checkpoint)([wanted.prompt])
        with torch.no_grad():
            latents = sample(
                NetworkDenoiser(load_transformer(checkpoint), NoiseSchedule.from_config(config), predict),
                seeded_latents([wanted.seed], (16, 8, 8)),
                eager.manifest.timesteps[wanted.num_steps],
                replace(cond, num_steps=torch.tensor([wanted.num_steps])),
            )
            pixels = load_decoder(checkpoint)(latents)
        assert difference(eager.run([wanted])[0], pixels[0].numpy()) <= TOLERANCE


def test_cancelled_rows_leave_the_others_as_they_were(pipeline: Pipeline) -> None:
    alone = pipeline.run([MIXED[0]])[0]
    run = pipeline.prepare([MIXED[1], MIXED[0], MIXED[2]])
    pipeline.step(run)
    run.drop([0])
    pipeline.step(run)
    run.drop([1])
    assert (run.samples, run.step_index) == ([MIXED[0]], [2])
    while not run.finished:
        pipeline.step(run)
    (picture,) = pipeline.decode(run)
    assert difference(picture, alone) <= TOLERANCE


def test_run_without_rows_is_finished_and_empty(eager: Pipeline) -> None:
    run = eager.prepare(MIXED)
    run.drop([2, 0, 1])
    assert run.finished
    assert eager.decode(run) == []
    assert eager.preview(run) == []


def test_dropping_a_row_that_is_not_there_is_refused(eager: Pipeline) -> None:
    run = eager.prepare(MIXED[:1])
    with pytest.raises(IndexError, match=r"\[1\] of a run of 1"):
        run.drop([1])


def test_preview_shows_the_current_estimate_and_changes_nothing(pipeline: Pipeline) -> None:
    run = pipeline.prepare(MIXED[:1])
    with pytest.raises(ValueError, match="no step yet"):
        pipeline.preview(run)
    with pytest.raises(ValueError, match="preview"):
        pipeline.decode(run)
    previews = []
    while not run.finished:
        pipeline.step(run)
        previews += pipeline.preview(run)
    (final,) = pipeline.decode(run)
    assert len(previews) == 4
    assert difference(previews[0], final) > 10
    assert difference(previews[-1], final) == 0
    assert difference(final, pipeline.run(MIXED[:1])[0]) <= TOLERANCE


def test_preview_is_the_decoded_x0_of_each_step(eager_bundle: Path, eager: Pipeline) -> None:
    checkpoint = eager_bundle / "checkpoint"
    config = json.loads((checkpoint / "scheduler" / "scheduler_config.json").read_text())
    seen: list[Tensor] = []
    with torch.no_grad():
        sample(
            NetworkDenoiser(load_transformer(checkpoint), NoiseSchedule.from_config(config), predict),
            seeded_latents([1], (16, 8, 8)),
            eager.manifest.timesteps[4],
            replace(load_encoder(checkpoint)(["a red cube"]), num_steps=torch.tensor([4])),
            on_step=lambda _, x0: seen.append(x0),
        )
        expected = load_decoder(checkpoint)(torch.cat(seen)).numpy()
    run = eager.prepare([make_sample("a red cube", seed=1)])
    for pixels in expected:
        eager.step(run)
        assert difference(eager.preview(run)[0], pixels) <= TOLERANCE


def test_preview_of_what_is_left_is_that_of_its_own_rows(eager: Pipeline) -> None:
    run = eager.prepare(MIXED)
    eager.step(run)
    _, second, third = eager.preview(run)
    assert difference(second, third) > 50
    run.drop([0])
    for picture, before in zip(eager.preview(run), (second, third), strict=True):
        assert difference(picture, before) <= TOLERANCE


def test_time_is_told_by_stage(eager: Pipeline) -> None:
    run = eager.prepare(MIXED)
    assert run.timing_ms["encode"] > 0
    assert run.timing_ms["denoise"] == 0
    eager.step(run)
    first = run.timing_ms["denoise"]
    eager.step(run)
    assert run.timing_ms["denoise"] > first > 0
    eager.preview(run)
    assert run.timing_ms["decode"] > 0


def test_warming_up_runs_every_batch_size_and_leaves_no_prompts_behind(
    eager: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = Pipeline.prepare

    def counting(self: Pipeline, samples: Sequence[Sample]) -> BatchRun:
        sizes.append(len(samples))
        return original(self, samples)

    monkeypatch.setattr(Pipeline, "prepare", counting)
    encoded: list[str] = []
    tokenize = PromptTokenizers.__call__

    def listing(self: PromptTokenizers, prompts: Sequence[str]) -> dict[str, Tensor]:
        encoded.extend(prompts)
        return tokenize(self, prompts)

    eager.warm_up()
    assert sizes == [4, 2, 1]
    monkeypatch.setattr(PromptTokenizers, "__call__", listing)
    original(eager, [make_sample("0")])
    assert encoded == ["0"]


def test_repeated_prompts_are_encoded_once(eager: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    original = PromptTokenizers.__call__

    def counting(self: PromptTokenizers, prompts: Sequence[str]) -> dict[str, Tensor]:
        batches.append(len(prompts))
        return original(self, prompts)

    monkeypatch.setattr(PromptTokenizers, "__call__", counting)
    prompts = ["one torus", "two cones", "one torus", "a sky"]
    eager.prepare([make_sample(prompt) for prompt in prompts])
    eager.prepare([make_sample("one torus"), make_sample("a ground")])
    eager.prepare([make_sample("two cones")])
    assert batches == [3, 1]


def test_prompts_that_are_encoded_together_keep_their_rows(eager_bundle: Path) -> None:
    together, alone = (Pipeline.load(eager_bundle, backend=Backend.EAGER) for _ in range(2))  # nothing cached
    told = together.prepare(MIXED).cond
    for row, wanted in enumerate(MIXED):
        for name, tensor in alone.prepare([wanted]).cond.items():
            torch.testing.assert_close(told[name][row], tensor[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "1 to 4 samples, not 0"),
        ([make_sample()] * 5, "1 to 4 samples, not 5"),
        ([make_sample(num_steps=3)], r"num_steps 3 is not one of \[1, 2, 4\]"),
        (
            [Sample(prompt="", seed=0, num_steps=1, bucket=Bucket(32, 32))],
            "32x32 is not in this bundle.*64x64",
        ),
        (
            [make_sample(), Sample(prompt="", seed=0, num_steps=1, bucket=Bucket(32, 32))],
            "two buckets: 64x64 and 32x32",
        ),
        ([make_sample(seed=-1)], "seed"),
        ([make_sample(seed=2**63)], "seed"),
    ],
)
def test_batch_that_cannot_be_drawn_is_refused(eager: Pipeline, samples: list[Sample], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eager.prepare(samples)


def test_row_that_became_nan_is_named_instead_of_drawn(eager: Pipeline) -> None:
    run = eager.prepare(MIXED)
    while not run.finished:
        eager.step(run)
    run.latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"rows \[1\]"):
        eager.decode(run)

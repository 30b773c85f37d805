"""The pipeline a worker calls: same picture in any company, cancelled rows, fallbacks, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.bundle import integrity
from engines.bundle.bucket import Bucket
from engines.bundle.manifest import read_manifest, write_manifest
from engines.bundle.platform import current_platform
from engines.bundle.stages import Backend, StageSpec, TensorSpec
from engines.denoiser import NetworkDenoiser
from engines.errors import BackendUnavailable, BundleError, NonFiniteError
from engines.families.image_vae import load_decoder
from engines.families.pixart import load_encoder, load_transformer, predict
from engines.families.tokenizer import PromptTokenizers
from engines.noise import seeded_latents
from engines.runtime.aotinductor import AotInductorEngine, Constants
from engines.runtime.memory import plan_memory
from engines.runtime.pipeline import BatchRun, Pipeline, Sample
from engines.runtime.prompt_cache import PromptCache
from engines.runtime.stages import EagerEngine, Stage, pick_engine
from engines.sampler import sample
from engines.schedule import NoiseSchedule
from tests.engines.published_form import as_published
from tests.engines.test_memory import with_peaks

# A real compilation may have to run first.
pytestmark = pytest.mark.timeout(900)

BUCKET = Bucket(64, 64)
TOLERANCE = 2
"""Of 255. What a row may change with the batch around it: other batch sizes add up in another order."""


def make_sample(prompt: str = "a red cube", seed: int = 0, num_steps: int = 4) -> Sample:
    return Sample(prompt=prompt, seed=seed, num_steps=num_steps, bucket=BUCKET)


MIXED = [
    make_sample("a red cube", seed=1, num_steps=4),
    make_sample("a blue sphere left of a cone", seed=2, num_steps=1),
    make_sample("", seed=2**63 - 1, num_steps=2),
]


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    return int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())


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


# --- loading ---


def test_compiled_code_that_does_not_fit_makes_way_for_eager(
    compiled_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = current_platform()
    elsewhere = here.model_copy(update={"torch": "9.9.9", "cpu_flags": ()})
    monkeypatch.setattr(integrity, "current_platform", lambda *_: elsewhere)
    pipeline = Pipeline.load(compiled_bundle)
    assert pipeline.backend == "eager"
    (warning,) = pipeline.warnings
    assert "platform.torch" in warning
    assert "platform.cpu_flags" in warning
    assert pipeline.run(MIXED[:1])[0].shape == (1, 64, 64, 3)
    with pytest.raises(BackendUnavailable, match=r"platform\.torch") as caught:
        Pipeline.load(compiled_bundle, backend=Backend.AOTINDUCTOR)
    assert caught.value.code == "backend_unavailable"


def test_compiled_code_that_does_not_load_makes_way_for_eager(compiled_bundle: Path, tmp_path: Path) -> None:
    """As on a machine that lacks a shared library: hashes and platform are right, loading still fails."""
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    data = json.loads((bundle / "manifest.json").read_text())
    path = data["engines"][0]["path"]
    (bundle / path).write_bytes(b"PK\x03\x04 no package at all")
    data["files"][path] = integrity.hash_file(bundle / path).model_dump()
    (bundle / "manifest.json").write_text(json.dumps(data))
    pipeline = Pipeline.load(bundle)
    assert pipeline.backend == "eager"
    assert path in pipeline.warnings[0]
    assert pipeline.run(MIXED[:1])


def test_bundle_without_compiled_code_serves_with_a_warning(eager_bundle: Path) -> None:
    pipeline = Pipeline.load(eager_bundle)
    assert pipeline.backend == "eager"
    assert "no compiled code" in pipeline.warnings[0]
    with pytest.raises(BackendUnavailable, match="no compiled code"):
        Pipeline.load(eager_bundle, backend=Backend.AOTINDUCTOR)


def test_damaged_bundle_is_refused_by_the_fields_name(compiled_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    path = read_manifest(bundle).engines[0].path
    data = bytearray((bundle / path).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / path).write_bytes(data)
    with pytest.raises(BundleError, match="sha256") as caught:
        Pipeline.load(bundle)
    assert caught.value.field == f"files.{path}"


def test_unsupported_scheduler_is_refused_by_the_fields_name(eager_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(eager_bundle, tmp_path / "bundle")
    path = bundle / "checkpoint" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_schedule": "cosine"}))
    manifest = read_manifest(bundle)
    files = integrity.hash_files(bundle)
    version = integrity.content_version(files, manifest.buckets)
    write_manifest(bundle, manifest.model_copy(update={"files": files, "version": version}))
    with pytest.raises(BundleError, match=r"^checkpoint\.scheduler: .*cosine"):
        Pipeline.load(bundle)


def test_package_with_foreign_constants_is_refused(compiled_bundle: Path) -> None:
    manifest = read_manifest(compiled_bundle)
    spec, engine = manifest.stages[0], manifest.engines[0]
    constants = Constants(compiled_bundle).bind(spec, engine)
    constants.pop(next(iter(constants)))
    with pytest.raises(BundleError, match="constants"):
        AotInductorEngine(compiled_bundle / engine.path, constants, min_batch=1, max_batch=4)


def test_constants_are_read_once_and_shared(compiled_bundle: Path) -> None:
    manifest = read_manifest(compiled_bundle)
    constants = Constants(compiled_bundle)
    for spec, engine in zip(manifest.stages, manifest.engines, strict=True):
        first, second = constants.bind(spec, engine), constants.bind(spec, engine)
        assert all(first[name] is second[name] for name in first)
        assert {str(tensor.dtype) for tensor in first.values()} == {"torch.float32"}


def test_missing_weight_is_refused_by_its_name(compiled_bundle: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from engines.families.weights import load_weights

    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    part = bundle / "checkpoint" / "transformer"
    weights = load_weights(part)
    del weights["proj_out.bias"]
    save_file(weights, next(part.glob("*.safetensors")))
    manifest = read_manifest(bundle)
    with pytest.raises(BundleError, match=r"checkpoint\.transformer\.proj_out\.bias: missing"):
        Constants(bundle).bind(manifest.stages[1], manifest.engines[1])


def test_packages_find_the_weights_of_a_published_folder(compiled_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    as_published(bundle / "checkpoint")
    manifest = read_manifest(bundle)
    modern, published = Constants(compiled_bundle), Constants(bundle)
    for spec, engine in zip(manifest.stages, manifest.engines, strict=True):
        found, expected = published.bind(spec, engine), modern.bind(spec, engine)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    planned = with_peaks(manifest, Backend.AOTINDUCTOR)
    assert plan_memory(bundle, planned).lines == plan_memory(compiled_bundle, planned).lines


# --- stages ---


class Doubling(nn.Module):
    """Doubles; remembers the batch sizes it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, latents: Tensor) -> Tensor:
        self.batches.append(len(latents))
        assert latents.is_contiguous()
        return latents * 2


def toy_spec() -> StageSpec:
    return StageSpec(
        name="denoise",
        parts=("transformer",),
        bucket=BUCKET,
        inputs=(TensorSpec(name="latents", dtype="float32", shape=(3,)),),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=(3,)),),
    )


def fixed_size(module: nn.Module, batch: int) -> EagerEngine:
    engine = EagerEngine(module, batch)
    engine.min_batch = batch
    return engine


def test_padded_rows_do_not_change_real_rows() -> None:
    module = Doubling()
    stage = Stage(toy_spec(), [fixed_size(module, 2), fixed_size(module, 4)], 4)
    for batch, expected in [(1, 2), (2, 2), (3, 4), (4, 4)]:
        latents = torch.randn(batch, 3)
        assert torch.equal(stage(latents)[0], latents * 2)
        assert module.batches[-1] == expected


def test_engine_for_exactly_this_size_comes_before_one_for_a_range_before_padding() -> None:
    module = Doubling()
    exact, wide, large = fixed_size(module, 2), EagerEngine(module, 4), fixed_size(module, 8)
    engines = [large, wide, exact]
    assert pick_engine(2, engines) == (exact, 2)
    assert pick_engine(3, engines) == (wide, 3)
    assert pick_engine(5, engines) == (large, 8)
    with pytest.raises(ValueError, match="batch of 9"):
        pick_engine(9, engines)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "takes 1 tensors, not 0"),
        ([torch.zeros(1, 4)], r"takes latents as float32 \(1, 3\), not float32 \(1, 4\)"),
        ([torch.zeros(1, 3, dtype=torch.float64)], r"not float64 \(1, 3\)"),
        ([torch.zeros(1, 3, 1)], r"not float32 \(1, 3, 1\)"),
        ([torch.zeros(5, 3)], "batches of 1 to 4, not 5"),
        ([torch.zeros(0, 3)], "batches of 1 to 4, not 0"),
    ],
)
def test_stage_refuses_what_compiled_code_would_misread(inputs: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(toy_spec(), [EagerEngine(Doubling(), 4)], 4)(*inputs)


def test_compiled_stage_refuses_another_dtype_and_takes_any_stride(compiled_bundle: Path) -> None:
    stage = Pipeline.load(compiled_bundle).stage("decode", BUCKET)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="float32"):
        stage(latents.double())
    channels_last = latents.to(memory_format=torch.channels_last)
    assert torch.equal(stage(channels_last)[0], stage(latents)[0])


# --- the prompt cache ---


def entry(kilobytes: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(kilobytes * 1024, dtype=torch.uint8), torch.zeros(0)


def test_least_recently_used_prompt_is_forgotten_first() -> None:
    cache = PromptCache(max_bytes=3 * 1024)
    for prompt in "abc":
        cache.put(prompt, entry(1))
    assert cache.get("a") is not None
    cache.put("d", entry(1))
    assert [prompt for prompt in "abcd" if cache.get(prompt) is not None] == ["a", "c", "d"]


def test_replacing_an_entry_counts_its_bytes_once() -> None:
    cache = PromptCache(max_bytes=2 * 1024)
    cache.put("a", entry(1))
    for _ in range(5):
        cache.put("b", entry(1))
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == 0
    assert cache.get("a") is None


def test_entry_larger_than_the_cache_is_not_kept() -> None:
    cache = PromptCache(max_bytes=1024)
    cache.put("a", entry(2))
    assert len(cache) == 0


def test_loading_a_compiled_bundle_imports_neither_diffusers_nor_transformers(compiled_bundle: Path) -> None:
    """They take seconds, at every start of a worker."""
    import subprocess
    import sys

    script = (
        "import sys; from pathlib import Path; from engines.runtime.pipeline import Pipeline;"
        f"assert Pipeline.load(Path({str(compiled_bundle)!r})).backend == 'aotinductor';"
        "print(*sorted({'diffusers', 'transformers', 'torch._inductor'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

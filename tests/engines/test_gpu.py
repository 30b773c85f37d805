"""Bundles for a GPU: what can be known of them without one, and, where there is one, all of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.__main__ import main
from engines.bundle.bucket import Bucket
from engines.bundle.manifest import read_manifest, write_manifest
from engines.bundle.platform import current_platform
from engines.bundle.stages import Backend
from engines.compile.aotinductor import CUDA_INDUCTOR_CONFIG, INDUCTOR_CONFIG, CompileJob, compile_key
from engines.compile.build import check_device, num_pieces
from engines.compile.cli import default_device
from engines.compile.export import example_inputs
from engines.compile.needed import reason_to_build
from engines.compile.parity import compare
from engines.compile.precision import dtype_for
from engines.compile.settings import Precision
from engines.errors import CompileError, MemoryPlanError
from engines.families.spec import FAMILIES, get_family
from engines.families.student import read_student
from engines.runtime.aotinductor import Binding, _as_bound
from engines.runtime.pipeline import Pipeline, Sample
from engines.runtime.stages import MODULE_DTYPES
from tests.engines.conftest import build, build_settings
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox, make_tiny_sdxl

SAMPLES = [
    Sample(prompt="a red cube", seed=seed, num_steps=steps, bucket=Bucket(64, 64))
    for seed, steps in ((1, 4), (2, 1), (3, 2))
]


def for_gpu(eager_bundle: Path, folder: Path) -> Path:
    """A bundle without compiled code that says it was built for a GPU."""
    bundle = shutil.copytree(eager_bundle, folder / "bundle")
    manifest = read_manifest(bundle)
    gpu = manifest.platform.model_copy(update={"gpu": "NVIDIA H100", "compute_capability": "9.0"})
    stages = [spec.model_copy(update={"compute_dtype": "bfloat16"}) for spec in manifest.stages]
    write_manifest(bundle, manifest.model_copy(update={"device": "cuda", "platform": gpu, "stages": stages}))
    return bundle


def test_bundle_for_a_gpu_is_drawn_by_the_cpu_where_there_is_none(
    eager_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipeline = Pipeline.load(for_gpu(eager_bundle, tmp_path))
    assert (pipeline.device.type, pipeline.backend, pipeline.memory) == ("cpu", "eager", None)
    assert pipeline.warnings[0].startswith("device: the bundle was built for a GPU")
    pipeline.warm_up()
    assert pipeline.graphs == []
    ours, theirs = pipeline.run(SAMPLES), Pipeline.load(eager_bundle, backend=Backend.EAGER).run(SAMPLES)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_full_gpu_is_refused_before_anything_is_loaded(
    eager_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100 << 20, 80 << 30))
    with pytest.raises(
        MemoryPlanError, match=r"(?s)tiny \(eager\) needs .* prompt cache .* --batches"
    ) as caught:
        Pipeline.load(for_gpu(eager_bundle, tmp_path), backend=Backend.EAGER)
    assert "estimated" in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_stages_compute_in_what_is_asked_for_or_does_not_overflow(family: str, precision: Precision) -> None:
    found = {stage: dtype_for(precision, stage, family) for stage in ("text", "denoise", "decode")}
    if precision == "fp32":
        assert set(found.values()) == {"float32"}
        return
    assert found["denoise"] == {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8"}[precision]
    assert found["decode"] == "bfloat16"
    assert found["text"] == ("float16" if (precision, family) == ("fp16", "sdxl") else "bfloat16")


@pytest.mark.parametrize("make", [make_tiny_checkpoint, make_tiny_sdxl, make_tiny_cogvideox])
def test_every_stage_agrees_with_float32_in_bfloat16(make: object, tmp_path: Path) -> None:
    directory = make(tmp_path / "student")  # type: ignore[operator]
    student = read_student(directory)
    family = get_family(student.family)
    for spec in family.stages(directory, student):
        inputs = example_inputs(spec, 2)
        with torch.inference_mode():
            wanted, found = (
                family.load_stage(directory, spec, dtype)(*inputs)
                for dtype in (torch.float32, MODULE_DTYPES["bfloat16"])
            )
        for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (wanted, found)), strict=True):
            assert a.dtype == b.dtype
            assert compare(a, b).cosine >= 0.999


def test_key_of_a_package_for_a_gpu_follows_the_gpu(eager_bundle: Path) -> None:
    job = CompileJob(
        family="pixart",
        spec=read_manifest(eager_bundle).stages[1],
        min_batch=1,
        max_batch=4,
        num_threads=1,
        bundle=eager_bundle,
        platform=current_platform().model_copy(update={"gpu": "NVIDIA H100", "cuda": "13.0"}),
    )
    on_gpu = replace(job, device="cuda")
    other = job.platform.model_copy(update={"gpu": "NVIDIA H200"})
    newer = job.platform.model_copy(update={"driver": "999"})
    assert job.inductor_config == INDUCTOR_CONFIG
    assert on_gpu.inductor_config == CUDA_INDUCTOR_CONFIG
    assert compile_key(on_gpu) != compile_key(job)
    assert compile_key(replace(on_gpu, platform=other)) != compile_key(on_gpu)
    assert compile_key(replace(on_gpu, platform=newer)) == compile_key(on_gpu)
    assert compile_key(replace(job, platform=other)) == compile_key(job)
    float8 = on_gpu.spec.model_copy(update={"compute_dtype": "float8"})
    assert compile_key(replace(on_gpu, spec=float8)) != compile_key(on_gpu)


def test_constants_lie_where_the_code_wants_them() -> None:
    stored = torch.arange(6.0).view(2, 3).half()
    meta = torch.device("meta")
    bound = _as_bound(stored, Binding(tensor="w", dtype="bfloat16", stride=(1, 2)), meta)
    assert (bound.device, bound.dtype, bound.stride()) == (meta, torch.bfloat16, (1, 2))
    number = _as_bound(stored, Binding(tensor="w", dtype="float32", device="cpu"), meta)
    assert torch.equal(number, stored.float())


def test_settings_that_do_not_go_together_are_refused(tiny_student: Path, tmp_path: Path) -> None:
    settings = build_settings(tiny_student, tmp_path / "bundle")
    check_device(settings)
    with pytest.raises(CompileError, match="--static-batches 3: not among --batches"):
        check_device(replace(settings, static_batches=(2, 3)))
    if not torch.cuda.is_available():
        with pytest.raises(CompileError, match="--device cuda: torch sees no GPU here"):
            check_device(replace(settings, device="cuda"))
        arguments = ["build", str(tiny_student), "--out", str(tmp_path / "bundle"), "--device", "cuda"]
        assert main(arguments) == 2
    compiled = replace(settings, backends=(Backend.AOTINDUCTOR,), static_batches=(1, 2))
    assert num_pieces(compiled) == num_pieces(replace(compiled, static_batches=())) + 4  # text has none


def test_cpu_is_built_for_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert default_device() == "cpu"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cuda"}, "it was built for cpu"),
        ({"precision": "bf16"}, "its denoiser computes in float32"),
        ({"static_batches": (2,)}, "it lacks packages for single batch sizes"),
    ],
)
def test_bundle_for_something_else_is_built_anew(
    tiny_student: Path, compiled_bundle: Path, options: dict[str, object], reason: str
) -> None:
    manifest = read_manifest(compiled_bundle)
    found = reason_to_build(
        tiny_student,
        compiled_bundle,
        batch_sizes=manifest.batch_sizes,
        backends=(Backend.AOTINDUCTOR,),
        num_threads=1,
        decode_dtype="float32",
        **options,  # type: ignore[arg-type]
    )
    assert found == reason


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_tiny_student_on_a_gpu_draws_what_it_draws_uncompiled(
    precision: Precision, tiny_student: Path, tmp_path: Path
) -> None:
    settings = replace(
        build_settings(tiny_student, tmp_path / "bundle"),
        backends=(Backend.AOTINDUCTOR,),
        device="cuda",
        precision=precision,
        static_batches=(2,),
        num_jobs=1,
        decode_dtype="auto",
    )
    bundle = build(settings)
    manifest = read_manifest(bundle)
    assert manifest.device == "cuda"
    assert manifest.platform.gpu
    assert all(row.peak_bytes for row in manifest.latency)
    compiled, eager = (
        Pipeline.load(bundle, backend=Backend.AOTINDUCTOR),
        Pipeline.load(bundle, backend=Backend.EAGER),
    )
    assert (compiled.device.type, compiled.warnings) == ("cuda", [])
    before = compiled.run(SAMPLES)
    compiled.warm_up()
    assert len(compiled.graphs) == len(manifest.stages) * len(manifest.batch_sizes)
    after = compiled.run(SAMPLES)
    limit = 40 if precision == "fp8" else 16  # of 255, on a random network, after four steps
    for first, second, reference in zip(before, after, eager.run(SAMPLES), strict=True):
        assert np.abs(first.astype(int) - second.astype(int)).max() <= 6
        assert np.abs(second.astype(int) - reference.astype(int)).mean() <= limit / 4
    free, _ = torch.cuda.mem_get_info()
    assert compiled.memory is not None
    assert compiled.memory.total_bytes < free

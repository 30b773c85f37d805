"""One real compilation of the tiny student, and everything around it that needs none."""

from __future__ import annotations

import io
import itertools
import json
import math
import multiprocessing
import re
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.__main__ import main
from engines.bundle.bucket import Bucket
from engines.bundle.integrity import check_platform, verify_files
from engines.bundle.manifest import read_manifest
from engines.bundle.platform import current_platform
from engines.bundle.stages import Backend, StageSpec, TensorSpec
from engines.compile import needed, packages, parity, precision
from engines.compile.aotinductor import CompileJob, bind_constants, compile_key, last_error_line
from engines.compile.build import build_bundle, num_pieces
from engines.compile.export import example_inputs, export_stage
from engines.compile.measure import MAX_CALLS, MIN_CALLS, median_ms
from engines.compile.needed import EAGER_ASKED_FOR, NO_COMPILER, buckets_of, reason_to_build
from engines.compile.parity import MIN_COSINE, check_parity, compare, worst
from engines.compile.precision import choose_dtype
from engines.compile.progress import BuildProgress
from engines.compile.student_files import changed_file
from engines.compile.verify import verify_bundle
from engines.errors import CheckpointError, CompileError, ParityError
from engines.families.spec import get_family
from engines.families.student import read_student
from engines.families.weights import load_weights
from engines.noise import seeded_latents
from engines.runtime import stages as stages_module
from engines.runtime.pipeline import Pipeline, Sample
from engines.runtime.stages import EagerEngine, Stage
from tests.engines.conftest import BATCH_SIZES, build, build_settings
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox

# The compiler takes a minute on a quiet machine.
pytestmark = pytest.mark.timeout(900)

BUCKET = Bucket(64, 64)


def doubling_spec(maximum: int | None = None) -> StageSpec:
    """A stage that is none: four floats in, four out."""
    return StageSpec(
        name="denoise",
        parts=("transformer",),
        bucket=BUCKET,
        inputs=(TensorSpec(name="latents", dtype="float32", shape=(4,), maximum=maximum),),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=(4,)),),
    )


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, latents: Tensor) -> Tensor:
        return latents * self.factor


def scaled_stage(factor: float) -> Stage:
    return Stage(doubling_spec(), [EagerEngine(Scaled(factor), 4)], 4)


# --- the compiled bundle ---


def test_compiled_bundle_is_complete_and_fits_this_machine(compiled_bundle: Path) -> None:
    manifest = verify_files(compiled_bundle)
    assert manifest.backend == "aotinductor"
    assert manifest.eager_only is None
    assert check_platform(manifest) == []
    assert {engine.stage for engine in manifest.engines} == {"text", "denoise", "decode"}
    assert {(row.stage, row.batch, row.backend) for row in manifest.latency} == {
        (stage, batch, backend)
        for stage in ("text", "denoise", "decode")
        for batch in BATCH_SIZES
        for backend in ("eager", "aotinductor")
    }
    assert all(row.ms > 0 for row in manifest.latency)
    assert manifest.predict_ms(BUCKET, 4, 2) > manifest.predict_ms(BUCKET, 1, 2)


def test_compiled_code_agrees_with_eager_at_every_batch_size(compiled_bundle: Path) -> None:
    rows = read_manifest(compiled_bundle).parity
    assert {(row.stage, row.batch) for row in rows} == {
        (stage, batch) for stage in ("text", "denoise", "decode") for batch in BATCH_SIZES
    }
    assert all(row.finite and row.cosine >= 0.999 for row in rows)
    assert all(row.max_abs <= 2 for row in rows if row.stage == "decode")


def test_packages_hold_code_and_the_checkpoint_the_weights(compiled_bundle: Path) -> None:
    manifest = read_manifest(compiled_bundle)
    for engine in manifest.engines:
        with safe_open(compiled_bundle / engine.constants, framework="pt") as stream:
            bindings = json.loads(stream.metadata()["bindings"])
            own = set(stream.keys())
        assert bindings
        assert {binding["tensor"] for binding in bindings.values() if binding.get("own")} == own
        # only the table of positions, which no checkpoint stores
        assert own == ({"transformer.pos_embed.pos_embed"} if engine.stage == "denoise" else set())


def test_building_leaves_nothing_behind(compiled_bundle: Path) -> None:
    assert {path.name for path in compiled_bundle.iterdir()} == {"manifest.json", "checkpoint", "engines"}
    modes = {path.stat().st_mode & 0o444 for path in compiled_bundle.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_verification_repeats_the_parity_check(compiled_bundle: Path) -> None:
    verdict = verify_bundle(compiled_bundle)
    assert verdict.mismatches == []
    assert len(verdict.parity) == 3 * len(BATCH_SIZES)


def test_retrained_student_keeps_the_packages_and_draws_with_its_own_weights(
    compiled_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    before = {path.name: path.stat().st_mtime_ns for path in (bundle / "engines").iterdir()}
    student = make_tiny_checkpoint(tmp_path / "student", seed=1)
    build(replace(build_settings(student, bundle), backends=(Backend.AOTINDUCTOR,)))
    after = {path.name: path.stat().st_mtime_ns for path in (bundle / "engines").iterdir()}
    assert after == before
    assert read_manifest(bundle).version != read_manifest(compiled_bundle).version
    samples = [Sample(prompt="a red cube", seed=7, num_steps=2, bucket=BUCKET)]
    retrained, eager, original = (
        Pipeline.load(bundle).run(samples)[0].astype(int),
        Pipeline.load(bundle, backend=Backend.EAGER).run(samples)[0].astype(int),
        Pipeline.load(compiled_bundle).run(samples)[0].astype(int),
    )
    assert np.abs(retrained - eager).max() <= 2
    assert np.abs(retrained - original).max() > 50


def test_key_follows_code_and_machine_but_not_weights(compiled_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(compiled_bundle)
    job = CompileJob(
        family="pixart",
        spec=manifest.stages[1],
        min_batch=1,
        max_batch=4,
        num_threads=1,
        bundle=compiled_bundle,
        platform=current_platform(),
    )
    key = compile_key(job)
    other_weights = tmp_path / "bundle"
    make_tiny_checkpoint(other_weights / "checkpoint", seed=5)
    assert key == manifest.engines[1].key
    assert compile_key(replace(job, bundle=other_weights)) == key
    assert compile_key(replace(job, max_batch=8)) != key
    assert compile_key(replace(job, num_threads=2)) != key
    elsewhere = job.platform.model_copy(update={"torch": "1.0"})
    assert compile_key(replace(job, platform=elsewhere)) != key


# --- without compiling ---


def test_bundle_without_compiled_code_says_so(eager_bundle: Path) -> None:
    manifest = read_manifest(eager_bundle)
    assert (manifest.backend, manifest.engines, manifest.parity) == ("eager", [], [])
    assert manifest.eager_only == EAGER_ASKED_FOR
    assert manifest.predict_ms(BUCKET, 4, 3) > 0


def test_machine_without_a_compiler_gets_an_eager_bundle_and_a_warning(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = replace(build_settings(tiny_student, tmp_path / "bundle"), backends=(Backend.AOTINDUCTOR,))
    console = Console(record=True, width=200)
    with BuildProgress(console, num_pieces(settings)) as progress:
        manifest = build_bundle(settings, progress)
    assert manifest.eager_only == NO_COMPILER
    assert "no C++ compiler" in console.export_text()


@pytest.mark.parametrize("allow_eager", [False, True])
def test_failing_compiler_is_an_error_unless_eager_may_serve(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allow_eager: bool
) -> None:
    def fail(*_: object) -> None:
        raise CompileError("stage decode: fatal error: omp.h: no such file")

    monkeypatch.setattr(packages, "_compile_all", fail)
    monkeypatch.setattr(packages, "has_compiler", lambda: True)
    settings = replace(
        build_settings(tiny_student, tmp_path / "bundle"),
        backends=(Backend.AOTINDUCTOR,),
        allow_eager=allow_eager,
    )
    if not allow_eager:
        with pytest.raises(CompileError, match=r"omp\.h"):
            build(settings)
        assert not (tmp_path / "bundle" / "manifest.json").exists()
        return
    manifest = read_manifest(build(settings))
    assert manifest.eager_only is not None
    assert "omp.h" in manifest.eager_only


def test_interruption_while_the_compilers_start_is_an_interruption(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came just before the pool's own thread ran: that pool could not be shut down, and said so."""
    start = threading.Thread.start

    def start_late(thread: threading.Thread) -> None:
        if "ExecutorManager" in type(thread).__name__:
            signal.raise_signal(signal.SIGINT)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_late)
    settings = replace(build_settings(tiny_student, tmp_path / "bundle"), backends=(Backend.AOTINDUCTOR,))
    # whoever runs the tests in the background has it ignored
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            build(settings)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert multiprocessing.active_children() == []
    assert not (tmp_path / "bundle" / ".build").exists()


def gated(directory: Path, gate: dict[str, Any] | None) -> Path:
    student = make_tiny_checkpoint(directory)
    path = student / "student.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gate": gate}))
    return student


FAILED = {
    "passed": False,
    "criteria": [{"text": "right 3 of 9", "passed": False}, {"text": "quick", "passed": True}],
}


@pytest.mark.parametrize(
    ("gate", "message", "summary"),
    [
        (FAILED, r"field gate\.passed.*: right 3 of 9\. --force", "failed, forced"),
        ({"passed": False}, r"field gate\.passed.*refused this student\. --force", "failed, forced"),
        (None, r"field gate: .*never went through.*engines gate .*student.*--ungated", "never gated"),
    ],
)
def test_student_that_did_not_pass_its_gate_is_built_when_asked_for_which_the_bundle_tells(
    gate: dict[str, Any] | None,
    message: str,
    summary: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = build_settings(gated(tmp_path / "student", gate), tmp_path / "bundle")
    with pytest.raises(CheckpointError, match=message):
        build(settings)
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(CheckpointError, match=message):  # the one does not stand for the other
        build(replace(settings, force=gate is None, ungated=gate is not None))
    verdict = read_manifest(build(replace(settings, force=gate is not None, ungated=gate is None))).gate
    assert verdict.forced == (gate is not None)
    assert verdict.summary == summary
    assert [criterion.text for criterion in verdict.criteria] == [
        criterion["text"] for criterion in (gate or {}).get("criteria", [])
    ]
    assert main(["inspect", str(tmp_path / "bundle")]) == 0
    shown = capsys.readouterr().out
    assert summary in shown
    assert ("FAILED" in shown) == bool(verdict.criteria)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("transformer", "proj_out.bias", math.nan), ("vae", "encoder.conv_in.weight", -math.inf)],
)
def test_weights_that_are_not_finite_are_refused_though_nothing_is_compiled(
    part: str, name: str, value: float, tiny_student: Path, tmp_path: Path
) -> None:
    student = shutil.copytree(tiny_student, tmp_path / "student")
    file = student / part / "diffusion_pytorch_model.safetensors"
    weights = load_weights(student / part)
    weights[name].view(-1)[-1] = value
    save_file(weights, file)
    problem = rf"{part}/{file.name}: tensor {re.escape(name)} holds numbers that are not finite"
    with pytest.raises(CheckpointError, match=problem):
        build(build_settings(student, tmp_path / "bundle"))
    assert not (tmp_path / "bundle" / "manifest.json").exists()


@pytest.mark.parametrize("passed", [True, None])
def test_only_examples_that_a_gate_found_right_are_offered(passed: bool | None, tmp_path: Path) -> None:
    read = [{"prompt": "a cube", "right": 0.9}, {"prompt": "a cone", "right": 0.88}]
    student = gated(tmp_path / "student", {"passed": True, "examples": read} if passed else None)
    file = student / "student.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"examples": ["a cube", "a cone", "a torus"]}))
    said = io.StringIO()
    settings = replace(build_settings(student, tmp_path / "bundle"), ungated=not passed)
    with BuildProgress(Console(file=said, width=400), num_pieces(settings)) as progress:
        manifest = build_bundle(settings, progress)
    assert manifest.student["examples"] == (["a cube"] if passed else [])
    left_out = "2 of 3" if passed else "3 of 3"
    assert f"{left_out} examples are left out, for no quality gate has found them right" in said.getvalue()
    assert changed_file(student, manifest) is None


def test_student_that_passed_its_gate_needs_no_force(tmp_path: Path) -> None:
    student = gated(tmp_path / "student", {"passed": True, "criteria": [{"text": "good", "passed": True}]})
    (student / "report").mkdir()
    (student / "report" / "report.md").write_text("all well")
    bundle = build(build_settings(student, tmp_path / "bundle"))
    manifest = read_manifest(bundle)
    assert manifest.gate.summary == "passed"
    assert manifest.gate.criteria[0].text == "good"
    assert "report/report.md" in manifest.files
    verify_files(bundle)


def test_building_again_replaces_what_changed_and_deletes_what_is_gone(
    tiny_student: Path, tmp_path: Path
) -> None:
    student = shutil.copytree(tiny_student, tmp_path / "student")
    (student / "transformer" / "notes.txt").write_text("old")
    bundle = build(build_settings(student, tmp_path / "bundle"))
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / "stale.pt2").write_bytes(b"code of another machine")
    (student / "transformer" / "notes.txt").unlink()
    build(build_settings(student, bundle))
    manifest = verify_files(bundle)
    assert not [name for name in manifest.files if "notes" in name or "stale" in name]


def test_bundle_can_be_rebuilt_from_its_own_checkpoint(eager_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(eager_bundle, tmp_path / "bundle")
    build(build_settings(bundle / "checkpoint", bundle))
    assert verify_files(bundle).version == read_manifest(eager_bundle).version


def test_code_that_disagrees_with_eager_is_an_error_unless_eager_may_serve(
    tiny_student: Path, compiled_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    monkeypatch.setattr(parity, "MAX_PIXEL_DIFFERENCE", {"float32": -1.0})
    settings = replace(build_settings(tiny_student, bundle), backends=(Backend.AOTINDUCTOR,))
    with pytest.raises(ParityError, match="a pixel differs"):
        build(settings)
    manifest = verify_files(build(replace(settings, allow_eager=True)))
    assert manifest.engines == []
    assert "does not draw what eager draws" in str(manifest.eager_only)
    assert {row.backend for row in manifest.latency} == {"eager"}


@pytest.mark.parametrize(
    ("flags", "half_error", "half_is_faster", "expected"),
    [
        (("avx2",), 0, True, "float32"),  # no instructions for it
        (("avx512_bf16",), 0, True, "bfloat16"),
        (("avx512_bf16",), 7, True, "float32"),  # too far off
        (("amx_bf16",), 0, False, "float32"),  # not faster
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster_and_close(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    half_error: int,
    half_is_faster: bool,
    expected: str,
) -> None:
    class Pixels(nn.Module):
        def __init__(self, value: int) -> None:
            super().__init__()
            self.value = value

        def forward(self, latents: Tensor) -> Tensor:
            return torch.full_like(latents, self.value, dtype=torch.uint8)

    def load_stage(_: Path, __: StageSpec, dtype: torch.dtype) -> nn.Module:
        return Pixels(100 if dtype == torch.float32 else 100 + half_error)

    times_s = itertools.cycle([2.0, 1.0 if half_is_faster else 2.0])  # float32, bfloat16, float32, ...
    monkeypatch.setattr(precision, "_time_s", lambda *_: next(times_s))
    family = replace(get_family("pixart"), load_stage=load_stage)
    spec = doubling_spec().model_copy(
        update={"name": "decode", "outputs": (TensorSpec(name="pixels", dtype="uint8", shape=(4,)),)}
    )
    platform = current_platform().model_copy(update={"cpu_flags": flags})
    assert choose_dtype(family, tmp_path, spec, platform) == expected


# --- several sizes in one bundle ---


def test_bundle_of_several_sizes_draws_each_with_one_set_of_weights(
    tiny_student: Path, eager_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (Bucket(64, 64), Bucket(96, 64), Bucket(64, 64))
    settings = replace(build_settings(tiny_student, tmp_path / "bundle"), buckets=sizes, batch_sizes=(1, 2))
    manifest = read_manifest(build(settings))
    assert manifest.buckets == [Bucket(64, 64), Bucket(96, 64)]
    assert [spec.label for spec in manifest.stages] == [
        "text", "denoise-64x64", "decode-64x64", "denoise-96x64", "decode-96x64"
    ]  # fmt: skip
    assert {(row.stage, row.bucket) for row in manifest.latency} == {
        (spec.name, spec.bucket) for spec in manifest.stages
    }

    pipeline, single = Pipeline.load(settings.out), Pipeline.load(eager_bundle)
    for bucket in manifest.buckets:
        sample = Sample(prompt="a red cube", seed=3, num_steps=4, bucket=bucket)
        (pixels,) = pipeline.run([sample])
        assert pixels.shape == (1, bucket.height, bucket.width, 3)
        latents = seeded_latents([3], (16, bucket.height // 8, bucket.width // 8))
        theirs = PixArtAlphaPipeline.from_pretrained(tiny_student).to(torch.float32)
        theirs.set_progress_bar_config(disable=True)
        drawn = theirs(
            "a red cube",
            height=bucket.height,
            width=bucket.width,
            latents=latents,
            num_inference_steps=4,
            guidance_scale=1.0,
            max_sequence_length=manifest.max_text_tokens,
            use_resolution_binning=False,
            clean_caption=False,
            output_type="np",
        ).images
        assert np.abs(drawn[0] * 255 - pixels[0].astype(float)).max() <= 1.5
    native = Sample(prompt="a red cube", seed=3, num_steps=4, bucket=Bucket(64, 64))
    assert np.array_equal(pipeline.run([native])[0], single.run([native])[0])

    family, loaded = get_family("pixart"), []

    def load_stage(checkpoint: Path, spec: StageSpec, dtype: torch.dtype) -> nn.Module:
        loaded.append(spec.name)
        return family.load_stage(checkpoint, spec, dtype)

    monkeypatch.setattr(stages_module, "get_family", lambda _: replace(family, load_stage=load_stage))
    Pipeline.load(settings.out)
    assert loaded == ["text", "denoise", "decode"]


def test_size_that_the_checkpoint_cannot_make_is_refused_by_its_name(
    tiny_student: Path, tmp_path: Path
) -> None:
    settings = replace(build_settings(tiny_student, tmp_path / "bundle"), buckets=(Bucket(64, 65),))
    with pytest.raises(CheckpointError, match=r"^bucket 64x65: width: 65 is not a multiple of 16"):
        build(settings)


def test_frames_that_a_size_leaves_out_are_the_students(tmp_path: Path) -> None:
    student = read_student(make_tiny_cogvideox(tmp_path / "student"))
    assert buckets_of(student, ()) == (Bucket(32, 32, 9),)
    wanted = (Bucket(32, 48), Bucket(32, 32, 17))
    assert buckets_of(student, wanted) == (Bucket(32, 48, 9), Bucket(32, 32, 17))


# --- is a build needed? ---


def reason(student: Path, bundle: Path, *, backends: tuple[Backend, ...] = (Backend.EAGER,)) -> str | None:
    return reason_to_build(
        student, bundle, batch_sizes=BATCH_SIZES, backends=backends, num_threads=1, decode_dtype="auto"
    )


def test_nothing_is_needed_for_a_fitting_bundle(tiny_student: Path, compiled_bundle: Path) -> None:
    assert reason(tiny_student, compiled_bundle, backends=(Backend.AOTINDUCTOR,)) is None
    assert reason(compiled_bundle / "checkpoint", compiled_bundle, backends=(Backend.AOTINDUCTOR,)) is None


def test_missing_damaged_or_outdated_bundle_is_built(
    tiny_student: Path, eager_bundle: Path, tmp_path: Path
) -> None:
    assert reason(tiny_student, eager_bundle) is None
    assert reason(tiny_student, tmp_path) == "there is no bundle yet"
    damaged = shutil.copytree(eager_bundle, tmp_path / "damaged")
    (damaged / "checkpoint" / "model_index.json").unlink()
    assert "damaged (files.checkpoint/model_index.json" in str(reason(tiny_student, damaged))
    retrained = make_tiny_checkpoint(tmp_path / "retrained", seed=3)
    assert "student has changed" in str(reason(retrained, eager_bundle))
    grown = shutil.copytree(tiny_student, tmp_path / "grown")
    (grown / "vae" / "notes.txt").write_text("new")
    assert reason(grown, eager_bundle) == "the student has changed (vae/notes.txt)"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"batch_sizes": (1,)}, "other batch sizes or threads"),
        ({"num_threads": 2}, "other batch sizes or threads"),
        ({"decode_dtype": "bfloat16"}, "its decode computes in float32"),
    ],
)
def test_bundle_built_with_other_options_is_built_anew(
    tiny_student: Path, compiled_bundle: Path, changed: dict[str, Any], reason: str
) -> None:
    options = {"batch_sizes": BATCH_SIZES, "num_threads": 1, "decode_dtype": "float32", **changed}
    found = reason_to_build(tiny_student, compiled_bundle, backends=(Backend.AOTINDUCTOR,), **options)
    assert found is not None
    assert reason in found


def test_code_of_another_machine_is_built_anew(
    tiny_student: Path, compiled_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = current_platform()
    monkeypatch.setattr(needed, "current_platform", lambda *_: here.model_copy(update={"torch": "9.9"}))
    found = reason(tiny_student, compiled_bundle, backends=(Backend.AOTINDUCTOR,))
    assert found is not None
    assert "platform.torch" in found


def test_eager_bundle_is_compiled_once_there_is_a_compiler(
    tiny_student: Path, eager_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(eager_bundle, tmp_path / "bundle")
    data = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**data, "eager_only": NO_COMPILER}))
    monkeypatch.setattr(needed, "has_compiler", lambda: False)
    assert reason(tiny_student, bundle, backends=(Backend.AOTINDUCTOR,)) is None
    monkeypatch.setattr(needed, "has_compiler", lambda: True)
    assert reason(tiny_student, bundle, backends=(Backend.AOTINDUCTOR,)) == "there is a C++ compiler now"


# --- parity, export, measuring ---


def test_parity_of_a_stage_with_itself_is_exact() -> None:
    row = check_parity(doubling_spec(), scaled_stage(2), scaled_stage(2), 3, Backend.AOTINDUCTOR)
    assert (row.max_abs, row.finite) == (0.0, True)
    assert row.cosine == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (-2.0, "cosine -1.00000"),
        (float("nan"), "not finite"),
        (0.0, "cosine 0.0"),
        (200.0, r"9.9e\+03 % too large or too small"),  # what the cosine does not see
        (2.02, "1 % too large or too small"),
        (1.98, "1 % too large or too small"),
    ],
)
def test_stage_that_disagrees_is_refused(factor: float, message: str) -> None:
    with pytest.raises(ParityError, match=f"stage denoise, batch 2, .*{message}"):
        check_parity(doubling_spec(), scaled_stage(2), scaled_stage(factor), 2, Backend.AOTINDUCTOR)


def test_agreement_is_that_of_the_worst_row() -> None:
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    candidate = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert compare(reference, candidate).cosine == pytest.approx(0.0)
    larger = torch.tensor([[1.0, 0.0], [1.5, 0.0]])
    assert compare(reference, larger).scale_error == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize(
    ("factor", "message"),
    [(-1.0, "cosine -1.00000"), (float("nan"), "not finite"), (1.5, "50 % too large or too small")],
)
def test_agreement_is_that_of_the_worst_output(bad: int, factor: float, message: str) -> None:
    output = doubling_spec().outputs[0]
    spec = doubling_spec().model_copy(update={"outputs": (output, output)})

    class Pair(nn.Module):
        def __init__(self, factors: tuple[float, float]) -> None:
            super().__init__()
            self.factors = factors

        def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
            return latents * self.factors[0], latents * self.factors[1]

    def stage(*factors: float) -> Stage:
        return Stage(spec, [EagerEngine(Pair((factors[0], factors[1])), 4)], 4)

    assert check_parity(spec, stage(1.0, 1.0), stage(1.0, 1.0), 2, Backend.AOTINDUCTOR).finite
    factors = (factor, 1.0) if bad == 0 else (1.0, factor)
    with pytest.raises(ParityError, match=message):
        check_parity(spec, stage(1.0, 1.0), stage(*factors), 2, Backend.AOTINDUCTOR)


def test_worst_pixel_of_all_outputs_counts() -> None:
    near, far = (compare(torch.zeros(1, 2), torch.full((1, 2), by)) for by in (1.0, 3.0))
    assert worst([near, far]).max_abs == worst([far, near]).max_abs == 3.0


@pytest.mark.parametrize(
    ("dtype", "cosine"), [("float32", 0.998), ("bfloat16", 0.998), ("float16", 0.998), ("float8", 0.98)]
)
def test_every_precision_has_to_keep_the_direction(dtype: str, cosine: float) -> None:
    spec = doubling_spec().model_copy(update={"compute_dtype": dtype})

    class Turned(nn.Module):
        """Each pair of numbers by an angle, which keeps the scale of none."""

        def __init__(self, cosine: float) -> None:
            super().__init__()
            self.cosine, self.sine = cosine, math.sqrt(1 - cosine**2)

        def forward(self, latents: Tensor) -> Tensor:
            first, second = latents.unflatten(1, (2, 2)).unbind(1)
            turned = (self.cosine * first - self.sine * second, self.cosine * second + self.sine * first)
            return torch.cat(turned, dim=1) / self.cosine

    def turned(cosine: float) -> Stage:
        return Stage(spec, [EagerEngine(Turned(cosine), 4)], 4)

    near = 1 - (1 - MIN_COSINE[spec.compute_dtype]) / 2
    assert check_parity(
        spec, scaled_stage(1.0), turned(near), 2, Backend.AOTINDUCTOR
    ).cosine == pytest.approx(near)
    with pytest.raises(ParityError, match=rf"cosine {cosine:.5f} is below .*{dtype} must reach"):
        check_parity(spec, scaled_stage(1.0), turned(cosine), 2, Backend.AOTINDUCTOR)


def test_pixels_may_differ_by_two() -> None:
    spec = doubling_spec().model_copy(
        update={"name": "decode", "outputs": (TensorSpec(name="pixels", dtype="uint8", shape=(4,)),)}
    )

    class Pixels(nn.Module):
        def __init__(self, offset: int) -> None:
            super().__init__()
            self.offset = offset

        def forward(self, latents: Tensor) -> Tensor:
            return torch.full_like(latents, 100 + self.offset, dtype=torch.uint8)

    def stage(offset: int) -> Stage:
        return Stage(spec, [EagerEngine(Pixels(offset), 4)], 4)

    assert check_parity(spec, stage(0), stage(2), 1, Backend.AOTINDUCTOR).max_abs == 2
    with pytest.raises(ParityError, match="a pixel differs by 3 of 255, 2 are allowed"):
        check_parity(spec, stage(0), stage(3), 1, Backend.AOTINDUCTOR)


def test_example_inputs_depend_on_the_seed_alone_and_stay_in_range(eager_bundle: Path) -> None:
    for spec in read_manifest(eager_bundle).stages:
        first, again, other = (example_inputs(spec, 3, seed) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        for tensor, expected in zip(first, spec.inputs, strict=True):
            if expected.maximum is not None:
                assert tensor.min() >= 0
                assert tensor.max() <= expected.maximum
            if expected.name == "mask":
                assert (tensor[:, 0] == 1).all()


def test_module_that_cannot_be_traced_is_a_compile_error() -> None:
    class Branching(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return latents if latents.sum() > 0 else -latents

    with pytest.raises(CompileError, match="stage denoise: export failed"):
        export_stage(Branching(), doubling_spec(), min_batch=1, max_batch=4)


def test_module_that_works_for_one_batch_size_only_is_a_compile_error() -> None:
    class Fixed(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return latents.reshape(2, 4) * 2

    with pytest.raises(CompileError, match="export failed"):
        export_stage(Fixed(), doubling_spec(), min_batch=1, max_batch=4)


def test_constants_are_found_under_any_of_their_names() -> None:
    weights = {"shared.weight": torch.randn(3, 2).half(), "proj.weight": torch.randn(2, 2).half()}
    shared = weights["shared.weight"].float()
    module = {
        "text_encoder.encoder.embed_tokens.weight": shared,
        "text_encoder.shared.weight": shared,
        "proj.weight": weights["proj.weight"].float().t().contiguous().t(),
        "table": torch.arange(4.0),
    }
    names = ["text_encoder.encoder.embed_tokens.weight", "proj.weight", "table"]
    bindings, own = bind_constants(names, module, {"text_encoder": weights})
    assert bindings[names[0]].tensor == "shared.weight"
    assert bindings[names[0]].dtype == "float32"
    assert bindings["proj.weight"].stride == (1, 2)
    assert bindings["table"].own
    assert own.keys() == {"table"}
    with pytest.raises(CompileError, match="constant ghost"):
        bind_constants(["ghost"], module, {"text_encoder": weights})


def test_constants_are_found_in_the_part_that_has_them() -> None:
    first, second = torch.randn(3, 2), torch.randn(3, 2)
    weights = {"text_encoder": {"text_model.weight": first}, "text_encoder_2": {"weight": second}}
    module = {"text_encoder.weight": first, "text_encoder_2.weight": second}
    bindings, own = bind_constants(module, module, weights)
    assert own == {}
    assert [(binding.part, binding.tensor) for binding in bindings.values()] == [
        (None, "text_model.weight"),
        ("text_encoder_2", "weight"),
    ]


def test_compiler_errors_are_told_by_their_telling_line() -> None:
    error = RuntimeError("C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nx.cpp:1: fatal error: omp.h\n")
    assert last_error_line(error) == "x.cpp:1: fatal error: omp.h"
    assert last_error_line(RuntimeError("")) == "no message"


def test_median_takes_a_few_calls_and_not_many() -> None:
    calls: list[None] = []
    assert median_ms(lambda: calls.append(None), budget_s=0.0) >= 0
    assert len(calls) == 1 + MIN_CALLS
    calls.clear()
    median_ms(lambda: calls.append(None), budget_s=60.0)
    assert len(calls) == 1 + MAX_CALLS

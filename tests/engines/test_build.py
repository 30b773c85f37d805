"""Building a bundle: what goes into it, what is refused, what it says of itself."""

from __future__ import annotations

import io
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
from safetensors.torch import save_file
from torch import nn

from engines.__main__ import main
from engines.bundle.bucket import Bucket
from engines.bundle.integrity import verify_files
from engines.bundle.manifest import read_manifest
from engines.bundle.stages import Backend, StageSpec
from engines.compile import packages, parity
from engines.compile.build import build_bundle, num_pieces
from engines.compile.needed import EAGER_ASKED_FOR, NO_COMPILER, buckets_of
from engines.compile.progress import BuildProgress
from engines.compile.student_files import changed_file
from engines.errors import CheckpointError, CompileError, ParityError
from engines.families.spec import get_family
from engines.families.student import read_student
from engines.families.weights import load_weights
from engines.noise import seeded_latents
from engines.runtime import stages as stages_module
from engines.runtime.pipeline import Pipeline, Sample
from tests.engines.conftest import build, build_settings
from tests.engines.doubling import BUCKET
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox

# The compiler takes a minute on a quiet machine.
pytestmark = pytest.mark.timeout(2400)


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

"""Must a bundle be built before it can be served? Answered without torch, so that a second start is quick."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engines.bundle.bucket import Bucket
from engines.bundle.integrity import verify_files
from engines.bundle.manifest import Manifest, read_manifest
from engines.bundle.platform import Device, compare_for_plan, compare_platforms, current_platform
from engines.bundle.stages import Backend
from engines.compile.student_files import changed_file
from engines.errors import BundleError
from engines.families.student import Student, read_student

NO_COMPILER = "there was no C++ compiler when it was built"
COMPUTE_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8"}
"""What the denoiser computes in, by precision."""
EAGER_ASKED_FOR = "it was built with --backends eager"


def has_compiler() -> bool:
    """Whether the C++ compiler that inductor calls is here."""
    return shutil.which("g++") is not None


def buckets_of(student: Student, wanted: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """What a bundle of a student draws, the default first: `wanted`, or if that is empty the student's own.

    Frames that a video's bucket leaves out are the student's.
    """
    if not wanted:
        return (student.bucket,)
    filled = (
        replace(bucket, frames=student.frames) if bucket.frames == 1 and student.kind == "video" else bucket
        for bucket in wanted
    )
    return tuple(dict.fromkeys(filled))


def reason_to_build(
    student: Path,
    bundle: Path,
    *,
    buckets: Sequence[Bucket] = (),
    batch_sizes: Sequence[int],
    backends: Sequence[Backend],
    num_threads: int,
    decode_dtype: str,
    device: Device = "cpu",
    precision: str | None = None,
    static_batches: Sequence[int] = (),
) -> str | None:
    """Why `bundle` must be built from `student`, in words for the operator; None if it is as it should be."""
    if not (bundle / "manifest.json").exists():
        return "there is no bundle yet"
    try:
        manifest = read_manifest(bundle)
        verify_files(bundle, manifest)
    except BundleError as error:
        return f"the bundle is damaged ({error})"
    changed = changed_file(student, manifest)
    if changed is not None:
        return f"the student has changed ({changed})"
    if manifest.buckets != list(buckets_of(read_student(student), buckets)):
        return "it was built for other sizes"
    if manifest.batch_sizes != list(batch_sizes) or manifest.num_threads != num_threads:
        return "it was built for other batch sizes or threads"
    if manifest.device != device:
        return f"it was built for {manifest.device}"
    wanted: list[Backend] = [backend for backend in backends if backend != Backend.EAGER]
    return _reason_to_compile(manifest, wanted, decode_dtype, precision, static_batches) if wanted else None


def _reason_to_compile(
    manifest: Manifest,
    backends: Sequence[Backend],
    decode_dtype: str,
    precision: str | None,
    static_batches: Sequence[int],
) -> str | None:
    """Why the code of a bundle that is otherwise right must be compiled, or compiled again."""
    here = current_platform(manifest.device)
    for backend in backends:
        compare = compare_for_plan if backend == Backend.TENSORRT else compare_platforms
        mismatches = compare(manifest.platform, here)
        if mismatches:
            return f"its compiled code does not fit this machine ({mismatches[0]})"
    if manifest.engines:
        if manifest.compiled_backends != list(backends):
            return f"its engines are {', '.join(manifest.compiled_backends)}"
        wrong = _wrong_dtype(manifest, precision)
        if wrong is not None:
            return wrong
        alone = {engine.min_batch for engine in manifest.engines if engine.min_batch == engine.max_batch}
        if not set(static_batches) <= alone:
            return "it lacks packages for single batch sizes"
        dtypes = {spec.compute_dtype for spec in manifest.stages if spec.name == "decode"}
        if decode_dtype not in {"auto", *dtypes}:
            return f"its decode computes in {', '.join(sorted(dtypes))}"
    if manifest.eager_only == EAGER_ASKED_FOR:
        return "it has no compiled code"
    if manifest.eager_only == NO_COMPILER and has_compiler():
        return "there is a C++ compiler now"
    return None


def _wrong_dtype(manifest: Manifest, precision: str | None) -> str | None:
    """What the denoiser computes in, if another precision is wanted; nobody's wish is bf16 on a GPU."""
    if precision is None:
        precision = "bf16" if manifest.device == "cuda" else "fp32"
    wanted = COMPUTE_DTYPES[precision]
    found = {spec.compute_dtype for spec in manifest.stages if spec.name == "denoise"}
    if found != {wanted}:
        return f"its denoiser computes in {', '.join(sorted(found))}"
    return None

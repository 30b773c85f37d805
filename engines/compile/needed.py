"""Must a bundle be built before it can be served? Answered without torch, so that a second start is quick."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from engines.bundle import current_platform, read_manifest, verify_files
from engines.compile.student_files import changed_file
from engines.errors import BundleError
from engines.platform import compare_platforms

NO_COMPILER = "there was no C++ compiler when it was built"
EAGER_ASKED_FOR = "it was built with --backends eager"


def has_compiler() -> bool:
    """Whether the C++ compiler that inductor calls is here."""
    return shutil.which("g++") is not None


def reason_to_build(
    student: Path,
    bundle: Path,
    *,
    batch_sizes: Sequence[int],
    backends: Sequence[str],
    num_threads: int,
    decode_dtype: str,
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
    if manifest.batch_sizes != list(batch_sizes) or manifest.num_threads != num_threads:
        return "it was built for other batch sizes or threads"
    if "aotinductor" not in backends:
        return None
    mismatches = compare_platforms(manifest.platform, current_platform())
    if mismatches:
        return f"its compiled code does not fit this machine ({mismatches[0]})"
    dtypes = {spec.compute_dtype for spec in manifest.stages if spec.name == "decode"}
    if manifest.engines and decode_dtype not in {"auto", *dtypes}:
        return f"its decode computes in {', '.join(sorted(dtypes))}"
    if manifest.eager_only == EAGER_ASKED_FOR:
        return "it has no compiled code"
    if manifest.eager_only == NO_COMPILER and has_compiler():
        return "there is a C++ compiler now"
    return None

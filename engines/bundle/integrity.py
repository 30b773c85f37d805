"""Whether a bundle is what was built, and whether its compiled code fits this machine. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import MANIFEST, SIGNATURE, FileHash, Manifest, read_manifest
from engines.bundle.platform import Mismatch, Platform, compare_for_plan, compare_platforms, current_platform
from engines.bundle.stages import Backend
from engines.errors import BundleError

NAMES_BUCKETS = 5
"""Since this version of the manifest, sizes are part of a bundle's version."""


def hash_file(path: Path) -> FileHash:
    """Hash one file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileHash(sha256=digest, size_bytes=path.stat().st_size)


def hash_files(directory: Path) -> dict[str, FileHash]:
    """Hash every file under `directory`, the manifest, its signature and dot-files aside.

    Returns:
        Hashes by path relative to `directory`, with forward slashes, sorted.
    """
    return {name: hash_file(Path(directory) / name) for name in _names(Path(directory))}


def _names(directory: Path) -> list[str]:
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    names = (path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    return sorted(name for name in names if name not in (MANIFEST, SIGNATURE))


def content_version(files: Mapping[str, FileHash], buckets: Sequence[Bucket]) -> str:
    """Twelve hex digits that change exactly when the checkpoint or the sizes that it is served in do.

    Jobs go to workers by this number: what one of them accepts, all must draw. Steps and schedule are in the
    checkpoint's `student.json`. Compiled code is left out: it differs from machine to machine, the pictures
    do not.
    """
    lines = [
        f"{entry.sha256} {name}\n" for name, entry in sorted(files.items()) if name.startswith("checkpoint/")
    ]
    lines += [f"bucket {bucket.label}\n" for bucket in buckets]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def verify_files(directory: Path, manifest: Manifest | None = None) -> Manifest:
    """Check every file of a bundle against the manifest, before anything in it is loaded.

    Returns:
        The manifest.

    Raises:
        BundleError: a file is missing, changed or was added; `field` is `files.<path>`.
    """
    directory = Path(directory)
    manifest = manifest or read_manifest(directory)
    present = set(_names(directory))
    for name, expected in manifest.files.items():
        if name not in present:
            raise BundleError(f"files.{name}", "is missing")
        size_bytes = (directory / name).stat().st_size
        if size_bytes != expected.size_bytes:
            raise BundleError(f"files.{name}", f"has {size_bytes} bytes, {expected.size_bytes} expected")
        if hash_file(directory / name).sha256 != expected.sha256:
            raise BundleError(f"files.{name}", "its content has changed (sha256 differs)")
    added = sorted(present - set(manifest.files))
    if added:
        raise BundleError(f"files.{added[0]}", "is not part of this bundle")
    named = manifest.buckets if manifest.schema_version >= NAMES_BUCKETS else ()
    if content_version(manifest.files, named) != manifest.version:
        raise BundleError("version", "does not belong to this checkpoint and these sizes")
    return manifest


def check_platform(
    manifest: Manifest, platform: Platform | None = None, backend: Backend | None = None
) -> list[Mismatch]:
    """What keeps this bundle's compiled code from running here; empty when it fits, or when there is none.

    Args:
        manifest: of the bundle.
        platform: by default this machine.
        backend: whose code; by default that of `manifest.backend`.
    """
    if not manifest.engines:
        return []
    compare = compare_for_plan if (backend or manifest.backend) == Backend.TENSORRT else compare_platforms
    return compare(manifest.platform, platform or current_platform(manifest.device))

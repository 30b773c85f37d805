"""Is a bundle what it was when it was built, does it fit this machine, does it draw what eager draws?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engines.bundle.integrity import check_platform, verify_files
from engines.bundle.manifest import Manifest, ParityRow
from engines.bundle.platform import Mismatch
from engines.bundle.stages import Backend
from engines.compile.parity import check_parity
from engines.runtime.backends import BACKENDS
from engines.runtime.stages import EagerStages


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verification found; damage raises instead."""

    manifest: Manifest
    mismatches: list[Mismatch]
    """Of all its backends."""
    fitting: Sequence[Backend]
    """Compiled backends that run here."""
    parity: list[ParityRow]
    """Empty where the compiled code does not fit, or there is none."""


def verify_bundle(directory: Path) -> Verdict:
    """Check hashes, then the platform, then parity at every batch size.

    Raises:
        BundleError: a file or field is damaged or foreign; names it.
        ParityError: compiled code does not agree with eager.
    """
    manifest = verify_files(directory)
    mismatches = {
        backend: check_platform(manifest, backend=backend) for backend in manifest.compiled_backends
    }
    fitting = [backend for backend, found in mismatches.items() if not found]
    parity: list[ParityRow] = []
    if fitting:
        torch.set_num_threads(manifest.num_threads)
        device = torch.device(manifest.device)
        uncompiled = EagerStages(directory, manifest, device)
        loaders = {backend: BACKENDS[backend](directory, manifest, device) for backend in fitting}
        for spec in manifest.stages:
            eager = uncompiled.load(spec)
            for backend, loader in loaders.items():
                compiled = loader.load(spec)
                parity += [
                    check_parity(spec, eager, compiled, batch, backend) for batch in manifest.batch_sizes
                ]
    return Verdict(
        manifest=manifest,
        mismatches=[one for found in mismatches.values() for one in found],
        fitting=fitting,
        parity=parity,
    )

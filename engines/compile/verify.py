"""Is a bundle what it was when it was built, does it fit this machine, does it draw what eager draws?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engines.bundle import Manifest, ParityRow, check_platform, verify_files
from engines.compile.parity import check_parity
from engines.platform import Mismatch
from engines.runtime.aotinductor import Constants
from engines.runtime.stages import load_compiled_stage, load_eager_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verification found; damage raises instead."""

    manifest: Manifest
    mismatches: list[Mismatch]
    parity: list[ParityRow]
    """Empty where the compiled code does not fit, or there is none."""


def verify_bundle(directory: Path) -> Verdict:
    """Check hashes, then the platform, then parity at every batch size.

    Raises:
        BundleError: a file or field is damaged or foreign; names it.
        ParityError: compiled code does not agree with eager.
    """
    manifest = verify_files(directory)
    mismatches = check_platform(manifest)
    parity: list[ParityRow] = []
    if manifest.engines and not mismatches:
        torch.set_num_threads(manifest.num_threads)
        constants = Constants(directory)
        for spec in manifest.stages:
            eager = load_eager_stage(directory, manifest, spec)
            compiled = load_compiled_stage(directory, manifest, spec, constants)
            parity += [
                check_parity(spec, eager, compiled, batch, "aotinductor") for batch in manifest.batch_sizes
            ]
    return Verdict(manifest=manifest, mismatches=mismatches, parity=parity)

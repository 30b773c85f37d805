"""Backends by name: what loads the stages of a bundle to run on each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from engines.bundle.integrity import check_platform
from engines.bundle.manifest import Manifest
from engines.bundle.stages import Backend, StageSpec
from engines.errors import BackendUnavailable
from engines.runtime.aotinductor import Constants
from engines.runtime.stages import EagerStages, Stage, load_compiled_stage
from engines.runtime.tensorrt import TensorRtStages


class BackendStages(Protocol):
    """Loads stages of one bundle on one backend; they share what can be shared."""

    def load(self, spec: StageSpec) -> Stage:
        """One of them.

        Raises:
            BackendUnavailable: the backend does not take its code.
            BundleError: a file is missing, damaged, or cannot be loaded here.
            ValueError: its engines do not cover every batch size.
        """


class AotInductorStages:
    """Stages from AOTInductor's packages, sharing one set of weights."""

    def __init__(self, bundle: Path, manifest: Manifest, device: torch.device) -> None:
        self._bundle, self._manifest = bundle, manifest
        self._constants = Constants(bundle, device)

    def load(self, spec: StageSpec) -> Stage:
        """As `BackendStages`."""
        return load_compiled_stage(self._bundle, self._manifest, spec, self._constants)


BACKENDS: Mapping[Backend, Callable[[Path, Manifest, torch.device], BackendStages]] = {
    Backend.EAGER: partial(EagerStages, reference=False),
    Backend.AOTINDUCTOR: AotInductorStages,
    Backend.TENSORRT: TensorRtStages,
}
"""A bundle's directory, its manifest and a device to what loads its stages. Making it raises
`BackendUnavailable` where the backend is not installed."""


def check_backend(manifest: Manifest, backend: Backend) -> None:
    """Refuse compiled code that is not there or does not fit this machine.

    Raises:
        BackendUnavailable: so it is.
    """
    if backend == Backend.EAGER:
        return
    if not manifest.engines:
        raise BackendUnavailable(f"this bundle has no compiled code ({manifest.eager_only})")
    if backend not in manifest.compiled_backends:
        raise BackendUnavailable(
            f"this bundle has no {backend} engines, only {', '.join(manifest.compiled_backends)}; build it "
            f"with --backends {backend}"
        )
    mismatches = check_platform(manifest, backend=backend)
    if mismatches:
        details = "; ".join(str(mismatch) for mismatch in mismatches)
        raise BackendUnavailable(f"compiled code does not fit this machine ({details})")

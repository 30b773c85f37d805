"""The compiled stages of a bundle, on whichever backend is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from engines.bundle import Backend, Manifest, StageSpec
from engines.runtime.aotinductor import Constants
from engines.runtime.stages import Stage, load_compiled_stage
from engines.runtime.tensorrt import TensorRtStages


class CompiledStages(Protocol):
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
        """As `CompiledStages`."""
        return load_compiled_stage(self._bundle, self._manifest, spec, self._constants)


def compiled_stages(
    bundle: Path, manifest: Manifest, backend: Backend, device: torch.device
) -> CompiledStages:
    """What loads stages on `backend`, which is not `eager`.

    Raises:
        BackendUnavailable: the backend is not installed here.
    """
    if backend == "tensorrt":
        return TensorRtStages(bundle, manifest, device)
    assert backend == "aotinductor"
    return AotInductorStages(bundle, manifest, device)

"""What a pipeline is made of: device, backend and stages of a bundle, as this machine allows."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import Manifest
from engines.bundle.stages import Backend, StageName
from engines.errors import BackendUnavailable, BundleError
from engines.families.checkpoint import read_json
from engines.runtime.backends import BACKENDS, check_backend
from engines.runtime.memory import MemoryPlan, plan_memory
from engines.runtime.stages import CPU, Stage
from engines.schedule import NoiseSchedule

Stages = dict[tuple[StageName, Bucket | None], Stage]


def load_schedule(path: Path) -> NoiseSchedule:
    try:
        return NoiseSchedule.from_config(read_json(path))
    except ValueError as error:
        raise BundleError("checkpoint.scheduler", str(error)) from None


def pick_device(manifest: Manifest, index: int) -> tuple[torch.device, list[str]]:
    """Where a bundle runs here, and a line of warning if that is not what it was built for."""
    if manifest.device == "cpu":
        return CPU, []
    if torch.cuda.is_available():
        return torch.device("cuda", index), []
    return CPU, ["device: the bundle was built for a GPU and torch sees none here; the CPU serves"]


def _planned(bundle: Path, manifest: Manifest, backend: Backend, device: torch.device) -> MemoryPlan | None:
    """What `backend` needs of a GPU's memory.

    Raises:
        MemoryPlanError: that is more than is free.
    """
    if device.type != "cuda":
        return None
    plan = plan_memory(bundle, manifest, backend)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    plan.check(free_bytes)
    return plan


def load_first(
    bundle: Path, manifest: Manifest, wanted: Backend | Literal["auto"], device: torch.device
) -> tuple[Backend, Stages, MemoryPlan | None, list[str]]:
    """Load the stages on the first backend that serves here.

    Returns:
        The backend, its stages, what it needs of a GPU's memory, and why others before it were refused.
    Raises:
        BackendUnavailable: it was asked for by name and cannot run here.
        MemoryPlanError: there is too little memory.
    """
    refused: list[str] = []
    candidates = _candidates(manifest, wanted)
    for backend in candidates:
        try:
            check_backend(manifest, backend)
            memory = _planned(bundle, manifest, backend, device)
            stages = _load(bundle, manifest, backend, device)
        except BackendUnavailable as error:
            if backend == candidates[-1]:
                raise
            refused.append(str(error))
            continue
        if refused:
            refused[-1] += f"; {backend} serves instead{', slower' if backend == Backend.EAGER else ''}"
        return backend, stages, memory, refused
    raise AssertionError("there is always a candidate")


def _candidates(manifest: Manifest, wanted: Backend | Literal["auto"]) -> list[Backend]:
    """Backends to try, in order."""
    if wanted != "auto":
        return [Backend(wanted)]
    # a bundle without compiled code says why through the one it does not have
    return [*(manifest.compiled_backends or [Backend.AOTINDUCTOR]), Backend.EAGER]


def _load(bundle: Path, manifest: Manifest, backend: Backend, device: torch.device) -> Stages:
    """Load the stages.

    Raises:
        BackendUnavailable: compiled code does not load on this machine.
    """
    try:
        stages = BACKENDS[backend](bundle, manifest, device)
        return {(spec.name, spec.bucket): stages.load(spec) for spec in manifest.stages}
    except (BundleError, ValueError, RuntimeError) as error:
        if backend == Backend.EAGER:
            raise
        raise BackendUnavailable(f"compiled code does not load ({error})") from error

"""The state of a run on disk: complete or not there at all, and enough to continue with the same numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engines.errors import CheckpointError

SCHEMA_VERSION = 1
_NAME = re.compile(r"\d{8}")


@dataclass(slots=True)
class TrainingState:
    """All that training changes. There is no generator among it: each iteration seeds its own.

    Attributes:
        networks: student and fake score, by name.
        optimizers: theirs, by the same names.
        average: moving average of the student's parameters (fp32).
        iteration: finished iterations.
        train_seconds: spent on them, over all resumes.
    """

    networks: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    average: dict[str, Tensor]
    iteration: int = 0
    train_seconds: float = field(default=0.0)


def save_checkpoint(directory: Path, state: TrainingState, settings: Mapping[str, Any], keep: int) -> Path:
    """Write `directory/<iteration>`, unless it is there already, and delete all but the newest `keep`.

    The files are complete on disk before the name appears, so a kill at any moment leaves the previous
    checkpoint or this one. Tensors are safetensors, the rest is JSON.
    """
    path = directory / f"{state.iteration:08d}"
    if path.exists():
        return path
    partial = directory / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_tensors(state), partial / "state.safetensors")
    header = {
        "schema_version": SCHEMA_VERSION,
        "iteration": state.iteration,
        "train_seconds": round(state.train_seconds, 3),
        "settings": settings,
    }
    (partial / "state.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        _sync(file)
    partial.rename(path)
    _sync(directory)
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old)
    return path


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    return next(iter(reversed(_checkpoints(directory))), None)


def load_checkpoint(path: Path, state: TrainingState, settings: Mapping[str, Any]) -> None:
    """Fill `state` from a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or was written with other settings; names them.
    """
    try:
        header = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if header.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema_version {header.get('schema_version')!r}, expected {SCHEMA_VERSION}"
        )
    changed = [
        f"{key} was {header['settings'].get(key)!r}, now {settings.get(key)!r}"
        for key in sorted(settings.keys() | header["settings"].keys())
        if header["settings"].get(key) != settings.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{path}: written with other settings ({'; '.join(changed)}); restore them, choose another out, "
            "or start over with --restart"
        )
    for name, network in state.networks.items():
        network.load_state_dict(_group(tensors, f"network.{name}."))
    for key, average in state.average.items():
        average.copy_(tensors[f"average.{key}"])
    for name, optimizer in state.optimizers.items():
        stored = _group(tensors, f"optimizer.{name}.")
        for key, parameter in state.networks[name].named_parameters():
            moments = _group(stored, f"{key}:")
            if moments:
                optimizer.state[parameter] = {
                    moment: value.to(parameter.device) for moment, value in moments.items()
                }
    state.iteration = header["iteration"]
    state.train_seconds = header["train_seconds"]


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    tensors = {f"average.{key}": value for key, value in state.average.items()}
    for name, network in state.networks.items():
        tensors |= {f"network.{name}.{key}": value for key, value in network.state_dict().items()}
        for key, parameter in network.named_parameters():
            for moment, value in state.optimizers[name].state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}:{moment}"] = value
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def _group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _checkpoints(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

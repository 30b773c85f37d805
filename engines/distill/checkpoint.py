"""The state of a run on disk: complete or not there at all, and enough to continue with the same numbers."""

from __future__ import annotations

import json
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

from engines.distill.config import default_settings
from engines.distill.disk import room_for
from engines.distill.distributed import World, collected, sharded_like
from engines.errors import CheckpointError
from engines.files import sync

SCHEMA_VERSION = 1
_NAME = re.compile(r"\d{8}")


@dataclass(slots=True)
class TrainingState:
    """All that training changes. There is no generator among it: each iteration seeds its own.

    Attributes:
        parameters: what student and fake score train, by name, for each.
        optimizers: theirs, by the same names.
        average: moving average of the student's parameters (fp32).
        iteration: finished iterations.
        train_seconds: spent on them, over all resumes.
    """

    parameters: Mapping[str, Mapping[str, nn.Parameter]]
    optimizers: Mapping[str, torch.optim.Optimizer]
    average: dict[str, Tensor]
    iteration: int = 0
    train_seconds: float = field(default=0.0)


def save_checkpoint(
    directory: Path,
    state: TrainingState,
    settings: Mapping[str, Any],
    keep: int,
    world: World | None = None,
) -> Path:
    """Write `directory/<iteration>`, unless it is there already, and delete all but the newest `keep`.

    The files are complete on disk before the name appears, so a kill at any moment leaves the previous
    checkpoint or this one. Tensors are safetensors, the rest is JSON.

    Raises:
        TrainingError: there is no room; the previous checkpoint stays.
    """
    path, world = directory / f"{state.iteration:08d}", world or World()
    if world.first(path.exists()):
        return path
    tensors = {key: value.cpu().contiguous() for key, value in collected(_tensors(state), world).items()}
    world.main_only(lambda: _write(path, tensors, state, settings, keep))
    return path


def _write(
    path: Path, tensors: dict[str, Tensor], state: TrainingState, settings: Mapping[str, Any], keep: int
) -> None:
    directory, partial = path.parent, path.parent / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    newest = latest_checkpoint(directory)
    kept = f"{newest} stays the newest checkpoint" if newest else "there is no checkpoint yet"
    with room_for(path, sum(tensor.nbytes for tensor in tensors.values()), kept):
        try:
            _write_files(partial, tensors, state, settings)
            partial.rename(path)
            sync(directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk would stay full
            raise
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old)


def _write_files(
    partial: Path, tensors: dict[str, Tensor], state: TrainingState, settings: Mapping[str, Any]
) -> None:
    partial.mkdir(parents=True)
    save_file(tensors, partial / "state.safetensors")
    header = {
        "schema_version": SCHEMA_VERSION,
        "iteration": state.iteration,
        "train_seconds": round(state.train_seconds, 3),
        "settings": settings,
    }
    (partial / "state.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        sync(file)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    return next(iter(reversed(_checkpoints(directory))), None)


def checkpoint_iterations(directory: Path) -> list[int]:
    """The iterations that there are complete checkpoints of, the oldest first."""
    return [int(path.name) for path in _checkpoints(directory)]


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
    stored = _completed(header["settings"], default_settings(), settings)
    changed = [
        f"{key} was {stored.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted(settings.keys() | stored.keys())
        if stored.get(key) != settings.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{path}: written with other settings ({'; '.join(changed)}); restore them, choose another out, "
            "or start over with --restart"
        )
    try:
        _restore(state, tensors)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit the networks: {error}") from None
    state.iteration = header["iteration"]
    state.train_seconds = header["train_seconds"]


def _completed(
    stored: Mapping[str, Any], defaults: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Stored settings with the defaults of those that did not exist when they were stored."""
    completed = {key: defaults.get(key) for key in settings} | dict(stored)
    for key in ("objective", "consistency"):
        completed[key] = defaults[key] | completed[key]
    return completed


@torch.no_grad()
def _restore(state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    for name, parameters in state.parameters.items():
        for key, parameter in parameters.items():
            parameter.copy_(sharded_like(tensors[f"network.{name}.{key}"], parameter))
    for key, average in state.average.items():
        average.copy_(sharded_like(tensors[f"average.{key}"], average))
    for name, optimizer in state.optimizers.items():
        stored = _group(tensors, f"optimizer.{name}.")
        for key, parameter in state.parameters[name].items():
            moments = _group(stored, f"{key}:")
            if moments:
                optimizer.state[parameter] = {
                    moment: sharded_like(value, parameter) if value.ndim else value.to(parameter.device)
                    for moment, value in moments.items()
                }


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    tensors = {f"average.{key}": value for key, value in state.average.items()}
    for name, parameters in state.parameters.items():
        for key, parameter in parameters.items():
            tensors[f"network.{name}.{key}"] = parameter
            for moment, value in state.optimizers[name].state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}:{moment}"] = value
    return tensors


def _group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _checkpoints(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))

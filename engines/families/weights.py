"""Weights of one part of a checkpoint: from safetensors into memory, and into a module."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from engines.errors import CheckpointError
from engines.families.checkpoint import check_safetensors, current_name, weight_files

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def load_weights(part: Path) -> dict[str, Tensor]:
    """Read all tensors of one part by their `current_name`, in the dtype they have on disk.

    Raises:
        CheckpointError: as `weight_files` and `check_safetensors`, or a tensor cannot be read.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(part):
        check_safetensors(file)
        try:
            weights |= {current_name(name): tensor for name, tensor in load_file(file).items()}
        except SafetensorError as error:
            raise CheckpointError(f"{part.name}/{file.name}: {error}") from None
    return weights


def check_finite(part: Path) -> None:
    """Read all tensors of one part, one after another, and refuse those that hold NaN or infinity.

    Raises:
        CheckpointError: as `weight_files` and `check_safetensors`; or names the tensor.
    """
    for file in weight_files(part):
        check_safetensors(file)
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                tensor: Tensor = stream.get_tensor(name)
                if not _is_finite(tensor):
                    raise CheckpointError(
                        f"{part.name}/{file.name}: tensor {name} holds numbers that are not finite (NaN or "
                        "infinity); nothing can be drawn with it"
                    )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no comparison of its own
        tensor = tensor.float()
    # one pass and no copy; NaN is in both
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())


def fill(module: ModuleT, weights: dict[str, Tensor], part: Path, dtype: torch.dtype) -> ModuleT:
    """Copy `weights` into `module` and make it ready to run: `dtype`, eval mode, no gradients.

    Raises:
        CheckpointError: a tensor of the module has no weight, has another shape, or a weight has no tensor.
    """
    # buffers too: CogVideoX makes its table of positions in float64, 270 MB for the 2B model
    floats = (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
    if any(tensor.dtype != dtype for tensor in floats):
        nn.Module.to(module, dtype)  # not the model's own `to`, which logs advice for users of pipelines
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{part.name}: weights do not fit config.json: {detail}") from None
    # a tied tensor is stored once, under one of its names
    state = module.state_dict()
    loaded = {state[name].data_ptr() for name in weights if name in state}
    missing = [name for name in missing if state[name].data_ptr() not in loaded]
    if missing:
        raise CheckpointError(f"{part.name}: no weight for {missing[0]} ({len(missing)} missing in all)")
    if unexpected:
        raise CheckpointError(
            f"{part.name}: unknown weight {unexpected[0]} ({len(unexpected)} unknown in all)"
        )
    return module.eval().requires_grad_(False)

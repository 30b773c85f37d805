"""How much memory a stage's call takes beyond its weights, found without computing anything."""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engines.bundle.manifest import Manifest
from engines.bundle.stages import StageSpec
from engines.families.spec import get_family
from engines.runtime.stages import MODULE_DTYPES, torch_dtype

META = torch.device("meta")


class AnswerWithZero(TorchDispatchMode):
    """Lets code ask tensors without memory for a value, as T5 does of its mask: every one is 0, or False."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, unless it asks for a value."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            return torch.zeros((), dtype=args[0].dtype, device="cpu").item()
        return func(*args, **(kwargs or {}))


class FusedAttention(TorchFunctionMode):
    """Attention as GPUs compute it, without a table of every token's weight for every other one, which for a
    clip of CogVideoX-2B would take 19 GB.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the output of attention alone."""
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, value = given["query"], given["value"]
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are still alive.

    Attributes:
        peak: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        result = func(*args, **(kwargs or {}))
        given = {_storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (key := _storage_key(leaf)) not in given | self._known:
                self._add(leaf, key)
        return result

    def _add(self, tensor: Tensor, key: int) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _storage_key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def load_without_memory(checkpoint: Path, family: str, spec: StageSpec, dtype: torch.dtype) -> nn.Module:
    """A stage's module that has shapes and no weights."""
    with META, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that copying weights there does nothing, once for each
        module = get_family(family).load_stage(checkpoint, spec, dtype)
    return nn.Module.to(module, META)


def peak_of(module: nn.Module, spec: StageSpec, batch: int) -> int:
    """Bytes that a call of a module on the meta device would have at once, its inputs aside."""
    inputs = [
        torch.empty((batch, *tensor.shape), dtype=torch_dtype(tensor), device=META) for tensor in spec.inputs
    ]
    with torch.no_grad(), FusedAttention(), AnswerWithZero(), LiveBytes() as live:  # type: ignore[no-untyped-call]
        module(*inputs)
    return int(live.peak)


def estimate_scratch(checkpoint: Path, manifest: Manifest, spec: StageSpec, batch: int) -> int:
    """What an eager call allocates at its peak; kernels' own workspaces are not in it, and compiled code,
    which fuses, needs less.
    """
    module = load_without_memory(checkpoint, manifest.family, spec, MODULE_DTYPES[spec.compute_dtype])
    return peak_of(module, spec, batch)

"""Convolutions over time on a CPU.

PyTorch hands a convolution to oneDNN by rules of its own, and one over three dimensions of a single sample on
a single thread to a loop of matrix products instead (`slow_conv3d_forward`), which takes longer than oneDNN
does for two. Workers on CPUs have one thread, and most clips come one at a time.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


def use_onednn(module: nn.Module) -> None:
    """Have oneDNN compute every plain 3-D convolution of a module on a CPU in float32, whatever the batch. In
    place. Not every CPU has what its bfloat16 needs.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for child in module.modules():
        if isinstance(child, nn.Conv3d) and _is_plain(child):
            child._conv_forward = _OneDnn(child)  # type: ignore[method-assign, assignment]


def _is_plain(conv: nn.Conv3d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


class _OneDnn:
    """Stands in for `nn.Conv3d._conv_forward`."""

    def __init__(self, conv: nn.Conv3d) -> None:
        self._padding = cast("tuple[int, ...]", conv.padding)
        self._plain = conv._conv_forward
        self._stride, self._dilation, self._groups = conv.stride, conv.dilation, conv.groups

    def __call__(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, C, F, H, W) to (B, D, f, h, w)."""
        if features.dtype != torch.float32:
            plain: Tensor = self._plain(features, weight, bias)
            return plain
        shape = (self._padding, self._stride, self._dilation, self._groups)
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(features, weight, bias, *shape, "none", [], "")
        return made

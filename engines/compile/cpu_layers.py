"""Layers in a form of which Inductor makes fast loops on a CPU: weights and, but for rounding, results stay.

Inductor computes a group norm over groups of few channels, of tensors in channels-last order, number by
number; the hyperbolic tangent of GELU's approximation costs several times an exponential; and matrix products
of few rows take longer when the weights lie row by row, as PyTorch keeps them.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn
from transformers.activations import NewGELUActivation


class ChannelsLastGroupNorm(nn.Module):
    """`nn.GroupNorm` of images (Wu & He, arXiv:1803.08494): means of channels, and of groups from these.

    Every pass over the pixels is then vectorised over channels. A product with a matrix brings the means of
    groups back to channels, because the compiler keeps its result; it would look up what is merely expanded
    for every pixel anew.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.num_groups = norm.num_groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...); computed in float32, returned in the dtype of `x`."""
        over = tuple(range(2, x.ndim))
        each = (..., *[None] * len(over))
        pixels = x.float()
        centred = pixels - self._of_groups(pixels.mean(over))[each]
        variance = self._of_groups(centred.square().mean(over))
        scale = torch.rsqrt(variance + self.eps) * self.weight.float()
        return (centred * scale[each] + self.bias.float()[each]).to(x.dtype)

    def _of_groups(self, channels: Tensor) -> Tensor:
        """(B, C) numbers of channels, each replaced by the mean of its group."""
        of_group = channels.shape[1] // self.num_groups
        groups = channels.view(-1, self.num_groups, of_group).mean(2)
        members = torch.arange(channels.shape[1]) // of_group == torch.arange(self.num_groups)[:, None]
        return groups @ members.float()


class TanhGelu(nn.Module):
    """GELU approximated by tanh (Hendrycks & Gimpel, arXiv:1606.08415): (1 + tanh u) / 2 = sigmoid(2 u)."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


class _ProjectedGelu(nn.Module):
    """Diffusers' layer of a projection and a GELU, its weights under their names."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj, self.gelu = proj, TanhGelu()

    def forward(self, hidden_states: Tensor) -> Tensor:
        activated: Tensor = self.gelu(self.proj(hidden_states))
        return activated


def rewrite_for_cpu(module: nn.Module, *, channels_last: bool) -> None:
    """Put such layers in the place of others, in place; every parameter keeps its name and shape.

    Args:
        module: a stage, in the dtype that it is compiled in.
        channels_last: whether its images lie in that order. In the other one group norms are fast already.
    """
    _replace_layers(module, channels_last=channels_last)
    _store_by_columns(module)


def _replace_layers(module: nn.Module, *, channels_last: bool) -> None:
    for name, child in module.named_children():
        if channels_last and isinstance(child, nn.GroupNorm) and child.affine:
            setattr(module, name, ChannelsLastGroupNorm(child))
        elif isinstance(child, NewGELUActivation) or (
            isinstance(child, nn.GELU) and child.approximate == "tanh"
        ):
            setattr(module, name, TanhGelu())
        elif isinstance(child, GELU) and child.approximate == "tanh":
            setattr(module, name, _ProjectedGelu(child.proj))
        else:
            _replace_layers(child, channels_last=channels_last)


def _store_by_columns(module: nn.Module) -> None:
    """Lay the weights of linear layers out as (in, out), which is what the product walks through."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32:
            layer.weight.data = layer.weight.data.t().contiguous().t()  # `data`: tied weights stay tied

"""Float8 for a denoiser: which of its layers multiply in it, and the module that does.

Every linear layer of the network's blocks is a `RowwiseLinear`: weights and activations are quantised row by
row (`runtime/rowwise.py`), the sum is float32, the result bfloat16. What everything else hangs on stays in
bfloat16: embedders of time, text, size and patches, the layers that turn the last block's output into the
prediction, and norms with the layers that modulate them. Convolutions stay, too: torch has none in float8.

The packages hold no weights in this form either: they are quantised from the checkpoint when they are bound.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engines.runtime.rowwise import dequantise_rows, multiply_rowwise, quantise_rows

MULTIPLE = 16
"""Both sides of a float8 weight are multiples of this, or the layer stays as it is."""

BLOCKS = "transformer_blocks."
"""What leads to the layers of a denoiser's blocks, in all three families. SDXL's ways into and out of a stack
of blocks, `proj_in` and `proj_out`, lie outside."""

KEPT = ("norm", "embed")
"""Words in names inside a block of what stays in bfloat16: CogVideoX's norms have linear layers."""


class RowwiseLinear(nn.Module):
    """A linear layer in float8.

    Args:
        linear: taken over; the weight's sides must be multiples of 16.
        exact: multiply the dequantised matrices in float32 instead. The error of quantising is the same, and
            that of the hardware's sum is not there: what tests compare with.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: nn.Linear, *, exact: bool = False) -> None:
        super().__init__()
        weight, scale = quantise_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.bias: nn.Parameter | None = linear.bias
        self.exact = exact

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., K) to (..., N), in bfloat16 on both sides."""
        rows = x.reshape(-1, x.shape[-1])
        if self.exact:
            quantised, row_scale = quantise_rows(rows)
            product = (
                dequantise_rows(quantised, row_scale) @ dequantise_rows(self.weight, self.weight_scale).t()
            )
            product = (product if self.bias is None else product + self.bias.float()).to(x.dtype)
        else:
            product = multiply_rowwise(rows, self.weight, self.weight_scale, self.bias)
        return product.reshape(*x.shape[:-1], product.shape[-1])


def is_quantised(name: str, module: nn.Module) -> bool:
    """Whether a layer of a denoiser, by its name in the network, multiplies in float8."""
    _, found, inside = name.partition(BLOCKS)
    if not found or not isinstance(module, nn.Linear) or any(word in inside for word in KEPT):
        return False
    return all(side % MULTIPLE == 0 for side in module.weight.shape)


def quantise_denoiser(stage: nn.Module, *, exact: bool = False) -> list[str]:
    """Replace the layers that multiply in float8, in place.

    Args:
        stage: a family's denoise stage in bfloat16.
        exact: as `RowwiseLinear`.

    Returns:
        Names of the layers.
    """
    names = [name for name, module in stage.named_modules() if is_quantised(name, module)]
    for name in names:
        parent, _, attribute = name.rpartition(".")
        linear = stage.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(stage.get_submodule(parent), attribute, RowwiseLinear(linear, exact=exact))
    return names


def has_float8(device: torch.device) -> bool:
    """Whether a device multiplies in float8: GPUs from compute capability 8.9 on, and, slowly, CPUs."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)

"""Matrix products in float8 with a scale per row of both factors, as Hopper GPUs multiply them.

The format is e4m3 (4 bits of exponent, 3 of mantissa, largest value 448; arXiv:2209.05433). Weights are
quantised once, activations as they come, each row by its own largest value, so that a row of a batch does not
depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 1e-12
"""Of a row of zeros."""


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix row by row.

    Args:
        matrix: (N, K), any float dtype.

    Returns:
        (N, K) float8 and (N, 1) float32 scales: their product is close to `matrix`, no element off by more
        than a sixteenth of itself or, near zero, three millionths of the row's largest.
    """
    wide = matrix.float()
    scale = (wide.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    # rounding may leave the largest element a little above the format's largest value, which would be NaN
    return (wide / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


def multiply_rowwise(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer: `x` quantised row by row, multiplied in float8, summed in float32.

    Args:
        x: (M, K) bfloat16.
        weight: (N, K) float8 as `quantise_rows` leaves it; K and N multiples of 16.
        scale: (N, 1) float32.
        bias: (N,) bfloat16, or None.

    Returns:
        (M, N) bfloat16.
    """
    rows, row_scale = quantise_rows(x)
    return torch._scaled_mm(
        rows, weight.t(), scale_a=row_scale, scale_b=scale.t(), bias=bias, out_dtype=torch.bfloat16
    )


def dequantise_rows(matrix: Tensor, scale: Tensor) -> Tensor:
    """The float32 matrix that a quantised one stands for."""
    return matrix.float() * scale

"""Does compiled code draw what eager draws? Both get the same inputs; rows are compared one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.bundle.manifest import ParityRow
from engines.bundle.stages import Backend, StageSpec
from engines.compile.export import example_inputs
from engines.errors import ParityError
from engines.runtime.stages import Stage

MIN_COSINE = {"float32": 0.999, "bfloat16": 0.999, "float16": 0.999, "float8": 0.99}
"""Of the worst row, by what the compiled code computes in."""
MAX_SCALE_ERROR = 0.005
"""Of the worst row, whatever it computes in: rounding scatters around the reference and keeps its scale."""
MAX_PIXEL_DIFFERENCE = {"float32": 2.0, "bfloat16": 6.0, "float16": 6.0, "float8": 6.0}
"""Of one 8-bit channel value, by what the compiled code computes in.

For latents that are pure noise. On the pictures that the demo student draws, its bfloat16 decoder is at most
2 and on average 0.13 away from float32 (57 dB).
"""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two outputs are apart."""

    cosine: float
    """Of the worst row."""
    max_abs: float
    finite: bool
    scale_error: float = 0.0
    """How far the factor that would best make the reference the candidate is from 1, in the worst row.

    The cosine is blind to it: outputs a hundred times too large have cosine 1.
    """


def compare(reference: Tensor, candidate: Tensor) -> Agreement:
    """Compare two (B, ...) outputs."""
    a, b = (tensor.flatten(1).cpu().double() for tensor in (reference, candidate))
    finite = bool(b.isfinite().all())
    if not finite:
        return Agreement(cosine=float("-inf"), max_abs=float("inf"), finite=False, scale_error=float("inf"))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).min().item()
    power = a.square().sum(dim=1)
    scale = torch.where(power > 0, (a * b).sum(dim=1) / power, 1.0)  # least squares: b = scale a + rest
    return Agreement(
        cosine=cosine,
        max_abs=(a - b).abs().max().item(),
        finite=True,
        scale_error=(scale - 1.0).abs().max().item(),
    )


def worst(agreements: Sequence[Agreement]) -> Agreement:
    """Of a stage's outputs."""
    return Agreement(
        cosine=min(agreement.cosine for agreement in agreements),
        max_abs=max(agreement.max_abs for agreement in agreements),
        finite=all(agreement.finite for agreement in agreements),
        scale_error=max(agreement.scale_error for agreement in agreements),
    )


def check_parity(spec: StageSpec, eager: Stage, compiled: Stage, batch: int, backend: Backend) -> ParityRow:
    """Compare a compiled stage with the eager one at one batch size.

    Returns:
        What to record.

    Raises:
        ParityError: they differ by more than is allowed.
    """
    inputs = example_inputs(spec, batch, seed=batch)
    pairs = zip(eager(*inputs), compiled(*inputs), strict=True)
    found = worst([compare(reference, candidate) for reference, candidate in pairs])
    where = f"stage {spec.name}, batch {batch}, {backend} against eager"
    if not found.finite:
        raise ParityError(f"{where}: the output is not finite")
    if found.cosine < MIN_COSINE[spec.compute_dtype]:
        raise ParityError(
            f"{where}: cosine {found.cosine:.5f} is below {MIN_COSINE[spec.compute_dtype]}, which "
            f"{spec.compute_dtype} must reach"
        )
    if spec.outputs[0].dtype != "uint8" and found.scale_error > MAX_SCALE_ERROR:
        raise ParityError(
            f"{where}: the output is {100 * found.scale_error:.2g} % too large or too small, "
            f"{100 * MAX_SCALE_ERROR:g} % are allowed"
        )
    allowed = MAX_PIXEL_DIFFERENCE[spec.compute_dtype]
    if spec.outputs[0].dtype == "uint8" and found.max_abs > allowed:
        raise ParityError(
            f"{where}: a pixel differs by {found.max_abs:.0f} of 255, {allowed:.0f} are allowed"
        )
    return ParityRow(
        stage=spec.name,
        bucket=spec.bucket,
        batch=batch,
        backend=backend,
        cosine=round(found.cosine, 6),
        max_abs=found.max_abs,
        finite=found.finite,
    )

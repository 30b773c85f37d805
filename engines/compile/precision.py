"""Which dtype compiled decode computes in: found out by trying, before anything is compiled.

Decoding is convolutions, and CPUs with bfloat16 instructions do those about 1.5 times as fast. What a picture
loses depends on the decoder's weights: nothing visible in a trained one, too much in others. So both are run
eagerly, with the kernels that compiled code calls too; bfloat16 is taken where it is faster and close enough.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from engines.bundle import DType, StageSpec
from engines.compile.export import example_inputs
from engines.compile.parity import MAX_PIXEL_DIFFERENCE, compare
from engines.families.spec import FamilySpec
from engines.platform import Platform
from engines.runtime.stages import EagerEngine

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
MIN_SPEEDUP = 1.15
TRIAL_BATCH = 4
TRIALS = 5


def choose_dtype(family: FamilySpec, checkpoint: Path, spec: StageSpec, platform: Platform) -> DType:
    """`bfloat16` where this CPU runs the stage faster in it and no pixel moves by more than parity allows.

    Args:
        family: of the checkpoint.
        checkpoint: its directory.
        spec: a stage that gives pixels.
        platform: this machine.
    """
    if not BFLOAT16_FLAGS & set(platform.cpu_flags):
        return "float32"
    inputs = example_inputs(spec, TRIAL_BATCH)
    full, half = (
        EagerEngine(family.load_stage(checkpoint, spec, dtype), TRIAL_BATCH)
        for dtype in (torch.float32, torch.bfloat16)
    )
    agreement = compare(full(inputs), half(inputs))
    if not agreement.finite or agreement.max_abs > MAX_PIXEL_DIFFERENCE["bfloat16"]:
        return "float32"
    times_s = [(_time_s(full, inputs), _time_s(half, inputs)) for _ in range(TRIALS)]
    full_s, half_s = (min(column) for column in zip(*times_s, strict=True))
    return "bfloat16" if full_s >= MIN_SPEEDUP * half_s else "float32"


def _time_s(engine: EagerEngine, inputs: tuple[torch.Tensor, ...]) -> float:
    start = time.perf_counter()
    engine(inputs)
    return time.perf_counter() - start

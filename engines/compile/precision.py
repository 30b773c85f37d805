"""Which dtype compiled code of a stage computes in.

On a GPU one precision is asked for, and each stage computes in what comes closest to it and does not
overflow.

On a CPU text and denoise compute in float32, and decode in what is found out by trying, before anything is
compiled. Decoding is convolutions, and CPUs with bfloat16 instructions do those about 1.5 times as fast. What
a picture loses depends on the decoder's weights: nothing visible in a trained one, too much in others. So
both are run eagerly, with the kernels that compiled code calls too; bfloat16 is taken where it is faster and
close enough.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from engines.bundle.platform import Platform
from engines.bundle.stages import Backend, ComputeDType, DType, StageName, StageSpec
from engines.compile.export import example_inputs
from engines.compile.parity import MAX_PIXEL_DIFFERENCE, compare, worst
from engines.compile.settings import BuildSettings, Precision
from engines.families.spec import FamilySpec
from engines.runtime.stages import EagerEngine

MIN_SPEEDUP = 1.15
TRIAL_BATCH = 4
TRIALS = 5


def dtype_for(precision: Precision, stage: StageName, family: str) -> ComputeDType:
    """What a stage computes in when a precision is asked for.

    In float16, T5 and the autoencoders of SDXL and others leave its range, and are bfloat16 instead. Float8
    is for the denoiser alone: text is encoded once per prompt, and decoding is convolutions.
    """
    if precision == "fp32":
        return "float32"
    if stage == "denoise":
        denoise: dict[Precision, ComputeDType] = {"fp16": "float16", "fp8": "float8"}
        return denoise.get(precision, "bfloat16")
    if precision == "fp16" and stage == "text" and family == "sdxl":
        return "float16"
    return "bfloat16"


def with_compute_dtype(
    spec: StageSpec, settings: BuildSettings, family: FamilySpec, platform: Platform
) -> StageSpec:
    """Decide what compiled code of a stage computes in; on a CPU everything but decode stays float32.

    In the denoiser bfloat16 gains a CPU a third, but a rounding there changes the path that the sampler
    takes: the same seed would give visibly different pictures in different batches. On a GPU float32 would
    cost a multiple.
    """
    precision = settings.precision or ("bf16" if settings.device == "cuda" else None)
    eager_only = set(settings.backends) <= {Backend.EAGER}
    if precision is not None and not (eager_only and settings.device == "cpu"):
        if eager_only and precision == "fp8":  # compiled code alone has it
            precision = "bf16"
        dtype = dtype_for(precision, spec.name, family.name)
        if spec.name == "decode" and settings.decode_dtype != "auto":
            dtype = settings.decode_dtype
        return spec.model_copy(update={"compute_dtype": dtype})
    if spec.name != "decode" or settings.backends == (Backend.EAGER,):
        return spec
    if settings.decode_dtype != "auto":
        return spec.model_copy(update={"compute_dtype": settings.decode_dtype})
    chosen = choose_dtype(family, settings.out / "checkpoint", spec, platform)
    return spec.model_copy(update={"compute_dtype": chosen})


def choose_dtype(family: FamilySpec, checkpoint: Path, spec: StageSpec, platform: Platform) -> DType:
    """`bfloat16` where this CPU runs the stage faster in it and no pixel moves by more than parity allows.

    Args:
        family: of the checkpoint.
        checkpoint: its directory.
        spec: a stage that gives pixels.
        platform: this machine.
    """
    if not platform.has_bfloat16:
        return "float32"
    inputs = example_inputs(spec, TRIAL_BATCH)
    full, half = (
        EagerEngine(family.load_stage(checkpoint, spec, dtype), TRIAL_BATCH)
        for dtype in (torch.float32, torch.bfloat16)
    )
    agreement = worst([compare(a, b) for a, b in zip(full(inputs), half(inputs), strict=True)])
    if not agreement.finite or agreement.max_abs > MAX_PIXEL_DIFFERENCE["bfloat16"]:
        return "float32"
    times_s = [(_time_s(full, inputs), _time_s(half, inputs)) for _ in range(TRIALS)]
    full_s, half_s = (min(column) for column in zip(*times_s, strict=True))
    return "bfloat16" if full_s >= MIN_SPEEDUP * half_s else "float32"


def _time_s(engine: EagerEngine, inputs: tuple[torch.Tensor, ...]) -> float:
    start = time.perf_counter()
    engine(inputs)
    return time.perf_counter() - start

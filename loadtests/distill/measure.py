"""One measurement in a process of its own, so that peaks of memory do not mix.

    python -m loadtests.distill.measure '{"backbone": "pixart-512", "variant": "ready", ...}'

prints one line of JSON.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.bundle.bucket import Bucket
from engines.distill.config import DistillConfig, read_config
from engines.distill.student import student_bucket
from engines.distill.trainer import DTYPES, Trainer
from engines.families.spec import family_of
from loadtests.distill import flops
from loadtests.distill.backbones import BACKBONES, Size, random_prompts, random_teacher, write_directory
from loadtests.distill.memory import GIB, PeakMeter, num_bytes
from loadtests.distill.naive import NaiveTrainer
from loadtests.distill.stopwatch import PARTS, Clock, Stopwatch

Variant = Literal["naive", "separate", "lora"]
VARIANTS: tuple[Variant, ...] = ("naive", "separate", "lora")
"""naive: `naive.NaiveTrainer`; separate: our trainer with three networks; lora: our trainer with adapters for
student and fake score on one frozen bfloat16 network."""

FULL_COPIES = ["lora=null", "teacher_dtype=float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to measure.

    Attributes:
        batch_size: None for that of the config.
        toy: the shrunk network instead of the published one.
        warm_up, iterations: of them, at most.
        time_limit_s: no further iteration is started after this long, but one is always measured.
    """

    backbone: str
    variant: Variant
    device: str
    toy: bool
    batch_size: int | None = None
    warm_up: int = 1
    iterations: int = 3
    time_limit_s: float = 60.0


def ready_variant(backbone: str) -> Variant:
    """Which variant a backbone's config is."""
    return "separate" if read_config(BACKBONES[backbone].config).lora is None else "lora"


def settings(request: Request, directory: Path) -> tuple[DistillConfig, list[str]]:
    """The backbone's config, and what is changed in it besides paths: `key=value` each."""
    backbone = BACKBONES[request.backbone]
    changes = list(backbone.size(toy=request.toy).settings)
    if request.variant != ready_variant(request.backbone):
        changes += ["lora={}", "teacher_dtype=bfloat16"] if request.variant == "lora" else FULL_COPIES
    if request.batch_size is not None:
        changes.append(f"batch_size={request.batch_size}")
    paths = [f"teacher={directory}", f"out={directory / 'out'}", "student_init=null"]
    return read_config(backbone.config, [*paths, f"device={request.device}", *changes]), changes


@functools.cache
def count(backbone: str, variant: Variant, *, toy: bool) -> tuple[flops.RowFlops, DistillConfig, Bucket]:
    """Count a variant's FLOPs, for which nothing is computed.

    Returns:
        Also the settings and the size they are for.
    """
    with tempfile.TemporaryDirectory(prefix="tdm-distill-") as folder:
        size = BACKBONES[backbone].size(toy=toy)
        directory = write_directory(BACKBONES[backbone], size, Path(folder))
        request = Request(backbone=backbone, variant=variant, device="cpu", toy=toy)
        config, _ = settings(request, directory)
        bucket, _ = student_bucket(config, family_of(directory))
        return flops.count(directory, size, config), config, bucket


def measure(request: Request) -> dict[str, Any]:
    """Run a few iterations.

    Returns:
        Plain values; `fits` is false, and there is no more, if the GPU's memory did not suffice.
    """
    device = torch.device(request.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # what CPU time stands for
    backbone = BACKBONES[request.backbone]
    with tempfile.TemporaryDirectory(prefix="tdm-distill-") as folder, ExitStack() as stack:
        size = backbone.size(toy=request.toy)
        directory = write_directory(backbone, size, Path(folder))
        config, changes = settings(request, directory)
        if device.type == "cpu":  # as `Trainer.train` does
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        bucket, _ = student_bucket(config, family_of(directory))
        result = {
            **asdict(request),
            "batch_size": config.batch_size,
            "bucket": bucket.label,
            "changes": changes,
        }
        try:
            return {**result, "fits": True, **_run(request, size, directory, config, device)}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return {**result, "fits": False, "error": str(error).split(". ")[0]}


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that a GPU's memory did not suffice; its libraries have no class for that."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "ALLOC_FAILED" in said


def _run(
    request: Request, size: Size, directory: Path, config: DistillConfig, device: torch.device
) -> dict[str, Any]:
    naive = request.variant == "naive"
    meter = PeakMeter(device)
    bank = random_prompts(size)
    teacher = random_teacher(
        directory, dtype=torch.float32 if naive else DTYPES[config.teacher_dtype], device=device
    )
    parameters = sum(parameter.numel() for parameter in teacher.network.parameters())
    timed: dict[str, Any]
    if naive:
        plain = NaiveTrainer(config, teacher, bank)
        timed = _time_iterations(plain.step, request, device)
        learning = list(plain.networks["student"].parameters())
        kept = num_bytes(_kept_by_naive(plain))
    else:
        trainer = Trainer(config, teacher, bank)
        timed = _time_trainer(trainer, request)
        learning = list(trainer.roles.parameters["student"].values())
        kept = num_bytes(_kept(trainer))
    return {
        "parameters_m": round(parameters / 1e6, 2),
        "trained_m": round(sum(parameter.numel() for parameter in learning) / 1e6, 2),
        **timed,
        "memory": {"kept_gib": round(kept / GIB, 4), "peak_gib": round(meter.peak() / GIB, 4)},
    }


def _time_iterations(step: Callable[[], None], request: Request, device: torch.device) -> dict[str, Any]:
    clock, own, wall = Clock(device), [], []
    for measured in _rounds(request):
        wall_start, start = time.perf_counter(), clock.now()
        step()
        end = clock.now()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if measured:
            own.append(clock.seconds(start, end))
            wall.append(time.perf_counter() - wall_start)
    return {"seconds": _summary(own), "wall_seconds": _summary(wall)}


def _time_trainer(trainer: Trainer, request: Request) -> dict[str, Any]:
    spent: list[dict[str, float]] = []
    rows: list[dict[str, int]] = []
    wall: list[float] = []
    with Stopwatch(trainer) as watch:
        for measured in _rounds(request):
            start = time.perf_counter()
            watch.start()
            trainer.step()
            parts = watch.stop()
            trainer.state.iteration += 1
            if measured:
                spent.append(parts)
                rows.append(dict(watch.rows))
                wall.append(time.perf_counter() - start)
    return {
        "seconds": _summary([sum(parts.values()) for parts in spent]),
        "wall_seconds": _summary(wall),
        "parts": {name: round(statistics.median(parts[name] for parts in spent), 4) for name in PARTS},
        "rows": rows,
    }


def _rounds(request: Request) -> Iterator[bool]:
    """For each iteration, whether it counts."""
    started = time.perf_counter()
    for _ in range(request.warm_up):
        yield False
    for number in range(request.iterations):
        if number and time.perf_counter() - started > request.time_limit_s:
            return
        yield True


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "mean": round(statistics.fmean(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "count": len(values),
    }


def _kept(trainer: Trainer) -> Iterator[Tensor]:
    """What our trainer holds between iterations."""
    for denoiser in (trainer.roles.teacher, trainer.roles.student, trainer.roles.fake_score):
        yield from _of_network(denoiser.network)
    for optimizer in trainer.state.optimizers.values():
        yield from _of_optimizer(optimizer)
    for parameters in trainer.state.parameters.values():
        # with adapters, another learner's steps embedding is in no network
        for parameter in parameters.values():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
    yield from trainer.state.average.values()


def _kept_by_naive(trainer: NaiveTrainer) -> Iterator[Tensor]:
    for network in trainer.networks.values():
        yield from _of_network(network)
    for optimizer in trainer.optimizers.values():
        yield from _of_optimizer(optimizer)


def _of_network(network: torch.nn.Module) -> Iterator[Tensor]:
    for parameter in network.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from network.buffers()


def _of_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def main(argv: list[str]) -> None:
    """Measure what the argument says and print it as one line of JSON."""
    print(json.dumps(measure(Request(**json.loads(argv[0])))))


if __name__ == "__main__":
    main(sys.argv[1:])

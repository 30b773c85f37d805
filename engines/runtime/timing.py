"""How long a call takes: by the wall clock on a CPU, by events in the stream on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

MIN_CALLS = 3
MAX_CALLS = 30


def median_ms(
    call: Callable[[], object], budget_s: float = 0.25, device: torch.device | str = "cpu"
) -> float:
    """Median time of `call` in milliseconds, after one call that does not count.

    Args:
        call: what to time; on a GPU it works on the current stream.
        budget_s: stop after this long, but not before `MIN_CALLS`; at the latest after `MAX_CALLS`.
        device: where `call` computes.
    """
    one_ms = cuda_ms if torch.device(device).type == "cuda" else wall_ms
    call()
    times_ms: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(times_ms) < MIN_CALLS or (len(times_ms) < MAX_CALLS and time.perf_counter() < deadline):
        times_ms.append(one_ms(call))
    return statistics.median(times_ms)


def wall_ms(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def cuda_ms(call: Callable[[], object]) -> float:
    """Time that one call takes on the current stream of the current GPU.

    The stream is empty before, so that waiting for launches counts: small batches spend most of it so.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))

"""How much memory a process or its GPU needs, and what of it stays between iterations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30


class PeakMeter:
    """Largest amount of memory since the meter was made.

    On CUDA, what the tensors took, without the allocator's reserve. On the CPU, the process's resident
    memory, less what it had before: interpreter and libraries.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            reset_peak_resident()
            self._before = resident("VmRSS")

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self._before
        return resident("VmHWM") - self._before


def resident(field: str) -> int:
    """Bytes in memory of this process: VmRSS now, VmHWM at most.

    Not `getrusage`: its maximum survives exec, so a child starts with its parent's.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak_resident() -> None:
    """Have VmHWM start again from what is in memory now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Memory of tensors, those that share it counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())

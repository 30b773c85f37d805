"""What compiled code depends on besides its weights, found without importing torch.

The compiler is told `-march=native`, so a package may use any instruction that its builder's CPU has:
another CPU fits when it has at least those. Kernels for a GPU are machine code of one compute capability, and
tuned and measured on one kind of GPU: only the same kind fits.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

Device = Literal["cpu", "cuda"]
"""What a bundle's code runs on."""

_X86_ISA = re.compile(
    r"(avx|amx|sse|ssse|bmi|fma|f16c|gfni|vaes|vpclmul|pclmul|popcnt|movbe|abm|lzcnt|adx|sha_ni|aes|rdseed)"
)


class Platform(BaseModel):
    """A machine and the libraries on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    torch: str
    """Version of torch with its build tag, `2.13.0+cpu`; empty where torch is not installed."""
    os: str
    machine: str
    libc: str
    """C library and version, `glibc 2.36`."""
    cpu: str
    """Model name, for the reader; never compared."""
    cpu_flags: tuple[str, ...]
    """Instruction sets, sorted, in the kernel's spelling."""
    python: str
    """For the reader; packages do not link against Python."""
    gpu: str = ""
    """Name of the GPU that compiled code runs on, `NVIDIA H100 80GB HBM3`; empty for code that runs on the
    CPU, and in bundles of schema versions 1 to 3."""
    compute_capability: str = ""
    """Of that GPU, `9.0`."""
    cuda: str = ""
    """CUDA version that torch was built with, `13.0`."""
    driver: str = ""
    """Version of the GPU's driver; a newer one fits."""
    tensorrt: str = ""
    """Version of TensorRT, `10.15.1.29`; empty where it is not installed, and for code that runs on the
    CPU."""

    @property
    def has_bfloat16(self) -> bool:
        """Whether the CPU has instructions for matrix products in bfloat16."""
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(self.cpu_flags)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of this machine, as its driver describes it."""

    uuid: str
    name: str
    compute_capability: str
    driver: str


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One way in which a machine differs from the one that compiled a package."""

    field: str
    built_with: str
    here: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"platform.{self.field}: built with {self.built_with}, here {self.here}{remedy}"


REMEDIES = {
    "gpu": "build the bundle on a GPU of the kind that serves it",
    "compute_capability": "build the bundle on a GPU of the kind that serves it",
    "cuda": "install the same build of torch, or build the bundle again",
    "driver": "update the driver, or build the bundle again",
    "tensorrt": "install that version of TensorRT, or build the bundle again",
}


def current_platform(device: Device = "cpu") -> Platform:
    """Describe this machine.

    Args:
        device: what compiled code runs on; only with "cuda" is the GPU looked at. All GPUs of a machine are
            taken to be of one kind, the first one's.
    """
    cpuinfo = _cpuinfo()
    gpu = next(iter(list_gpus()), None) if device == "cuda" else None
    return Platform(
        torch=_version("torch"),
        os=sys.platform,
        machine=platform.machine(),
        libc=" ".join(platform.libc_ver()).strip(),
        cpu=cpuinfo.get("model name", platform.processor() or platform.machine()),
        cpu_flags=tuple(sorted(_isa_flags(cpuinfo))),
        python=platform.python_version(),
        gpu=gpu.name if gpu else "",
        compute_capability=gpu.compute_capability if gpu else "",
        cuda=torch_cuda_version() if gpu else "",
        driver=gpu.driver if gpu else "",
        tensorrt=tensorrt_version() if gpu else "",
    )


def compare_platforms(built_with: Platform, here: Platform) -> list[Mismatch]:
    """List what keeps code compiled on one platform from running on another; empty when it fits."""
    found = [
        Mismatch(field, theirs, ours)
        for field in ("torch", "os", "machine")
        if (theirs := getattr(built_with, field)) != (ours := getattr(here, field))
    ]
    if _numbers(here.libc) < _numbers(built_with.libc):
        found.append(Mismatch("libc", built_with.libc, here.libc))
    missing = sorted(set(built_with.cpu_flags) - set(here.cpu_flags))
    if missing:
        found.append(Mismatch("cpu_flags", " ".join(missing), f"a CPU without ({here.cpu})"))
    return found + _compare_gpus(built_with, here)


def compare_for_plan(built_with: Platform, here: Platform) -> list[Mismatch]:
    """List what keeps a TensorRT plan from running here: another GPU or TensorRT, not torch or CPU."""
    found = [
        Mismatch(field, theirs, ours or "none", REMEDIES.get(field, ""))
        for field in ("os", "machine", "gpu", "compute_capability", "tensorrt")
        if (theirs := getattr(built_with, field)) != (ours := getattr(here, field))
    ]
    if _numbers(here.driver) < _numbers(built_with.driver):
        found.append(Mismatch("driver", built_with.driver, here.driver or "none", REMEDIES["driver"]))
    return found


def tensorrt_version() -> str:
    """Version of TensorRT, found without importing it; empty where it is not installed."""
    names = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12")
    return next((found for name in names if (found := _version(name))), "")


def _compare_gpus(built_with: Platform, here: Platform) -> list[Mismatch]:
    if not built_with.gpu:  # its code runs on the CPU
        return []
    if not here.gpu:
        return [Mismatch("gpu", built_with.gpu, "no GPU", REMEDIES["gpu"])]
    found = [
        Mismatch(field, theirs, ours or "none", REMEDIES[field])
        for field in ("gpu", "compute_capability", "cuda")
        if (theirs := getattr(built_with, field)) != (ours := getattr(here, field))
    ]
    # kernels made by a newer driver's compiler may not load with an older one
    if _numbers(here.driver) < _numbers(built_with.driver):
        found.append(Mismatch("driver", built_with.driver, here.driver or "none", REMEDIES["driver"]))
    return found


def list_gpus() -> list[Gpu]:
    """GPUs that this machine's driver knows, without torch; empty where there is no NVIDIA driver.

    `CUDA_VISIBLE_DEVICES` hides none of them.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    fields = "uuid,name,compute_cap,driver_version"
    try:
        printed = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(printed)


def parse_gpus(printed: str) -> list[Gpu]:
    """Read what `nvidia-smi` printed: a line per GPU, uuid, name, compute capability, driver."""
    found = []
    for line in printed.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == 4:
            found.append(Gpu(*values))
    return found


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_fast_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32.

    A CPU without instructions for them emulates them: training the video demo's teacher takes 2.8 times as
    long on an AVX-512 CPU without `avx512_bf16`.

    Args:
        device: as torch names it, "cpu" or "cuda:0".
    """
    if device.partition(":")[0] != "cpu":
        return True
    return current_platform().has_bfloat16


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty off Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    entries = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in entries}


def _isa_flags(cpuinfo: Mapping[str, str]) -> Iterable[str]:
    if "flags" in cpuinfo:  # x86
        return {flag for flag in cpuinfo["flags"].split() if _X86_ISA.match(flag)}
    return set(cpuinfo.get("Features", "").split())  # arm


def torch_cuda_version() -> str:
    """CUDA version of the installed torch, read from its sources: importing it takes seconds."""
    try:
        path = metadata.distribution("torch").locate_file("torch/version.py")
        text = Path(str(path)).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return ""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found.group(1) if found else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))

"""What compiled code depends on besides its weights, found without importing torch.

The compiler is told `-march=native`, so a package may use any instruction that its builder's CPU has:
another CPU fits when it has at least those.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

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


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One way in which a machine differs from the one that compiled a package."""

    field: str
    built_with: str
    here: str

    def __str__(self) -> str:
        return f"platform.{self.field}: built with {self.built_with}, here {self.here}"


def current_platform() -> Platform:
    """Describe this machine."""
    cpuinfo = _cpuinfo()
    return Platform(
        torch=_version("torch"),
        os=sys.platform,
        machine=platform.machine(),
        libc=" ".join(platform.libc_ver()).strip(),
        cpu=cpuinfo.get("model name", platform.processor() or platform.machine()),
        cpu_flags=tuple(sorted(_isa_flags(cpuinfo))),
        python=platform.python_version(),
    )


def compare_platforms(built_with: Platform, here: Platform) -> list[Mismatch]:
    """List what keeps code compiled on one platform from running on another; empty when it fits."""
    found = [
        Mismatch(field, theirs, ours)
        for field in ("torch", "os", "machine")
        if (theirs := getattr(built_with, field)) != (ours := getattr(here, field))
    ]
    if _libc_version(here.libc) < _libc_version(built_with.libc):
        found.append(Mismatch("libc", built_with.libc, here.libc))
    missing = sorted(set(built_with.cpu_flags) - set(here.cpu_flags))
    if missing:
        found.append(Mismatch("cpu_flags", " ".join(missing), f"a CPU without ({here.cpu})"))
    return found


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _libc_version(libc: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", libc))

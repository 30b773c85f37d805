"""What to build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engines.bundle.bucket import Bucket
from engines.bundle.platform import Device
from engines.bundle.stages import Backend
from engines.compile.tensorrt import OPTIMIZATION_LEVEL

Precision = Literal["fp32", "bf16", "fp16", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What to build.

    Attributes:
        student: directory of the student.
        out: directory of the bundle; may be there already, and may hold the student as its `checkpoint`.
        buckets: what it draws, the default first; empty for the student's own. A video's that has one frame
            gets the student's number of them.
        batch_sizes: sorted; the largest is the largest batch the bundle will take.
        backends: `aotinductor` and `tensorrt`, the first that fits a machine is the one that serves there, or
            `eager` alone for a bundle without compiled code.
        num_threads: of the process that will run the bundle.
        num_jobs: compilations side by side.
        decode_dtype: what compiled decode computes in; `auto` tries both. On a GPU `auto` follows
            `precision`.
        device: what to compile for and measure on.
        precision: what compiled code computes in; by default bfloat16 on a GPU and on a CPU float32, decode
            aside.
        static_batches: batch sizes that get packages of their own for denoise and decode at every bucket,
            beside those for all sizes; sorted, and among `batch_sizes`.
        optimization_level: of TensorRT's builder, 0 to 5: how many kernels it tries.
        workspace_bytes: scratch memory that TensorRT may choose a kernel by; None: all there is.
        force: build a student that failed its gate; the manifest says so.
        ungated: build a student that never went through a gate; the manifest says so.
        allow_eager: when compilation or parity fails, build a bundle without compiled code instead.
    """

    student: Path
    out: Path
    buckets: tuple[Bucket, ...] = ()
    batch_sizes: tuple[int, ...]
    backends: tuple[Backend, ...]
    num_threads: int
    num_jobs: int
    decode_dtype: Literal["auto", "float32", "bfloat16"]
    force: bool
    ungated: bool = False
    allow_eager: bool
    device: Device = "cpu"
    precision: Precision | None = None
    static_batches: tuple[int, ...] = ()
    optimization_level: int = OPTIMIZATION_LEVEL
    workspace_bytes: int | None = None

"""TensorRT plans in memory. `tensorrt` is imported when one is loaded, and where it is missing that is said.

A plan holds its weights, one optimization profile per range of batch sizes, and no scratch: all plans of a
worker share one piece of memory, as large as the largest of them needs, and run one after the other. Each
batch size has an execution context of its own, whose shapes, outputs and scratch never change once it has
run: that is what a CUDA graph of it relies on.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engines.bundle.manifest import Manifest
from engines.bundle.stages import Backend, DType, StageSpec, TensorSpec
from engines.errors import BackendUnavailable, BundleError
from engines.runtime.stages import Stage, torch_dtype

OLDEST: Final = (10, 15)
NEWEST: Final = 11
"""Versions whose Python interface this module was checked against: from `OLDEST` on, up to this major one."""

REMEDY: Final = "install the extra tensorrt (TensorRT 10.15 to 11), or leave tensorrt out of --backends"

MAX_LOG_LINES: Final = 100
"""A worker runs for weeks, and TensorRT may have something to say about each run."""

ALIGNMENT: Final = 256
"""Of scratch memory, in bytes."""

DTYPES: Final[dict[str, DType]] = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "UINT8": "uint8",
}
"""TensorRT's names of dtypes, and ours."""


def import_tensorrt() -> Any:
    """The `tensorrt` module.

    Raises:
        BackendUnavailable: it is not installed, its libraries do not load, or its version is not supported;
            with the remedy.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise BackendUnavailable(f"tensorrt is not to be had here ({error}); {REMEDY}") from None
    major, minor = (int(number) for number in tensorrt.__version__.split(".")[:2])
    if (major, minor) < OLDEST or major > NEWEST:
        raise BackendUnavailable(f"tensorrt {tensorrt.__version__} is not supported; {REMEDY}")
    return tensorrt


def make_logger(trt: Any) -> Any:
    """A logger that keeps what TensorRT says in `lines`, warnings and worse; the newest last."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: deque[str] = deque(maxlen=MAX_LOG_LINES)

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.WARNING):
                self.lines.append(msg.strip())

    return Log()


def last_lines(logger: Any, count: int = 3) -> str:
    """What a logger heard last, for an error message."""
    return " | ".join([*logger.lines][-count:]) or "TensorRT gave no reason"


class Scratch:
    """Memory that engines share which never run at once.

    Args:
        size_bytes: of the largest engine.
        device: where.

    Attributes:
        size_bytes: as given.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.size_bytes = size_bytes
        self._memory = torch.empty(size_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
        self._stream: torch.cuda.Stream | None = None

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """For runs that were asked for on the default one."""
        return torch.cuda.Stream(self._memory.device)

    @property
    def address(self) -> int:
        """Of the first byte, aligned."""
        return math.ceil(self._memory.data_ptr() / ALIGNMENT) * ALIGNMENT

    def claim(self, stream: torch.cuda.Stream | None) -> None:
        """Have `stream` wait until whatever used the memory before, on another stream, is done."""
        if stream is not None and self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream


class TensorRtEngine:
    """One plan. On a GPU it runs on the current stream; in the default one's stead on one of its own.

    Args:
        plan: what the builder made.
        name: of its file, for messages.
        spec: the stage that it is of.
        ranges: batch sizes of each optimization profile: smallest and largest, in the plan's order.
        scratch: at least as large as the plan needs.
        device: where it runs.

    Attributes:
        weight_bytes: size of the plan, nearly all of which are weights.
        scratch_bytes: what a run takes of `scratch`, at most.

    Raises:
        BackendUnavailable: there is no TensorRT here, or it does not take this plan.
        BundleError: the plan's inputs or outputs are not the stage's, or it needs more scratch.
    """

    def __init__(
        self,
        plan: bytes,
        name: str,
        spec: StageSpec,
        ranges: Sequence[tuple[int, int]],
        scratch: Scratch,
        device: torch.device,
    ) -> None:
        trt = import_tensorrt()
        self.min_batch, self.max_batch = ranges[0][0], ranges[-1][1]
        self.weight_bytes = len(plan)
        self._trt, self._name, self._spec = trt, name, spec
        self._ranges, self._scratch, self._device = list(ranges), scratch, device
        self._logger = make_logger(trt)  # TensorRT keeps a pointer to it
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BackendUnavailable(
                f"{name} does not load: {last_lines(self._logger)}; build the bundle again"
            )
        self.scratch_bytes = int(self._engine.device_memory_size_v2)
        self._check()
        self._contexts: dict[int, tuple[Any, tuple[Tensor, ...]]] = {}

    def _check(self) -> None:
        """Compare the plan with what the manifest says of it."""
        trt, engine = self._trt, self._engine
        found = {True: {}, False: {}}  # type: dict[bool, dict[str, str]]
        for index in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT
            dtype = engine.get_tensor_dtype(tensor).name
            found[is_input][tensor] = DTYPES.get(dtype, dtype)
        for is_input, specs in ((True, self._spec.inputs), (False, self._spec.outputs)):
            expected = {tensor.name: tensor.dtype for tensor in specs}
            if found[is_input] != expected:
                side = "inputs" if is_input else "outputs"
                raise BundleError(f"files.{self._name}", f"its {side} are {found[is_input]}, not {expected}")
        if engine.num_optimization_profiles != len(self._ranges):
            raise BundleError(
                f"files.{self._name}",
                f"has {engine.num_optimization_profiles} profiles, {len(self._ranges)} expected",
            )
        if self.scratch_bytes > self._scratch.size_bytes:
            raise BundleError(
                f"files.{self._name}",
                f"needs {self.scratch_bytes} bytes of scratch, the manifest says {self._scratch.size_bytes}",
            )

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run one batch.

        Args:
            inputs: as the stage's, contiguous, on the engine's device.

        Returns:
            Tensors of the caller's own.

        Raises:
            RuntimeError: TensorRT refused something, or ran into an error; with its own words.
        """
        if self._device.type != "cuda":
            return self._run(inputs, None)
        current = torch.cuda.current_stream(self._device)
        if current != torch.cuda.default_stream(self._device):
            return self._run(inputs, current)
        # on the default stream TensorRT would synchronise the device around each run
        side = self._scratch.stream
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outputs = self._run(inputs, side)
        current.wait_stream(side)
        for output in outputs:
            output.record_stream(current)
        return outputs

    def _run(self, inputs: Sequence[Tensor], stream: torch.cuda.Stream | None) -> tuple[Tensor, ...]:
        batch = inputs[0].shape[0]
        if batch not in self._contexts:
            self._contexts[batch] = self._make_context(batch, stream)
        context, outputs = self._contexts[batch]
        for tensor, spec in zip(inputs, self._spec.inputs, strict=True):
            self._demand(
                context.set_tensor_address(spec.name, tensor.data_ptr()), f"the address of {spec.name}"
            )
        self._scratch.claim(stream)
        self._demand(context.execute_async_v3(_handle(stream)), "to run")
        # the engine's own outputs stay where they are: a captured graph writes there
        return tuple(output.clone() for output in outputs)

    def _make_context(self, batch: int, stream: torch.cuda.Stream | None) -> tuple[Any, tuple[Tensor, ...]]:
        """A context with everything set that stays the same for `batch` rows, and where its outputs lie."""
        trt = self._trt
        profile = next(
            (index for index, (low, high) in enumerate(self._ranges) if low <= batch <= high), None
        )
        if profile is None:
            raise ValueError(
                f"{self._name} takes batches of {self.min_batch} to {self.max_batch}, not {batch}"
            )
        context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._demand(context is not None, "an execution context")
        size_bytes = int(self._engine.get_device_memory_size_for_profile_v2(profile))
        context.set_device_memory(self._scratch.address, size_bytes)
        self._demand(context.set_optimization_profile_async(profile, _handle(stream)), f"profile {profile}")
        for spec in self._spec.inputs:
            shape = (batch, *spec.shape)
            self._demand(context.set_input_shape(spec.name, shape), f"{spec.name} of shape {shape}")
        unknown = context.infer_shapes()
        self._demand(not unknown, f"shapes without {', '.join(unknown)}")
        outputs = tuple(self._make_output(context, spec, batch) for spec in self._spec.outputs)
        return context, outputs

    def _make_output(self, context: Any, spec: TensorSpec, batch: int) -> Tensor:
        shape = (batch, *spec.shape)
        found = tuple(context.get_tensor_shape(spec.name))
        self._demand(found == shape, f"{spec.name} as {shape}, it makes {found}")
        output = torch.empty(shape, dtype=torch_dtype(spec), device=self._device)
        self._demand(context.set_tensor_address(spec.name, output.data_ptr()), f"the address of {spec.name}")
        return output

    def _demand(self, granted: bool, what: str) -> None:
        """Turn a refusal, which TensorRT tells by a return value, into an error."""
        if not granted:
            raise RuntimeError(f"{self._name}: TensorRT refused {what}: {last_lines(self._logger)}")


def _handle(stream: torch.cuda.Stream | None) -> int:
    return 0 if stream is None else int(stream.cuda_stream)


class TensorRtStages:
    """The stages of a bundle on TensorRT, sharing one piece of scratch memory.

    Args:
        bundle: the bundle directory.
        manifest: of it.
        device: where they run.

    Raises:
        BackendUnavailable: there is no TensorRT here.
    """

    def __init__(self, bundle: Path, manifest: Manifest, device: torch.device) -> None:
        import_tensorrt()
        self._bundle, self._manifest, self._device = bundle, manifest, device
        self._engines = [engine for engine in manifest.engines if engine.backend == Backend.TENSORRT]
        largest = max((engine.scratch_bytes for engine in self._engines), default=0)
        self._scratch = Scratch(largest, device)

    def load(self, spec: StageSpec) -> Stage:
        """One of them.

        Raises:
            BackendUnavailable: TensorRT does not take its plan.
            BundleError: its plan is not what the manifest says.
            ValueError: its plans do not cover every batch size.
        """
        engines = [
            TensorRtEngine(
                (self._bundle / engine.path).read_bytes(),
                engine.path,
                spec,
                engine.profiles,
                self._scratch,
                self._device,
            )
            for engine in self._engines
            if (engine.stage, engine.bucket) == (spec.name, spec.bucket)
        ]
        return Stage(spec, engines, self._manifest.max_batch, self._device)

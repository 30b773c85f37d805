"""What a bundle needs of a GPU's memory, added up before anything is loaded; no torch unless it must
estimate.

A GPU that runs out of memory does so in the middle of somebody's batch. So everything that will be there at
once is summed at start, each line with where its number comes from, and compared with what is free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engines.bundle.latency import LatencyRow
from engines.bundle.manifest import Manifest
from engines.bundle.stages import Backend, StageSpec
from engines.errors import MemoryPlanError
from engines.families.checkpoint import check_safetensors, current_name, weight_files

FRACTION = 0.92
"""Of the free memory that a plan may fill; the rest is for fragments and what no line below counts."""
LIBRARY_BYTES = 512 << 20
"""Estimated: workspaces of cuBLAS and cuDNN and loaded kernels."""
PROMPT_CACHE_BYTES = 256 << 20
"""What `PromptCache` holds at most."""

Basis = Literal["from the files' headers", "from the manifest", "computed", "measured at build", "estimated"]

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 2, "int64": 8, "uint8": 1}
"""By dtype; modules that compute in `float8` run eagerly in bfloat16."""


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One summand."""

    what: str
    size_bytes: int
    basis: Basis


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """All that is in a GPU's memory at once while a bundle is served."""

    name: str
    lines: tuple[MemoryLine, ...]

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return sum(line.size_bytes for line in self.lines)

    def check(self, free_bytes: int) -> None:
        """Refuse to start where it would run out of memory.

        Raises:
            MemoryPlanError: the sum is more than `FRACTION` of `free_bytes`; says so line by line.
        """
        allowed = int(FRACTION * free_bytes)
        if self.total_bytes <= allowed:
            return
        raise MemoryPlanError(
            f"{self.name} needs {_gigabytes(self.total_bytes)} of GPU memory, "
            f"{_gigabytes(allowed)} may be used ({FRACTION:.0%} of {_gigabytes(free_bytes)} free):\n"
            f"{self.as_text()}\n"
            "Build it with fewer or smaller --batches, fewer --buckets or another --precision, keep other "
            "processes off this GPU, or serve each model on a GPU of its own"
        )

    def as_text(self) -> str:
        """A line each, and the sum."""
        rows = [(line.what, line.size_bytes, str(line.basis)) for line in self.lines]
        rows.append(("sum", self.total_bytes, ""))
        width = max(len(what) for what, _, _ in rows)
        return "\n".join(
            f"  {what:{width}}  {_gigabytes(size):>9}  {basis}".rstrip() for what, size, basis in rows
        )


def plan_memory(
    bundle: Path, manifest: Manifest, backend: Backend | None = None, *, graphs: bool | None = None
) -> MemoryPlan:
    """Add up what serving a bundle takes.

    Args:
        bundle: the bundle directory.
        manifest: of it.
        backend: that will serve; by default the fastest it has.
        graphs: count what CUDA graphs take; by default where there are some, with compiled code.

    Raises:
        CheckpointError: the header of a file with weights is damaged.
    """
    backend = backend or manifest.backend
    weights = _WEIGHTS[backend]
    lines = [MemoryLine(what, size, "from the files' headers") for what, size in weights(bundle, manifest)]
    lines.append(MemoryLine("batch in flight", _flight_bytes(manifest), "computed"))
    lines.append(MemoryLine("prompt cache", PROMPT_CACHE_BYTES, "computed"))
    if backend == Backend.TENSORRT:
        # one piece, which plans share
        largest = max((engine.scratch_bytes for engine in manifest.engines), default=0)
        lines.append(MemoryLine("scratch of the plans", largest, "from the manifest"))
        lines.append(MemoryLine("outputs of the plans", _static_bytes(manifest), "computed"))
        peaks: Mapping[str, int] = {
            spec.label: manifest.max_batch * _row_bytes(spec, "outputs") for spec in manifest.stages
        }
        basis: Basis = "computed"
    else:
        peaks, basis = scratch_bytes(bundle, manifest, backend)
    lines.append(MemoryLine("scratch of the largest call", max(peaks.values()), basis))
    if backend != Backend.EAGER if graphs is None else graphs:
        lines.append(
            MemoryLine("static inputs and outputs of CUDA graphs", _static_bytes(manifest), "computed")
        )
        # graphs have a pool of their own; what the largest needs, all others fit into
        lines.append(MemoryLine("pool of CUDA graphs", max(peaks.values()), basis))
    lines.append(MemoryLine("libraries", LIBRARY_BYTES, "estimated"))
    return MemoryPlan(name=f"{manifest.name} ({backend})", lines=tuple(lines))


def _eager_weights(bundle: Path, manifest: Manifest) -> Iterable[tuple[str, int]]:
    seen = set()
    for spec in manifest.stages:
        if spec.name in seen:  # buckets share modules
            continue
        seen.add(spec.name)
        numbers = sum(
            math.prod(entry["shape"])
            for part in spec.parts
            for name, entry in _tensors(bundle / "checkpoint" / part)
            if spec.name != "decode" or not name.startswith(("encoder.", "quant_conv."))
        )
        yield f"weights of {spec.name}", numbers * ITEM_BYTES[spec.compute_dtype]


def _compiled_weights(bundle: Path, manifest: Manifest) -> Iterable[tuple[str, int]]:
    """Every form of every tensor once: packages share them."""
    from engines.runtime.aotinductor import read_bindings

    shapes = {
        (part, name): entry["shape"]
        for part in {part for spec in manifest.stages for part in spec.parts}
        for name, entry in _tensors(bundle / "checkpoint" / part)
    }
    sizes: dict[str, int] = {spec.name: 0 for spec in manifest.stages}
    counted = set()
    parts = {spec.name: spec.parts[0] for spec in manifest.stages}
    for engine in manifest.engines:
        if engine.backend != Backend.AOTINDUCTOR:
            continue
        own = {
            name: entry["shape"]
            for name, entry in check_safetensors(bundle / engine.constants).items()
            if name != "__metadata__"
        }
        for binding in read_bindings(bundle / engine.constants, engine.constants).values():
            place = engine.constants if binding.own else binding.part or parts[engine.stage]
            if (place, binding) in counted:
                continue
            counted.add((place, binding))
            shape = own[binding.tensor] if binding.own else shapes[place, binding.tensor]
            if binding.rowwise == "scale":
                shape = shape[:1]
            item = 1 if binding.rowwise == "weight" else ITEM_BYTES[binding.dtype]
            sizes[engine.stage] += item * math.prod(shape)
    for stage, size in sizes.items():
        yield f"weights of {stage}", size


def _plan_weights(_: Path, manifest: Manifest) -> Iterable[tuple[str, int]]:
    """A plan is nearly all weights, and shares none of them."""
    for engine in manifest.engines:
        if engine.backend == Backend.TENSORRT:
            label = engine.stage if engine.bucket is None else f"{engine.stage}-{engine.bucket.label}"
            yield f"weights of {label}", manifest.files[engine.path].size_bytes


def _tensors(part: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    for file in weight_files(part):
        for name, entry in check_safetensors(file).items():
            if name != "__metadata__":
                yield current_name(name), entry


def _row_bytes(spec: StageSpec, side: Literal["inputs", "outputs"]) -> int:
    return sum(ITEM_BYTES[tensor.dtype] * math.prod(tensor.shape) for tensor in getattr(spec, side))


def _flight_bytes(manifest: Manifest) -> int:
    """Latents, their prediction and x0, what the denoiser is told, and pixels, of the largest batch."""
    row = max(
        _row_bytes(manifest.stage("denoise", bucket), "inputs")
        + 3 * _row_bytes(manifest.stage("denoise", bucket), "outputs")
        + _row_bytes(manifest.stage("text", bucket), "outputs")
        + _row_bytes(manifest.stage("decode", bucket), "outputs")
        for bucket in manifest.buckets
    )
    return manifest.max_batch * row


def _static_bytes(manifest: Manifest) -> int:
    """Inputs of a stage are shared by its batch sizes, each of which has outputs of its own."""
    return sum(
        manifest.max_batch * _row_bytes(spec, "inputs")
        + sum(manifest.batch_sizes) * _row_bytes(spec, "outputs")
        for spec in manifest.stages
    )


def scratch_bytes(
    bundle: Path, manifest: Manifest, backend: Backend
) -> tuple[Mapping[str, int], Literal["measured at build", "estimated"]]:
    """What one call of each stage takes at its largest batch beyond weights and inputs; how that is known.

    Returns:
        Bytes by stage label: measured for this backend at build, or all of them estimated with the
        allocations of an eager call on tensors without memory.
    """
    peaks = {
        spec.label: max(
            (row.peak_bytes for row in _rows(manifest, spec, backend) if row.peak_bytes), default=0
        )
        for spec in manifest.stages
    }
    if all(peaks.values()):
        return peaks, "measured at build"
    from engines.runtime.scratch import estimate_scratch

    return {
        spec.label: estimate_scratch(bundle / "checkpoint", manifest, spec, manifest.max_batch)
        for spec in manifest.stages
    }, "estimated"


def _rows(manifest: Manifest, spec: StageSpec, backend: Backend) -> Iterable[LatencyRow]:
    return (
        row
        for row in manifest.latency
        if (row.stage, row.bucket, row.backend) == (spec.name, spec.bucket, backend)
    )


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.2f} MB"


_WEIGHTS = {
    Backend.EAGER: _eager_weights,
    Backend.AOTINDUCTOR: _compiled_weights,
    Backend.TENSORRT: _plan_weights,
}
"""Weights on a GPU, in bytes, by what they are."""

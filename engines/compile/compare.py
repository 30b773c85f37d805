"""Every stage of a bundle, eager and compiled: whether they agree, and how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from engines.bundle.latency import LatencyRow
from engines.bundle.manifest import Manifest, ParityRow
from engines.bundle.stages import Backend
from engines.compile.measure import measure_stage
from engines.compile.parity import check_parity
from engines.compile.progress import BuildProgress
from engines.runtime.backends import BACKENDS
from engines.runtime.cuda_graphs import TorchGraphs, capture_stages
from engines.runtime.stages import EagerStages, Stage


def compare_and_measure(
    bundle: Path, manifest: Manifest, progress: BuildProgress
) -> tuple[list[ParityRow], list[LatencyRow]]:
    """Run every stage of a bundle, eager and compiled, at every batch size.

    Raises:
        ParityError: they differ by more than is allowed.
    """
    parity: list[ParityRow] = []
    latency: list[LatencyRow] = []
    device = torch.device(manifest.device)
    loaders = {backend: BACKENDS[backend](bundle, manifest, device) for backend in manifest.compiled_backends}
    references = EagerStages(bundle, manifest, device)
    # a CPU serves eager in float32, too
    served = references if device.type == "cpu" else EagerStages(bundle, manifest, device, reference=False)
    for spec in manifest.stages:
        progress.doing(f"comparing and measuring {spec.label}")
        stages: dict[Backend, Stage] = {Backend.EAGER: served.load(spec)}
        for name, loader in loaders.items():
            stages[name] = compiled = loader.load(spec)
            reference = references.load(spec)
            parity += [check_parity(spec, reference, compiled, batch, name) for batch in manifest.batch_sizes]
        for backend, stage in stages.items():
            rows = measure_stage(spec, stage, backend, manifest.batch_sizes)
            # eager code may do what cannot be captured
            plain = device.type == "cpu" or backend == Backend.EAGER
            latency += rows if plain else _with_graphs(stage, rows)
        progress.done(f"measured {spec.label}")
    return parity, latency


def _with_graphs(stage: Stage, rows: Sequence[LatencyRow]) -> list[LatencyRow]:
    """Rows of one stage with what it takes as a CUDA graph; the graphs are given up afterwards."""
    stream = torch.cuda.Stream(stage.device)
    peaks = {(row.stage, row.bucket, row.batch): row.peak_bytes for row in rows if row.peak_bytes}
    with torch.cuda.stream(stream):
        decisions = capture_stages([stage], [row.batch for row in rows], TorchGraphs(stream), peaks)
    graph_ms = {decision.batch: decision.graph_ms for decision in decisions}
    return [row.model_copy(update={"graph_ms": graph_ms[row.batch]}) for row in rows]

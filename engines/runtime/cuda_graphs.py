"""CUDA graphs of stages: a whole stage launched at once, where that is faster than launching its kernels.

A graph is one stage at one bucket and one batch size. Its inputs lie where they lay when it was captured, so
a call copies them there, replays, and copies the outputs away: nothing that a caller holds is overwritten by
a later replay. All graphs of a pipeline share one pool of memory and are captured and replayed on one stream,
one after the other; the largest is captured first, and the others fit into what it left.

What is asked of CUDA is `GraphDevice`, so that order and arithmetic can be tested without a GPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engines.bundle.bucket import Bucket
from engines.bundle.stages import StageName, StageSpec
from engines.runtime.stages import Engine, Stage, torch_dtype
from engines.runtime.timing import median_ms

WARM_RUNS = 2
"""Before a capture: kernels are loaded and libraries claim their workspaces at first use, which no graph may
contain."""
MIN_GAIN = 1.02
"""A graph that is not faster by this much is given up for its memory's sake."""

Outputs = tuple[Tensor, ...]


class Graph(Protocol):
    """A captured call."""

    def replay(self) -> None:
        """Do the same again with what lies in its inputs now."""

    def reset(self) -> None:
        """Give its memory back to the pool."""


class GraphDevice(Protocol):
    """What capturing needs of CUDA; `TorchGraphs`, or a stand-in that records."""

    def synchronize(self) -> None:
        """Wait for everything."""

    def capture(self, body: Callable[[], Outputs]) -> tuple[Graph, Outputs]:
        """Record what `body` launches, in the shared pool; also the outputs that a replay fills.

        Raises:
            RuntimeError: it did something that cannot be captured.
        """

    def time_ms(self, call: Callable[[], object]) -> float:
        """Median milliseconds of a call."""


class TorchGraphs:
    """`GraphDevice` of one stream and one pool.

    Args:
        stream: not the default one, which cannot be captured. All calls are made with it as the current
            stream.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    def synchronize(self) -> None:
        """As `GraphDevice`."""
        torch.cuda.synchronize(self._stream.device)

    def capture(self, body: Callable[[], Outputs]) -> tuple[Graph, Outputs]:
        """As `GraphDevice`."""
        graph = torch.cuda.CUDAGraph()
        # other threads of the process go on meanwhile: theirs are not our capture's errors
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = body()
        return graph, outputs

    def time_ms(self, call: Callable[[], object]) -> float:
        """As `GraphDevice`."""
        with torch.cuda.stream(self._stream):
            return median_ms(call, budget_s=0.1, device=self._stream.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphDecision:
    """Whether one stage is replayed at one batch size, and why."""

    stage: StageName
    bucket: Bucket | None
    batch: int
    plain_ms: float
    graph_ms: float | None
    """None: it cannot be captured."""
    used: bool
    reason: str


class GraphedEngine:
    """An engine at one batch size, captured.

    Args:
        engine: takes this batch size.
        buffers: the stage's inputs, at least `batch` rows; other sizes use them as well.
        batch: rows.
        device: to capture on.

    Raises:
        RuntimeError: the engine cannot be captured.
    """

    def __init__(self, engine: Engine, buffers: Sequence[Tensor], batch: int, device: GraphDevice) -> None:
        self.min_batch = self.max_batch = batch
        self._inputs = [buffer[:batch] for buffer in buffers]
        for _ in range(WARM_RUNS):
            engine(list(self._inputs))
        device.synchronize()
        self._graph, self._outputs = device.capture(lambda: engine(list(self._inputs)))

    def __call__(self, inputs: Sequence[Tensor]) -> Outputs:
        """Replay on one batch."""
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)

    def close(self) -> None:
        """Give the graph's memory back; it cannot be called any more."""
        self._outputs = ()
        self._graph.reset()


def capture_stages(
    stages: Sequence[Stage],
    batch_sizes: Sequence[int],
    device: GraphDevice,
    peak_bytes: Mapping[tuple[StageName, Bucket | None, int], int] | None = None,
) -> list[GraphDecision]:
    """Capture every stage at every batch size, largest first, and keep the graphs that are faster.

    A batch between two sizes is padded to the next graph where replaying that is faster than a plain call of
    just its rows, which is taken from a straight line between the measured sizes.

    Args:
        stages: whose engines are replaced at the sizes where a graph wins.
        batch_sizes: to capture.
        device: to capture on.
        peak_bytes: memory that a call takes, where it was measured; inputs and outputs stand for it
            elsewhere.

    Returns:
        A decision for each, in the order of the captures.
    """
    peak_bytes = peak_bytes or {}

    def size(stage: Stage, batch: int) -> int:
        key = (stage.spec.name, stage.spec.bucket, batch)
        return peak_bytes.get(key, boundary_bytes(stage.spec, batch))

    wanted = [(stage, batch) for stage in stages for batch in batch_sizes if batch <= stage.max_batch]
    wanted.sort(key=lambda pair: size(*pair), reverse=True)
    buffers = {id(stage): static_inputs(stage.spec, stage.max_batch, stage.device) for stage in stages}
    decisions: list[GraphDecision] = []
    kept: dict[int, dict[int, GraphedEngine]] = {id(stage): {} for stage in stages}
    plain_ms: dict[int, dict[int, float]] = {id(stage): {} for stage in stages}
    for stage, batch in wanted:
        decision, graphed = _try(stage, batch, buffers[id(stage)], device)
        decisions.append(decision)
        plain_ms[id(stage)][batch] = decision.plain_ms
        if graphed is not None:
            kept[id(stage)][batch] = graphed
    graph_ms = {(d.stage, d.bucket, d.batch): d.graph_ms for d in decisions}
    for stage in stages:
        graphs = kept[id(stage)]
        measured = {b: graph_ms[stage.spec.name, stage.spec.bucket, b] or 0.0 for b in graphs}
        for batch, padded in plan_batches(stage.max_batch, plain_ms[id(stage)], measured).items():
            stage.route(batch, graphs[padded], padded)
    return decisions


def _try(
    stage: Stage, batch: int, buffers: Sequence[Tensor], device: GraphDevice
) -> tuple[GraphDecision, GraphedEngine | None]:
    """Capture one stage at one size and time it both ways; the graph only if it wins."""
    spec = stage.spec
    engine, padded = stage.engine_for(batch)
    given = [buffer[:padded].clone() for buffer in buffers]
    plain_ms = device.time_ms(lambda: engine(list(given)))

    def decision(graph_ms: float | None, reason: str, *, used: bool) -> GraphDecision:
        return GraphDecision(
            stage=spec.name,
            bucket=spec.bucket,
            batch=batch,
            plain_ms=round(plain_ms, 3),
            graph_ms=None if graph_ms is None else round(graph_ms, 3),
            used=used,
            reason=reason,
        )

    if padded != batch:
        return decision(None, f"its engine takes batches of {padded}", used=False), None
    try:
        graphed = GraphedEngine(engine, buffers, batch, device)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        return decision(None, f"cannot be captured: {str(error).splitlines()[0]}", used=False), None
    graph_ms = device.time_ms(lambda: graphed(given))
    if graph_ms * MIN_GAIN > plain_ms:
        graphed.close()
        return decision(graph_ms, "a plain call is as fast", used=False), None
    return decision(graph_ms, "faster", used=True), graphed


def plan_batches(
    max_batch: int, plain_ms: Mapping[int, float], graph_ms: Mapping[int, float]
) -> dict[int, int]:
    """Which batches are replayed, and padded to what.

    Args:
        max_batch: the largest batch.
        plain_ms: of plain calls, by batch size.
        graph_ms: of the graphs that are kept, by batch size.

    Returns:
        The graph's size by batch size; a batch that is missing is called plainly.
    """
    sizes = sorted(graph_ms)
    plan = {}
    for batch in range(1, max_batch + 1):
        at = bisect_left(sizes, batch)
        if at < len(sizes) and (sizes[at] == batch or graph_ms[sizes[at]] < _between(plain_ms, batch)):
            plan[batch] = sizes[at]
    return plan


def _between(ms: Mapping[int, float], batch: int) -> float:
    """Value at `batch` on the line between its neighbours; the nearest beyond them."""
    below = [size for size in ms if size <= batch]
    above = [size for size in ms if size >= batch]
    if not below or not above:
        return ms[min(above, default=max(below, default=0))]
    left, right = max(below), min(above)
    if left == right:
        return ms[left]
    return ms[left] + (ms[right] - ms[left]) * (batch - left) / (right - left)


def static_inputs(spec: StageSpec, batch: int, device: torch.device) -> list[Tensor]:
    """Buffers for a stage's inputs, filled with values that it takes.

    Unit-variance noise, not zeros: GPUs multiply zeros faster than what will come.
    """
    return [
        torch.randn((batch, *tensor.shape), dtype=torch_dtype(tensor), device=device)
        if tensor.maximum is None
        else torch.full(
            (batch, *tensor.shape), min(1, tensor.maximum), dtype=torch_dtype(tensor), device=device
        )
        for tensor in spec.inputs
    ]


def boundary_bytes(spec: StageSpec, batch: int) -> int:
    """Size of a stage's inputs and outputs."""
    return sum(
        batch * torch_dtype(tensor).itemsize * int(torch.Size(tensor.shape).numel())
        for tensor in (*spec.inputs, *spec.outputs)
    )

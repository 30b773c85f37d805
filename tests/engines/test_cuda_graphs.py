"""CUDA graphs without a GPU: order, arithmetic and what is asked of CUDA, on stand-ins that record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import read_manifest
from engines.bundle.stages import Backend, StageName, StageSpec, TensorSpec
from engines.compile.export import example_inputs
from engines.runtime import pipeline as pipeline_module
from engines.runtime.cuda_graphs import (
    WARM_RUNS,
    GraphedEngine,
    TorchGraphs,
    boundary_bytes,
    capture_stages,
    plan_batches,
    static_inputs,
)
from engines.runtime.pipeline import Pipeline, Sample
from engines.runtime.stages import Stage

Outputs = tuple[Tensor, ...]


class CountingEngine:
    """Doubles its floats and adds its integers; knows how often it ran."""

    min_batch = 1

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self.batches: list[int] = []

    def __call__(self, inputs: Sequence[Tensor]) -> Outputs:
        floats, integers = inputs
        self.batches.append(floats.shape[0])
        return (floats * 2 + integers[:, None],)


class PlainGraph:
    """Replays by calling again, into the outputs of the capture, as a GPU would."""

    def __init__(self, device: RecordingDevice, body: Callable[[], Outputs]) -> None:
        self.outputs = body()
        self._device, self._body = device, body

    def replay(self) -> None:
        self._device.events.append("replay")
        with torch.inference_mode():  # a GPU writes there whoever made the tensors
            for static, fresh in zip(self.outputs, self._body(), strict=True):
                static.copy_(fresh)

    def reset(self) -> None:
        self._device.events.append("reset")


class RecordingDevice:
    """`GraphDevice` on the CPU. `times` answers `time_ms`: plain, graph, plain, graph, ..."""

    def __init__(self, times: Sequence[float] = (), refuse: Callable[[], bool] = lambda: False) -> None:
        self.events: list[str] = []
        self._times = iter(times)
        self._refuse = refuse

    def synchronize(self) -> None:
        self.events.append("synchronize")

    def capture(self, body: Callable[[], Outputs]) -> tuple[PlainGraph, Outputs]:
        self.events.append("capture")
        if self._refuse():
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        graph = PlainGraph(self, body)
        return graph, graph.outputs

    def time_ms(self, call: Callable[[], object]) -> float:
        call()
        return next(self._times, 1.0)


def make_spec(name: StageName = "denoise", width: int = 3, bucket: Bucket | None = None) -> StageSpec:
    return StageSpec(
        name=name,
        parts=("transformer",),
        bucket=bucket or Bucket(64, 64),
        inputs=(
            TensorSpec(name="latents", dtype="float32", shape=(width,)),
            TensorSpec(name="timestep", dtype="int64", shape=(), maximum=999),
        ),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=(width,)),),
    )


def make_stage(
    name: StageName = "denoise", width: int = 3, max_batch: int = 4
) -> tuple[Stage, CountingEngine]:
    engine = CountingEngine(max_batch)
    return Stage(make_spec(name, width), [engine], max_batch), engine


def expected(inputs: Sequence[Tensor]) -> Tensor:
    return inputs[0] * 2 + inputs[1][:, None]


def test_engine_is_warmed_up_twice_before_it_is_captured() -> None:
    stage, engine = make_stage()
    device = RecordingDevice()
    GraphedEngine(engine, static_inputs(stage.spec, 4, stage.device), 2, device)
    assert engine.batches[:WARM_RUNS] == [2, 2]
    assert device.events == ["synchronize", "capture"]


def test_replay_computes_with_new_inputs_and_never_overwrites_what_was_returned() -> None:
    stage, engine = make_stage()
    graphed = GraphedEngine(engine, static_inputs(stage.spec, 4, stage.device), 2, RecordingDevice())
    first, second = example_inputs(stage.spec, 2, seed=1), example_inputs(stage.spec, 2, seed=2)
    (kept,) = graphed(first)
    (other,) = graphed(second)
    assert torch.equal(kept, expected(first))
    assert torch.equal(other, expected(second))


def test_sizes_share_their_inputs_and_do_not_disturb_each_other() -> None:
    stage, engine = make_stage()
    buffers = static_inputs(stage.spec, 4, stage.device)
    small, large = (GraphedEngine(engine, buffers, batch, RecordingDevice()) for batch in (1, 4))
    four, one = example_inputs(stage.spec, 4, seed=1), example_inputs(stage.spec, 1, seed=2)
    (of_four,), (of_one,) = large(four), small(one)
    assert torch.equal(of_four, expected(four))
    assert torch.equal(of_one, expected(one))
    assert torch.equal(large(four)[0], expected(four))


def test_largest_is_captured_first_across_stages() -> None:
    denoise, _ = make_stage("denoise", width=10)
    decode, _ = make_stage("decode", width=1000)
    decisions = capture_stages([denoise, decode], [1, 2, 4], RecordingDevice())
    order = [(decision.stage, decision.batch) for decision in decisions]
    assert order == [(name, batch) for name in ("decode", "denoise") for batch in (4, 2, 1)]
    measured = {("denoise", Bucket(64, 64), 1): 1 << 40}
    decisions = capture_stages([denoise, decode], [1, 2, 4], RecordingDevice(), measured)  # type: ignore[arg-type]
    assert (decisions[0].stage, decisions[0].batch) == ("denoise", 1)


def test_graph_is_used_where_it_wins_and_given_up_where_it_does_not() -> None:
    stage, engine = make_stage()
    device = RecordingDevice(times=[8.0, 7.99, 4.0, 2.0, 3.0, 1.0])  # batches 4, 2, 1: plain, graph
    decisions = capture_stages([stage], [1, 2, 4], device)
    assert [(d.batch, d.plain_ms, d.graph_ms, d.used) for d in decisions] == [
        (4, 8.0, 7.99, False),
        (2, 4.0, 2.0, True),
        (1, 3.0, 1.0, True),
    ]
    assert device.events.count("reset") == 1
    assert [isinstance(stage.engine_for(batch)[0], GraphedEngine) for batch in (1, 2, 3, 4)] == [
        True,
        True,
        False,
        False,
    ]
    device.events.clear()
    for batch in (1, 2, 3, 4):
        inputs = example_inputs(stage.spec, batch, seed=batch)
        assert torch.equal(stage(*inputs)[0], expected(inputs))
    assert device.events == ["replay", "replay"]
    assert engine.batches[-2:] == [3, 4]


def test_padded_rows_never_change_real_ones() -> None:
    stage, _ = make_stage()
    device = RecordingDevice(times=[8.0, 2.0])  # batch 4 alone is captured, and beats any plain call
    capture_stages([stage], [4], device)
    assert [stage.engine_for(batch)[1] for batch in (1, 2, 3, 4)] == [4, 4, 4, 4]
    full = example_inputs(stage.spec, 4)
    (four,) = stage(*full)
    for batch in (1, 2, 3):
        (rows,) = stage(*(tensor[:batch] for tensor in full))
        assert torch.equal(rows, four[:batch])


def test_what_cannot_be_captured_is_called_plainly_and_says_why() -> None:
    stage, _ = make_stage()
    decisions = capture_stages([stage], [2], RecordingDevice(refuse=lambda: True))
    (decision,) = decisions
    assert (decision.used, decision.graph_ms) == (False, None)
    assert decision.reason == "cannot be captured: operation not permitted when stream is capturing"
    inputs = example_inputs(stage.spec, 2)
    assert torch.equal(stage(*inputs)[0], expected(inputs))


def test_memory_that_does_not_suffice_for_a_capture_is_an_error() -> None:
    stage, _ = make_stage()

    class Full(RecordingDevice):
        def capture(self, body: Callable[[], Outputs]) -> tuple[PlainGraph, Outputs]:
            raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        capture_stages([stage], [2], Full())


@pytest.mark.parametrize(
    ("plain", "graph", "plan"),
    [
        ({1: 5, 2: 5, 4: 6}, {1: 1, 2: 2, 4: 3}, {1: 1, 2: 2, 3: 4, 4: 4}),
        ({1: 5, 2: 10, 4: 20}, {4: 19}, {4: 4}),  # padding three or fewer would cost more than it saves
        ({1: 5, 2: 10, 4: 20}, {1: 4, 2: 9, 4: 14}, {1: 1, 2: 2, 3: 4, 4: 4}),
        ({1: 5, 2: 10, 4: 20}, {}, {}),
    ],
)
def test_batches_between_sizes_are_padded_where_that_is_faster(
    plain: dict[int, float], graph: dict[int, float], plan: dict[int, int]
) -> None:
    assert plan_batches(4, plain, graph) == plan


def test_static_inputs_are_values_that_the_stage_takes() -> None:
    floats, integers = static_inputs(make_spec(), 4, torch.device("cpu"))
    assert floats.shape == (4, 3)
    assert floats.std() > 0
    assert integers.tolist() == [1, 1, 1, 1]
    assert boundary_bytes(make_spec(), 2) == 2 * (3 * 4 + 8 + 3 * 4)


def test_every_stage_of_a_bundle_draws_the_same_captured(eager_bundle: Path) -> None:
    manifest = read_manifest(eager_bundle)
    pipeline = Pipeline.load(eager_bundle, backend=Backend.EAGER)
    stages = [pipeline.stage(spec.name, manifest.buckets[0]) for spec in manifest.stages]
    inputs = {spec.name: example_inputs(spec, 3) for spec in manifest.stages}
    plain = {name: pipeline.stage(name, manifest.buckets[0])(*given) for name, given in inputs.items()}
    # a graph that takes no time at all wins at every size
    device = RecordingDevice(times=[1.0, 0.0] * len(stages) * len(manifest.batch_sizes))
    decisions = capture_stages(stages, manifest.batch_sizes, device)
    assert all(decision.used for decision in decisions)
    for stage in stages:
        replayed = stage(*inputs[stage.spec.name])
        for ours, reference in zip(replayed, plain[stage.spec.name], strict=True):
            assert (ours.float() - reference.float()).abs().max() <= (
                1 if ours.dtype == torch.uint8 else 1e-5
            )


def test_pipeline_captures_when_it_warms_up_and_draws_the_same_pictures(
    eager_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            waits.append("synchronize")

    pipeline = Pipeline.load(eager_bundle, backend=Backend.EAGER)
    samples = [
        Sample(prompt=f"a {colour} cube", seed=seed, num_steps=steps, bucket=Bucket(64, 64))
        for seed, (colour, steps) in enumerate((("red", 4), ("blue", 1), ("green", 2)))
    ]
    plain = pipeline.run(samples)
    device = RecordingDevice(
        times=[1.0, 0.0] * len(pipeline.manifest.stages) * len(pipeline.manifest.batch_sizes)
    )
    monkeypatch.setattr(pipeline_module, "TorchGraphs", lambda _: device)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    pipeline.backend = Backend.AOTINDUCTOR  # eager code is not captured
    pipeline._stream = Stream()  # type: ignore[assignment]
    pipeline.warm_up()
    assert len(pipeline.graphs) == len(pipeline.manifest.stages) * len(pipeline.manifest.batch_sizes)
    device.events.clear()
    waits.clear()
    replayed = pipeline.run(samples)
    # text, four steps in which rows drop out, and decode: padded to what was captured, one graph each
    assert device.events == ["replay"] * 6
    assert len(waits) == 5  # text, and each step, after which a job may be cancelled
    for ours, theirs in zip(replayed, plain, strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2


def test_cuda_is_asked_for_one_pool_one_stream_and_thread_local_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []
    pools = iter([("pool", 1), ("pool", 2)])

    def record(graph: object, **options: object) -> AbstractContextManager[None]:
        asked.append({"graph": graph, **options})
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "a graph")
    monkeypatch.setattr(torch.cuda, "graph", record)
    graphs: Any = TorchGraphs("a stream")  # type: ignore[arg-type]
    body = (torch.ones(1),)
    assert graphs.capture(lambda: body) == ("a graph", body)
    graphs.capture(lambda: body)
    wanted = {"graph": "a graph", "pool": ("pool", 1), "stream": "a stream"}
    assert asked == [{**wanted, "capture_error_mode": "thread_local"}] * 2


@pytest.mark.gpu
def test_graphs_of_a_gpu_compute_what_plain_calls_compute() -> None:
    device = torch.device("cuda", 0)
    engine = CountingEngine(4)
    stage = Stage(make_spec(), [engine], 4, device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        decisions = capture_stages([stage], [1, 2, 4], TorchGraphs(stream))
        assert all(decision.graph_ms is not None for decision in decisions)
        for batch in (1, 2, 3, 4):
            inputs = tuple(tensor.to(device) for tensor in example_inputs(stage.spec, batch))
            (found,) = stage(*inputs)
            torch.testing.assert_close(found, expected(inputs))

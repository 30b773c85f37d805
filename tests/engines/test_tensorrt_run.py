"""A TensorRT plan that runs, on the stand-in: calls, scratch, streams, and the stand-in itself."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.bundle.manifest import read_manifest
from engines.bundle.stages import StageSpec, TensorSpec
from engines.errors import BackendUnavailable, BundleError
from engines.runtime.tensorrt import Scratch, TensorRtStages
from tests.engines import fake_tensorrt
from tests.engines.plans import CPU, NEWEST, OLDEST, engine_of, text_inputs

pytestmark = pytest.mark.timeout(2400)


def test_run_sets_everything_once_per_batch_size_and_the_inputs_each_time(
    fake: Any, both_bundle: Path
) -> None:
    manifest, engine = read_manifest(both_bundle), engine_of(both_bundle)
    assert engine.scratch_bytes == 3 * fake_tensorrt.SCRATCH_PER_ROW
    assert engine.weight_bytes == manifest.files[manifest.engines[0].path].size_bytes
    fake.calls.clear()
    engine(text_inputs(manifest, 2))
    names = [name.partition(".")[2] for name, _ in fake.calls]
    assert names == [
        "create_execution_context",
        "get_device_memory_size_for_profile_v2",
        "set_device_memory",
        "set_optimization_profile_async",
        "set_input_shape",
        "set_input_shape",
        "infer_shapes",
        "get_tensor_shape",
        "set_tensor_address",
        "set_tensor_address",
        "set_tensor_address",
        "execute_async_v3",
    ]
    fake.calls.clear()
    engine(text_inputs(manifest, 2))
    again = [name.partition(".")[2] for name, _ in fake.calls]
    assert again == ["set_tensor_address", "set_tensor_address", "execute_async_v3"]


@pytest.mark.usefixtures("fake")
def test_results_stay_when_the_engine_runs_again(both_bundle: Path) -> None:
    manifest, engine = read_manifest(both_bundle), engine_of(both_bundle)
    first = engine(text_inputs(manifest, 2))[0]
    kept = first.clone()
    other = text_inputs(manifest, 2)
    other[0] = other[0].flip(0)
    engine(other)
    assert torch.equal(first, kept)


def test_scratch_is_aligned_and_shared_by_all_engines_of_a_bundle(fake: Any, both_bundle: Path) -> None:
    manifest = read_manifest(both_bundle)
    stages = TensorRtStages(both_bundle, manifest, CPU)
    loaded = [stages.load(spec) for spec in manifest.stages]
    from engines.compile.export import example_inputs

    for stage in loaded:
        for batch in (1, 2):
            stage(*example_inputs(stage.spec, batch))
    given = [arguments for name, arguments in fake.calls if name == "IExecutionContext.set_device_memory"]
    assert len({address for address, _ in given}) == 1
    assert given[0][0] % 256 == 0
    assert {size for _, size in given} == {1000, 3000}


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("execute_async_v3", "refused to run"),
        ("set_tensor_address", "refused the address of text"),
        ("set_input_shape", r"refused input_ids of shape \(2, 20\)"),
        ("set_optimization_profile_async", "refused profile 1"),
        ("infer_shapes", "refused shapes without latents"),
        ("create_execution_context", "refused an execution context"),
    ],
)
def test_refusal_at_a_run_is_an_error(fake: Any, both_bundle: Path, failing: str, message: str) -> None:
    engine = engine_of(both_bundle)
    fake.fail.add(failing)
    with pytest.raises(RuntimeError, match=rf"engines/text-\w+\.plan: TensorRT {message}"):
        engine(text_inputs(read_manifest(both_bundle), 2))


@pytest.mark.parametrize("fake", [NEWEST], indirect=True)
@pytest.mark.usefixtures("fake")
def test_plan_of_another_tensorrt_does_not_load(both_bundle: Path) -> None:
    with pytest.raises(
        BackendUnavailable, match=f"does not load: .*made by {OLDEST}; build the bundle again"
    ):
        engine_of(both_bundle)


@pytest.mark.usefixtures("fake")
def test_plan_that_is_not_the_manifests_is_refused(both_bundle: Path) -> None:
    spec = read_manifest(both_bundle).stages[0]
    other = StageSpec.model_validate(
        {
            **spec.model_dump(),
            "outputs": (TensorSpec(name="text", dtype="float16", shape=spec.outputs[0].shape),),
        }
    )
    with pytest.raises(
        BundleError, match=r"its outputs are \{'text': 'float32'\}, not \{'text': 'float16'\}"
    ):
        engine_of(both_bundle, spec=other)
    with pytest.raises(BundleError, match="has 2 profiles, 1 expected"):
        engine_of(both_bundle, ranges=((1, 3),))
    with pytest.raises(BundleError, match="needs 3000 bytes of scratch, the manifest says 10"):
        engine_of(both_bundle, scratch=Scratch(10, CPU))


@pytest.mark.usefixtures("fake")
def test_batch_beyond_the_profiles_is_refused(both_bundle: Path) -> None:
    manifest, engine = read_manifest(both_bundle), engine_of(both_bundle)
    with pytest.raises(ValueError, match="takes batches of 1 to 3, not 4"):
        engine(text_inputs(manifest, 4))


# --- streams, on stand-ins: there is no GPU ---


class RecordedStream:
    """A CUDA stream's handle, and whom it waits for."""

    def __init__(self, handle: int, waits: list[tuple[int, int]]) -> None:
        self.cuda_stream, self._waits = handle, waits

    def wait_stream(self, other: RecordedStream) -> None:
        self._waits.append((self.cuda_stream, other.cuda_stream))


def test_scratch_is_handed_from_stream_to_stream_in_order() -> None:
    waits: list[tuple[int, int]] = []
    first, second = RecordedStream(1, waits), RecordedStream(2, waits)
    scratch: Any = Scratch(10, CPU)
    for stream in (first, first, second, second, first):
        scratch.claim(stream)
    assert waits == [(2, 1), (1, 2)]


@pytest.mark.parametrize(
    ("current", "ran_on", "waited"), [(5, 5, []), (0, 7, [(7, 0), (0, 7)])], ids=["own", "default"]
)
def test_plan_runs_on_the_current_stream_and_never_on_the_default_one(
    fake: Any,
    both_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    current: int,
    ran_on: int,
    waited: list[tuple[int, int]],
) -> None:
    waits: list[tuple[int, int]] = []
    streams = {handle: RecordedStream(handle, waits) for handle in (0, 5, 7)}
    engine: Any = engine_of(both_bundle)
    inputs = text_inputs(read_manifest(both_bundle), 2)
    expected = engine(inputs)
    engine._device = SimpleNamespace(type="cuda")
    engine._scratch.__dict__["stream"] = streams[7]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams[current])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: streams[0])
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    fake.calls.clear()
    (made,) = engine(inputs)
    assert torch.equal(made, expected[0])
    assert [handles for name, handles in fake.calls if name.endswith("execute_async_v3")] == [(ran_on,)]
    assert waits == waited


# --- the stand-in itself ---


def test_stand_in_refuses_what_the_wheels_do_not_have() -> None:
    old, new = fake_tensorrt.make(OLDEST), fake_tensorrt.make(NEWEST)
    logger = type("Log", (old.ILogger,), {"log": lambda *_: None})()
    builder = old.Builder(logger)
    with pytest.raises(AttributeError, match=r"no Builder\.build_cuda_engine"):
        _ = builder.build_cuda_engine
    with pytest.raises(TypeError, match=r"Builder\.create_network"):
        builder.create_network(0, 1)
    with pytest.raises(fake_tensorrt.OrderError, match="weakly typed"):
        builder.create_network(0)
    with pytest.raises(AttributeError, match="cannot set"):
        builder.logger = logger
    assert old.BuilderFlag.FP16.value == 0
    with pytest.raises(AttributeError, match="BuilderFlag has no FP16"):
        _ = new.BuilderFlag.FP16


def test_stand_in_wants_profile_shapes_scratch_and_addresses_before_a_run(
    fake: Any, both_bundle: Path
) -> None:
    engine = engine_of(both_bundle)._engine
    strategy = fake.ExecutionContextAllocationStrategy.USER_MANAGED
    scratch = Scratch(3000, CPU)
    context = engine.create_execution_context(strategy)
    with pytest.raises(fake_tensorrt.OrderError, match="before the profile"):
        context.set_input_shape("mask", (1, 20))
    context.set_optimization_profile_async(0, 0)
    with pytest.raises(fake_tensorrt.OrderError, match="before profile and shapes"):
        context.execute_async_v3(0)
    assert not context.set_input_shape("mask", (2, 20))
    for name in ("input_ids", "mask"):
        assert context.set_input_shape(name, (1, 20))
    assert context.infer_shapes() == []
    with pytest.raises(fake_tensorrt.OrderError, match="without enough scratch"):
        context.execute_async_v3(0)
    context.set_device_memory(scratch.address, 1000)
    with pytest.raises(fake_tensorrt.OrderError, match="without the addresses"):
        context.execute_async_v3(0)

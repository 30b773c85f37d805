"""From a stage to a TensorRT plan, on the stand-in: order of calls, refusals, timings, keys, reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.compile.plan_report import read_plan_report
from engines.compile.tensorrt import compile_plan, network_flags, plan_key, timing_cache_file
from engines.errors import CompileError
from tests.engines import fake_tensorrt
from tests.engines.plans import NEWEST, OLDEST, job_for, with_gpu

pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module")
def exported_text(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engines.compile.tensorrt import _export

    root = tmp_path_factory.mktemp("text")
    return _export(job_for(tiny_student, root), root / "stage.onnx")


@pytest.mark.parametrize("fake", fake_tensorrt.VERSIONS, indirect=True)
def test_plan_is_built_in_the_order_that_every_version_allows(
    fake: Any, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported_text: Path
) -> None:
    monkeypatch.setattr("engines.compile.tensorrt.export_onnx", lambda *_, **__: exported_text)
    job = job_for(tiny_student, tmp_path, workspace_bytes=1 << 30)
    engine = compile_plan(job)
    names = [name for name, _ in fake.calls]
    order = [
        "Builder.create_network",
        "OnnxParser.parse_from_file",
        "Builder.create_builder_config",
        "IBuilderConfig.builder_optimization_level",
        "IBuilderConfig.profiling_verbosity",
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.clear_flag",
        "IBuilderConfig.add_optimization_profile",
        "IBuilderConfig.set_timing_cache",
        "Builder.build_serialized_network",
        "Runtime.deserialize_cuda_engine",
        "EngineInspector.get_engine_information",
    ]
    assert sorted(order, key=names.index) == order
    assert names.count("IBuilderConfig.add_optimization_profile") == 3
    profiles = [arguments for name, arguments in fake.calls if name == "IOptimizationProfile.set_shape"]
    assert [shapes[1:] for shapes in profiles if shapes[0] == "mask"] == [
        ((1, 20), (1, 20), (1, 20)),
        ((2, 20), (2, 20), (2, 20)),
        ((3, 20), (4, 20), (4, 20)),
    ]
    assert engine.profiles == ((1, 1), (2, 2), (3, 4))
    assert engine.fused_attention == 2  # T5 has two layers

    fake.calls.clear()
    assert compile_plan(job) == engine  # what is there is not built again
    assert fake.calls == []


def test_network_is_strongly_typed_in_every_version() -> None:
    flags = {version: network_flags(fake_tensorrt.make(version)) for version in fake_tensorrt.VERSIONS}
    assert {flag for version, flag in flags.items() if version.startswith("11.")} == {0}
    assert {flag for version, flag in flags.items() if version.startswith("10.")} == {2}
    with pytest.raises(AttributeError, match="no EXPLICIT_BATCH"):
        _ = fake_tensorrt.make(NEWEST).NetworkDefinitionCreationFlag.EXPLICIT_BATCH


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("build_serialized_network", r"did not build a plan: a tactic was skipped \| Could not find any"),
        ("parse_from_file", r"cannot read the ONNX file: Det \(node node_det\): no importer"),
        ("add_optimization_profile", r"refused batches of 1 to 1: TensorRT gave no reason"),
    ],
)
def test_refusal_is_a_compile_error_in_tensorrts_words(
    fake: Any,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exported_text: Path,
    failing: str,
    message: str,
) -> None:
    monkeypatch.setattr("engines.compile.tensorrt.export_onnx", lambda *_, **__: exported_text)
    fake.fail.add(failing)
    with pytest.raises(CompileError, match=f"^stage text: TensorRT {message}"):
        compile_plan(job_for(tiny_student, tmp_path))
    assert [path.name for path in (tmp_path / "engines").iterdir()] == []


@pytest.mark.usefixtures("fake")
def test_float8_has_no_plans(tiny_student: Path, tmp_path: Path) -> None:
    job = job_for(tiny_student, tmp_path)
    spec = job.spec.model_copy(update={"compute_dtype": "float8"})
    with pytest.raises(CompileError, match="use --precision bf16"):
        compile_plan(replace(job, spec=spec))


def test_timings_are_kept_for_one_kind_of_gpu_and_one_tensorrt(
    fake: Any, tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported_text: Path
) -> None:
    monkeypatch.setattr("engines.compile.tensorrt.export_onnx", lambda *_, **__: exported_text)
    job = job_for(tiny_student, tmp_path)
    compile_plan(job)
    cache = timing_cache_file(job)
    assert cache.name == f".timing-nvidia-h200-9.0-{OLDEST}.cache"
    assert cache.read_bytes() == b"timed"
    other = replace(job, platform=with_gpu(gpu="NVIDIA L4", compute_capability="8.9"))
    assert timing_cache_file(other) != cache

    def given() -> list[bytes]:
        return [bytes(blobs[0]) for name, blobs in fake.calls if name == "IBuilderConfig.create_timing_cache"]

    fake.calls.clear()
    compile_plan(replace(job, optimization_level=3))
    assert given() == [b"timed"]
    cache.write_bytes(b"of another version")
    fake.calls.clear()
    compile_plan(replace(job, optimization_level=2))
    assert given() == [b"of another version", b""]


def test_key_of_a_plan_follows_all_that_is_in_it(tiny_student: Path, tmp_path: Path) -> None:
    job = job_for(tiny_student, tmp_path / "one")
    key = plan_key(job)
    assert key == plan_key(job_for(tiny_student, tmp_path / "two"))
    changed = [
        replace(job, batch_sizes=(1, 2)),
        replace(job, optimization_level=3),
        replace(job, workspace_bytes=1),
        replace(job, platform=with_gpu(gpu="NVIDIA L4")),
        replace(job, platform=with_gpu(tensorrt="11.1.0.106")),
        replace(job, spec=job.spec.model_copy(update={"compute_dtype": "bfloat16"})),
    ]
    weights = job_for(tiny_student, tmp_path / "three")
    file = next((weights.bundle / "checkpoint" / "text_encoder").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert len({key, plan_key(weights), *map(plan_key, changed)}) == len(changed) + 2


@pytest.mark.parametrize(
    ("layers", "fused", "softmaxes"),
    [
        ([{"Name": "_gemm_mha_v2_myl0_4", "LayerType": "kgen"}, {"Name": "x", "LayerType": "gemm"}], 1, 0),
        ([{"Name": "x", "LayerType": "kgen", "TacticName": "sm90_fmha_v2_flash"}], 1, 0),
        ([{"Name": "x", "LayerType": "Softmax"}, {"Name": "y", "LayerType": "MatrixMultiply"}], 0, 1),
        (["_gemm_mha_v2_myl0_4"], None, 0),
    ],
)
def test_report_tells_whether_attention_is_fused(
    layers: list[Any], fused: int | None, softmaxes: int
) -> None:
    report = read_plan_report(json.dumps({"Layers": layers, "Bindings": []}))
    assert (report.fused_attention, report.softmaxes, report.num_layers) == (fused, softmaxes, len(layers))


@pytest.mark.parametrize("text", ["", "[]", '{"Layers": 3}'])
def test_report_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="engine inspector's report"):
        read_plan_report(text)

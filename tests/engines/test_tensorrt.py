"""TensorRT from module to result, on a stand-in that has exactly what the real bindings have.

The stand-in (`fake_tensorrt.py`) is made of recordings of the released wheels and computes with ONNX Runtime.
What it cannot tell is whether TensorRT builds these networks, and how fast they are.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from engines.__main__ import main
from engines.bundle import platform as platform_module
from engines.bundle.bucket import Bucket
from engines.bundle.integrity import check_platform, verify_files
from engines.bundle.manifest import Manifest, read_manifest
from engines.bundle.platform import Platform, compare_for_plan, current_platform
from engines.bundle.stages import Backend, StageSpec, TensorSpec
from engines.compile import build as build_module
from engines.compile.backends import COMPILERS
from engines.compile.build import build_bundle, num_pieces
from engines.compile.needed import reason_to_build
from engines.compile.plan_report import read_plan_report
from engines.compile.progress import BuildProgress
from engines.compile.tensorrt import PlanJob, compile_plan, network_flags, plan_key, timing_cache_file
from engines.compile.verify import verify_bundle
from engines.errors import BackendUnavailable, BundleError, CompileError
from engines.runtime.memory import plan_memory
from engines.runtime.pipeline import Pipeline, Sample
from engines.runtime.tensorrt import Scratch, TensorRtEngine, TensorRtStages, import_tensorrt
from tests.engines import fake_tensorrt
from tests.engines.conftest import build_settings

pytestmark = pytest.mark.timeout(900)

CPU = torch.device("cpu")
BUCKET = Bucket(64, 64)
OLDEST, NEWEST = fake_tensorrt.VERSIONS[0], fake_tensorrt.VERSIONS[-1]
BATCHES = (1, 3)


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in as the module that `import tensorrt` finds; the oldest version unless the test says."""
    version = getattr(request, "param", OLDEST)
    module = fake_tensorrt.make(version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(platform_module, "tensorrt_version", lambda: version)
    return module


def with_gpu(**fields: str) -> Platform:
    gpu = {
        "gpu": "NVIDIA H200",
        "compute_capability": "9.0",
        "driver": "580.95.05",
        "tensorrt": OLDEST,
        **fields,
    }
    return current_platform().model_copy(update=gpu)


@pytest.fixture(scope="module")
def both_bundle(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of plans and nothing else, built with the oldest version; do not write to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", fake_tensorrt.make(OLDEST))
        compiler = replace(COMPILERS[Backend.TENSORRT], check=lambda _: None)  # there is no GPU
        patch.setitem(COMPILERS, Backend.TENSORRT, compiler)
        patch.setattr(
            build_module,
            "current_platform",
            lambda _: current_platform().model_copy(update={"tensorrt": OLDEST}),
        )
        settings = replace(
            build_settings(tiny_student, tmp_path_factory.mktemp("plans") / "bundle"),
            backends=(Backend.TENSORRT,),
            batch_sizes=BATCHES,
            precision="fp32",
        )
        console = Console(record=True, width=300)
        with BuildProgress(console, num_pieces(settings)) as progress:
            build_bundle(settings, progress)
        text = console.export_text()
    assert "never run on a GPU" in text
    pieces = re.findall(r"\[(\d+)/(\d+)\]", text)
    assert pieces[-1][0] == pieces[-1][1]
    return settings.out


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has the version that the plans were built with."""
    from engines.bundle import integrity

    def platform(*_: object) -> Platform:
        return current_platform().model_copy(update={"tensorrt": platform_module.tensorrt_version()})

    monkeypatch.setattr(integrity, "current_platform", platform)


# --- a bundle of plans ---


def test_bundle_of_plans_says_what_it_holds(both_bundle: Path) -> None:
    manifest = verify_files(both_bundle)
    assert (manifest.backend, manifest.compiled_backends) == ("tensorrt", ["tensorrt"])
    assert [engine.stage for engine in manifest.engines] == ["text", "denoise", "decode"]
    for engine in manifest.engines:
        assert engine.profiles == ((1, 1), (2, 3))
        assert (engine.min_batch, engine.max_batch, engine.constants) == (1, 3, "")
        assert engine.scratch_bytes == 3 * fake_tensorrt.SCRATCH_PER_ROW
        assert engine.fused_attention is not None
        assert OLDEST in engine.verified_on
        report = json.loads((both_bundle / engine.report).read_text())
        assert report["tensorrt"] == OLDEST
        assert report["inspector"]["Layers"]
    assert {(row.stage, row.batch, row.backend) for row in manifest.parity} == {
        (stage, batch, "tensorrt") for stage in ("text", "denoise", "decode") for batch in BATCHES
    }
    assert all(row.cosine > 0.999999 for row in manifest.parity)
    hidden = [path.name for path in both_bundle.rglob(".*")]
    assert hidden == [f".timing-{OLDEST}.cache"]


@pytest.mark.usefixtures("here", "fake")
def test_bundle_of_plans_draws_what_eager_draws(both_bundle: Path) -> None:
    pipeline, eager = Pipeline.load(both_bundle), Pipeline.load(both_bundle, backend=Backend.EAGER)
    assert (pipeline.backend, pipeline.warnings) == ("tensorrt", [])
    samples = [
        Sample(prompt="a red cube", seed=1, num_steps=4, bucket=BUCKET),
        Sample(prompt="two blue cones", seed=2, num_steps=1, bucket=BUCKET),
    ]
    for drawn, reference in zip(pipeline.run(samples), eager.run(samples), strict=True):
        assert np.abs(drawn.astype(int) - reference.astype(int)).max() <= 2
    pipeline.warm_up()


@pytest.mark.usefixtures("here", "fake")
def test_verification_repeats_the_parity_check(both_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = verify_bundle(both_bundle)
    assert (verdict.fitting, verdict.mismatches) == (["tensorrt"], [])
    assert len(verdict.parity) == 3 * len(BATCHES)
    assert main(["inspect", str(both_bundle)]) == 0
    assert "tensorrt" in capsys.readouterr().out


def test_memory_of_plans_is_their_files_and_one_scratch(both_bundle: Path) -> None:
    manifest = read_manifest(both_bundle)
    lines = {
        line.what: line.size_bytes for line in plan_memory(both_bundle, manifest, Backend.TENSORRT).lines
    }
    assert lines["scratch of the plans"] == 3 * fake_tensorrt.SCRATCH_PER_ROW
    weights = sum(size for what, size in lines.items() if what.startswith("weights of"))
    assert weights == sum(manifest.files[engine.path].size_bytes for engine in manifest.engines)


@pytest.mark.usefixtures("here")
def test_next_backend_serves_where_the_first_does_not_fit(
    both_bundle: Path, compiled_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans are listed first, packages second; without TensorRT the packages serve and the reason is told."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    plans, packages = read_manifest(both_bundle), read_manifest(compiled_bundle)
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    shutil.copytree(both_bundle / "engines", bundle / "engines", dirs_exist_ok=True)
    data = packages.model_copy(
        update={
            "engines": [*plans.engines, *packages.engines],
            "platform": packages.platform.model_copy(update={"tensorrt": OLDEST}),
            "files": packages.files | {name: one for name, one in plans.files.items() if "engines/" in name},
        }
    )
    (bundle / "manifest.json").write_text(data.model_dump_json())
    pipeline = Pipeline.load(bundle)
    assert pipeline.backend == "aotinductor"
    (warning,) = pipeline.warnings
    assert warning.startswith(
        f"compiled code does not fit this machine (platform.tensorrt: built with {OLDEST}"
    )
    assert warning.endswith("or build the bundle again); aotinductor serves instead")
    with pytest.raises(BackendUnavailable, match=r"platform\.tensorrt"):
        Pipeline.load(bundle, backend=Backend.TENSORRT)
    assert [mismatch.field for mismatch in verify_bundle(bundle).mismatches] == ["tensorrt"]
    assert verify_bundle(bundle).fitting == ["aotinductor"]


def test_backend_that_a_bundle_lacks_is_refused_by_name(compiled_bundle: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no tensorrt engines, only aotinductor; build it with"):
        Pipeline.load(compiled_bundle, backend=Backend.TENSORRT)


# --- platform ---


@pytest.mark.parametrize(
    ("field", "here"),
    [("gpu", "NVIDIA L4"), ("compute_capability", "8.9"), ("tensorrt", "11.1.0.106"), ("driver", "570.1")],
)
def test_plan_of_another_gpu_or_tensorrt_is_refused_with_field_and_remedy(field: str, here: str) -> None:
    (mismatch,) = compare_for_plan(with_gpu(), with_gpu(**{field: here}))
    assert mismatch.field == field
    assert here in str(mismatch)
    assert re.search("build the bundle", str(mismatch))


def test_plan_does_not_ask_for_a_torch_or_a_cpu() -> None:
    built = with_gpu().model_copy(update={"torch": "1.0", "cpu_flags": ("avx4096",), "libc": "glibc 9"})
    assert compare_for_plan(built, with_gpu(driver="590.1")) == []


def test_bundle_is_judged_by_the_backend_that_is_asked_for(both_bundle: Path) -> None:
    manifest = read_manifest(both_bundle)
    elsewhere = manifest.platform.model_copy(update={"torch": "1.0"})
    assert check_platform(manifest, elsewhere) == []
    assert [one.field for one in check_platform(manifest, elsewhere, Backend.AOTINDUCTOR)] == ["torch"]


def test_bundle_with_other_backends_is_built_anew(
    tiny_student: Path, both_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.compile import needed

    platform = read_manifest(both_bundle).platform
    monkeypatch.setattr(needed, "current_platform", lambda *_: platform)

    def reason(*backends: Any) -> str | None:
        return reason_to_build(
            tiny_student,
            both_bundle,
            batch_sizes=BATCHES,
            backends=backends,
            num_threads=1,
            decode_dtype="auto",
        )

    assert reason("tensorrt") is None
    assert reason("tensorrt", "aotinductor") == "its engines are tensorrt"


# --- absence ---


def test_asking_for_tensorrt_where_there_is_none_is_an_error_with_the_remedy(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    command = ["build", str(tiny_student), "--out", str(tmp_path / "bundle"), "--backends", "tensorrt"]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error[backend_unavailable]: tensorrt is not to be had here")
    assert "install the extra tensorrt" in error
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("fake")
def test_plans_are_not_built_for_a_cpu(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(tiny_student), "--out", str(tmp_path / "bundle"), "--device", "cpu"]
    assert main([*command, "--backends", "tensorrt,aotinductor"]) == 2
    assert "plans run on a GPU; use --device cuda" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["8.6.1", "10.14.1", "12.0.0"])
def test_version_that_nobody_checked_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_tensorrt.make(OLDEST)
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(BackendUnavailable, match=f"tensorrt {version} is not supported"):
        import_tensorrt()


# --- building ---


def job_for(student: Path, root: Path, **fields: Any) -> PlanJob:
    """A plan of the text stage, which is exported in seconds."""
    from engines.families.spec import get_family
    from engines.families.student import read_student

    if not (root / "checkpoint").exists():
        shutil.copytree(student, root / "checkpoint")
    spec = next(
        one for one in get_family("pixart").stages(student, read_student(student)) if one.name == "text"
    )
    values = {
        "family": "pixart",
        "spec": spec,
        "batch_sizes": (1, 2, 4),
        "bundle": root,
        "platform": with_gpu(),
    }
    return PlanJob(**{**values, **fields})


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


@pytest.fixture(scope="module")
def exported_text(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from engines.compile.tensorrt import _export

    root = tmp_path_factory.mktemp("text")
    return _export(job_for(tiny_student, root), root / "stage.onnx")


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


# --- running ---


def engine_of(bundle: Path, stage: str = "text", **fields: Any) -> TensorRtEngine:
    manifest = read_manifest(bundle)
    engine = next(one for one in manifest.engines if one.stage == stage)
    spec = next(one for one in manifest.stages if one.name == stage)
    values = {
        "plan": (bundle / engine.path).read_bytes(),
        "name": engine.path,
        "spec": spec,
        "ranges": engine.profiles,
        "scratch": Scratch(engine.scratch_bytes, CPU),
        "device": CPU,
    }
    return TensorRtEngine(**{**values, **fields})


def text_inputs(manifest: Manifest, batch: int) -> list[torch.Tensor]:
    from engines.compile.export import example_inputs

    return list(example_inputs(manifest.stages[0], batch, seed=batch))


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

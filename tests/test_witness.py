"""The TensorRT witness as far as a CPU goes: its pack, its judgement, and that it needs nothing of ours."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.families.spec import get_family
from engines.families.student import read_student
from loadtests.witness.pack import lower, write_pack, write_stage
from loadtests.witness.tensorrt import judge
from tests.engines.ort import session_of
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox

pytestmark = pytest.mark.timeout(2400)

RUNNER = Path(__file__).parent.parent / "loadtests" / "witness" / "tensorrt.py"


def outputs_of(folder: Path, batch: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What ONNX Runtime makes of a stage, and what the pack holds."""
    session = session_of(folder / "stage.onnx")
    with np.load(folder / f"{batch}.npz") as file:
        arrays = dict(file)
    fed = {one.name: arrays[f"in_{one.name}"] for one in session.get_inputs()}
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, fed), strict=True)), arrays


@pytest.mark.slow
def test_pack_of_a_student_computes_what_eager_computes(tmp_path: Path) -> None:
    student = make_tiny_checkpoint(tmp_path / "student")
    names = write_pack([student], tmp_path / "pack", [1, 2])
    assert names == ["tiny-text", "tiny-denoise-64x64", "tiny-decode-64x64"]
    described = json.loads((tmp_path / "pack" / "pack.json").read_text())
    assert described == {"stages": names, "batches": [1, 2]}
    for name in names:
        model = onnx.load(str(tmp_path / "pack" / name / "stage.onnx"))
        assert (model.opset_import[0].version, model.ir_version) == (17, 8)
        for batch in (1, 2):
            verdict = judge(*outputs_of(tmp_path / "pack" / name, batch), "fp32")
            assert verdict["passed"], (name, batch, verdict)


@pytest.mark.slow
def test_stage_with_convolutions_over_time_is_lowered_too(tmp_path: Path) -> None:
    student = make_tiny_cogvideox(tmp_path / "student")
    spec = get_family("cogvideox").stages(student, read_student(student))[1]
    write_stage(student, spec, "cogvideox", tmp_path / "denoise", [2])
    assert judge(*outputs_of(tmp_path / "denoise", 2), "fp32")["passed"]


def test_reduction_over_axes_that_are_not_constant_is_refused() -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"], "mean")],
        "small",
        [value("x", TensorProto.FLOAT, [2, 4]), value("axes", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    with pytest.raises(ValueError, match="ReduceMean mean: its axes are not constant"):
        lower(model)


@pytest.mark.parametrize(
    ("array", "precision", "passed"),
    [
        ([[1.0, 2.0]], "fp32", True),
        ([[2.0, 1.0]], "fp16", False),
        ([[float("nan"), 2.0]], "fp16", False),
    ],
)
def test_judgement_is_of_the_cosine_and_refuses_what_is_not_finite(
    array: list[list[float]], precision: str, passed: bool
) -> None:
    verdict = judge({"y": np.array(array)}, {"out_y": np.array([[1.0, 2.0]])}, precision)
    assert verdict["passed"] is passed


def test_judgement_of_pixels_is_of_each() -> None:
    expected = np.full((1, 100), 100, dtype=np.uint8)
    moved = expected.copy()
    moved[0, 0] += 9
    assert not judge({"y": moved}, {"out_y": expected}, "fp16")["passed"]
    moved[0, 0] -= 1
    assert judge({"y": moved}, {"out_y": expected}, "fp16")["passed"]


def test_witness_runs_on_python_3_10_and_imports_numpy_and_tensorrt_alone() -> None:
    tree = ast.parse(RUNNER.read_text(encoding="utf-8"), feature_version=(3, 10))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
        )
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy", "tensorrt"}


def test_witness_says_where_there_is_no_tensorrt(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.witness.tensorrt", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tensorrt is not to be had here")

"""Every stage of every family as ONNX: valid, readable by TensorRT's parser, and the same numbers as eager.

ONNX Runtime on a CPU computes the numbers. It has no bfloat16 there, so such a file is run with every
bfloat16 made float32, and compared with a module in float32 whose weights were rounded to bfloat16: the same
graph and weights on both sides, without the roundings in between.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from engines.bundle.stages import StageSpec, TensorSpec
from engines.compile.export import example_inputs
from engines.compile.onnx_export import (
    OPSET,
    check_onnx,
    export_onnx,
    supported_operators,
    unsupported,
)
from engines.compile.parity import compare
from engines.errors import CompileError
from engines.families.spec import get_family
from engines.families.student import read_student
from tests.engines.ort import session_of
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox, make_tiny_sdxl

pytestmark = pytest.mark.timeout(1800)

MAKERS: dict[str, Callable[[Path], Path]] = {
    "pixart": make_tiny_checkpoint,
    "sdxl": make_tiny_sdxl,
    "cogvideox": make_tiny_cogvideox,
}
STAGES = ("text", "denoise", "decode")
MAX_BATCH = 4
EVERY_STAGE = [(family, stage) for family in MAKERS for stage in STAGES]

# what the worst row's cosine may lack, and how many of 255 a pixel may move
TOLERANCES = {torch.float32: (1e-9, 1), torch.float16: (1e-5, 4), torch.bfloat16: (1e-6, 2)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make(root / family) for family, make in MAKERS.items()}


def load(checkpoint: Path, family: str, stage: str, dtype: torch.dtype) -> tuple[nn.Module, StageSpec]:
    spec = next(
        one for one in get_family(family).stages(checkpoint, read_student(checkpoint)) if one.name == stage
    )
    return get_family(family).load_stage(checkpoint, spec, dtype), spec


def reference_of(checkpoint: Path, family: str, stage: str, dtype: torch.dtype) -> nn.Module:
    """What a file of `dtype` is compared with."""
    if dtype != torch.bfloat16:
        return load(checkpoint, family, stage, dtype)[0]
    module, _ = load(checkpoint, family, stage, torch.float32)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype).float())
    return module


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with float32 wherever it has bfloat16."""

    def widen(tensor: TensorProto) -> None:
        if tensor.data_type == TensorProto.BFLOAT16:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))

    graph = model.graph
    for tensor in graph.initializer:
        widen(tensor)
    for value in graph.value_info:
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widen(attribute.t)
            elif node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    return model


def opened(path: Path, spec: StageSpec) -> onnxruntime.InferenceSession:
    session = session_of(widened(onnx.load(str(path))).SerializeToString())
    assert [one.name for one in session.get_outputs()] == [one.name for one in spec.outputs]
    return session


def run(session: onnxruntime.InferenceSession, spec: StageSpec, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    fed = {one.name: tensor.numpy() for one, tensor in zip(spec.inputs, inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, fed)]


def check_stage(
    path: Path, module: nn.Module, reference: nn.Module, spec: StageSpec, dtype: torch.dtype
) -> None:
    """A file against its module: one batch dimension, the spec's types, and the reference's numbers."""
    model = onnx.load(str(path))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert not model.functions
    for value, tensor_spec in zip(
        (*model.graph.input, *model.graph.output), (*spec.inputs, *spec.outputs), strict=True
    ):
        tensor = value.type.tensor_type
        dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        assert (value.name, dims) == (tensor_spec.name, ["batch", *tensor_spec.shape])
        assert helper.tensor_dtype_to_np_dtype(tensor.elem_type) == np.dtype(tensor_spec.dtype)
    floats = {
        one.data_type
        for one in model.graph.initializer
        if one.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
        and len(one.dims) > 1
    }
    # the published autoencoders of SDXL and CogVideoX overflow in float16, so their wrappers stay in float32
    weights = next(tensor for tensor in module.parameters() if tensor.ndim > 1).dtype
    names = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
    assert names[str(weights).removeprefix("torch.")] in floats

    max_loss, max_pixels = TOLERANCES[dtype]
    session = opened(path, spec)
    for batch in (1, 3, MAX_BATCH):
        inputs = example_inputs(spec, batch, seed=batch)
        with torch.no_grad():
            expected = reference(*inputs)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        for ours, theirs, output in zip(expected, run(session, spec, inputs), spec.outputs, strict=True):
            assert theirs.dtype == ours.dtype
            found = compare(ours, theirs)
            assert found.finite
            assert found.cosine >= 1 - (1e-6 if output.dtype == "uint8" else 0) - max_loss, (batch, found)
            if output.dtype == "uint8":
                assert found.max_abs <= max_pixels, (batch, found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stage", "dtype"),
    [
        *(
            (family, stage, torch.bfloat16) for family, stage in EVERY_STAGE
        ),  # what a GPU's plans are made from
        *(
            (family, stage, torch.float32)
            for family, stage in EVERY_STAGE
            if family == "pixart" or stage == "text"
        ),
    ],
)
def test_exported_stage_computes_what_eager_computes(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, stage: str, dtype: torch.dtype
) -> None:
    module, spec = load(checkpoints[family], family, stage, dtype)
    path = export_onnx(module, spec, tmp_path / "stage.onnx", min_batch=1, max_batch=MAX_BATCH)
    check_stage(path, module, reference_of(checkpoints[family], family, stage, dtype), spec, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "stage"), [("pixart", "text"), ("pixart", "decode"), ("sdxl", "denoise")])
def test_exported_stage_computes_in_float16(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, stage: str
) -> None:
    module, spec = load(checkpoints[family], family, stage, torch.float16)
    path = export_onnx(module, spec, tmp_path / "stage.onnx", min_batch=1, max_batch=MAX_BATCH)
    check_stage(path, module, module, spec, torch.float16)


@pytest.mark.slow
def test_large_weights_lie_in_a_file_of_their_own(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    module, spec = load(checkpoints["cogvideox"], "cogvideox", "text", torch.float32)
    path = export_onnx(
        module, spec, tmp_path / "stage.onnx", min_batch=1, max_batch=MAX_BATCH, external_data_bytes=1000
    )
    assert sorted(one.name for one in tmp_path.iterdir()) == ["stage.onnx", "stage.onnx.data"]
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()
    assert path.stat().st_size < (tmp_path / "stage.onnx.data").stat().st_size
    check_stage(path, module, module, spec, torch.float32)


def test_batch_is_one_dimension_where_only_two_sizes_are_allowed(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Torch gave each input a symbol of its own then, and each would have been free."""
    module, spec = load(checkpoints["pixart"], "pixart", "text", torch.float32)
    path = export_onnx(module, spec, tmp_path / "stage.onnx", min_batch=1, max_batch=2)
    named = {
        dim.dim_param for one in onnx.load(str(path)).graph.input for dim in one.type.tensor_type.shape.dim
    }
    assert named == {"batch", ""}


# --- what the parser does not read ---


def spec_of(dtype: str = "float32") -> StageSpec:
    return StageSpec.model_validate(
        {
            "name": "denoise",
            "parts": ("transformer",),
            "bucket": None,
            "inputs": (TensorSpec(name="latents", dtype="float32", shape=(4,)),),
            "outputs": ({"name": "prediction", "dtype": dtype, "shape": (4,)},),
        }
    )


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, latents: Tensor) -> Tensor:
        return self.function(latents)


def test_operator_that_tensorrt_does_not_have_is_named(tmp_path: Path) -> None:
    module = Applied(lambda latents: torch.det(latents.reshape(-1, 2, 2))[:, None].expand(-1, 4) + latents)
    with pytest.raises(
        CompileError, match=r"^stage denoise: TensorRT cannot read x\.onnx: operator Det \(node"
    ):
        export_onnx(module, spec_of(), tmp_path / "x.onnx", min_batch=1, max_batch=4)


def test_operator_of_a_type_that_tensorrt_does_not_have_is_named(tmp_path: Path) -> None:
    module = Applied(lambda latents: (latents.double() * 2).float())
    with pytest.raises(CompileError, match=r"operator Cast .* does not take DOUBLE"):
        export_onnx(module, spec_of(), tmp_path / "x.onnx", min_batch=1, max_batch=4)


def test_bytes_that_are_computed_with_are_refused(tmp_path: Path) -> None:
    module = Applied(lambda latents: latents.to(torch.uint8) + 1)
    with pytest.raises(CompileError, match="Add computes with bytes"):
        export_onnx(module, spec_of("uint8"), tmp_path / "x.onnx", min_batch=1, max_batch=4)


def test_bytes_are_made_at_the_very_end(tmp_path: Path) -> None:
    module = Applied(
        lambda latents: torch.cat([half.to(torch.uint8) for half in latents.chunk(2, 1)[::-1]], 1)
    )
    path = export_onnx(module, spec_of("uint8"), tmp_path / "x.onnx", min_batch=1, max_batch=4)
    casts = [node for node in onnx.load(str(path)).graph.node if node.op_type == "Cast"]
    assert [list(cast.output) for cast in casts] == [["prediction"]]
    (made,) = run(
        opened(path, spec_of("uint8")), spec_of("uint8"), (torch.tensor([[1.0, 2.0, 253.0, 254.0]]),)
    )
    assert made.tolist() == [[253, 254, 1, 2]]


def small_model(*nodes: onnx.NodeProto, opset: int = OPSET) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes),
        "small",
        [value("x", TensorProto.FLOAT, ["batch", 4]), value("axes", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (small_model(helper.make_node("Relu", ["x"], ["y"])), None),
        (small_model(helper.make_node("Relu", ["x"], ["y"]), opset=25), "opset 25 is not one of 9 to 24"),
        (
            small_model(helper.make_node("ReduceMean", ["x", "axes"], ["y"], "mean")),
            "operator ReduceMean (node mean): input 1 must be a constant",
        ),
        (
            small_model(helper.make_node("Own", ["x"], ["y"], domain="com.example")),
            "operator Own (node y) is of the domain com.example",
        ),
        (
            small_model(helper.make_node("Relu", ["x"], ["z"]), helper.make_node("Relu", ["z"], ["y"])),
            "operator Relu (node z): the type of z is not known",
        ),
    ],
)
def test_problem_of_a_model_is_told_by_its_operator(model: onnx.ModelProto, problem: str | None) -> None:
    assert unsupported(model)[:1] == ([] if problem is None else [problem])


def test_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    model = small_model(helper.make_node("Relu", ["nothing"], ["y"]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CompileError, match=r"stage text: x\.onnx is no valid ONNX"):
        check_onnx(path, "text")


def test_table_is_of_the_oldest_tensorrt_that_is_supported() -> None:
    table = supported_operators()
    assert table["tensorrt"] == "10.15"
    assert table["opsets"][0] <= OPSET <= table["opsets"][1]
    assert "BF16" in table["operators"]["Conv"]
    assert "Det" not in table["operators"]

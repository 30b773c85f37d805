"""A stage's wrapper as an ONNX file that TensorRT's parser reads, which is checked without TensorRT.

The file computes in the dtype that the module was cast to before: a strongly typed network has no other way
to ask for a precision, and TensorRT 11 has no other networks. Attention is written out as products and a
softmax, which every parser reads and TensorRT fuses where it can.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from engines.bundle.stages import StageSpec
from engines.compile.export import export_stage
from engines.errors import BackendUnavailable, CompileError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

OPSET: Final = 22
"""The first in which convolutions take bfloat16; the parser of TensorRT 10.15 reads up to 24."""

BATCH: Final = "batch"
"""Name of the one dynamic dimension, the same in every input and output."""

EXTERNAL_DATA_BYTES: Final = 256 << 20
"""Weights larger than this together lie beside the `.onnx`, in a file with `.data` after its name."""

OPERATORS: Final = Path(__file__).parent / "tensorrt_operators.json"
"""What the parser reads, from its own documentation; `tests/engines/vendor/record.py` makes it."""

# operators that move bytes about and do not look at them
MOVES: Final = {
    "Concat",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}

# inputs, by position, that must be known when the engine is built
BUILD_TIME_INPUTS: Final = {
    "CumSum": (1,),
    "Pad": (3,),
    "ReduceL2": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceSum": (1,),
    "Slice": (3,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}

TYPES: Final = {
    "BFLOAT16": "BF16",
    "BOOL": "BOOL",
    "DOUBLE": "DOUBLE",
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "INT32": "INT32",
    "INT64": "INT64",
    "INT8": "INT8",
    "UINT8": "UINT8",
}
"""ONNX's names of element types, and those of the parser's documentation."""


def export_onnx(
    module: nn.Module,
    spec: StageSpec,
    path: Path,
    *,
    min_batch: int,
    max_batch: int,
    opset: int = OPSET,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> Path:
    """Write a stage as ONNX, and check that TensorRT's parser knows every operator in it.

    Args:
        module: the stage's wrapper, cast to what it is to compute in.
        spec: the stage; inputs and outputs keep its names and dtypes.
        path: file to write, `.onnx`; large weights go beside it.
        min_batch: smallest batch.
        max_batch: largest one.
        opset: of ONNX; at least 18.
        external_data_bytes: weights larger than this together get a file of their own.

    Returns:
        `path`.

    Raises:
        BackendUnavailable: torch's ONNX exporter is not installed.
        CompileError: the stage cannot be exported, or an operator, one of its types or its opset is not
            supported; names the operator and its node.
    """
    _check_exporter()
    program = export_stage(module, spec, min_batch=min_batch, max_batch=max_batch)
    try:
        with _quiet():
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                verbose=False,
            )
    except Exception as error:  # the exporter raises what it likes
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise CompileError(f"stage {spec.name}: ONNX export failed: {first}") from error
    _name_the_batch(exported.model)
    _drop_idle_squeezes(exported.model)
    _promote_concatenated(exported.model)
    _transpose_instead_of_einsum(exported.model)
    _make_bytes_last(exported.model)
    _forget_sources(exported.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    size_bytes = sum(one.const_value.nbytes for one in exported.model.graph.initializers.values())
    exported.save(str(path), external_data=size_bytes > external_data_bytes)
    check_onnx(path, spec.name)
    return path


def _check_exporter() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"ONNX export needs the package {error.name}; install the extra tensorrt-build"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs what it does not find and does not need, torchvision's operators among it."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _name_the_batch(model: ir.Model) -> None:
    """Call the batch dimension `batch` wherever it occurs, also within products such as `2*s0`.

    Where only two sizes are allowed, torch may give each input a symbol of its own; all are the batch.
    """
    import onnx_ir as ir

    graph = model.graph
    symbols = set()
    for value in graph.inputs:
        first, *others = value.shape or [0]
        if any(isinstance(dim, ir.SymbolicDim) for dim in others):
            raise CompileError(f"input {value.name} has another dynamic dimension beside the batch")
        if isinstance(first, ir.SymbolicDim):
            symbols.add(re.escape(str(first)))
    if not symbols:
        return
    symbol = re.compile(rf"\b({'|'.join(sorted(symbols))})\b")
    for value in _values(graph):
        if value.shape is not None and any(isinstance(dim, ir.SymbolicDim) for dim in value.shape):
            value.shape = ir.Shape(
                [
                    symbol.sub(BATCH, dim.value) if isinstance(dim, ir.SymbolicDim) and dim.value else dim
                    for dim in value.shape
                ]
            )


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _drop_idle_squeezes(model: ir.Model) -> None:
    """Take out squeezes of a dimension that is not 1: torch leaves the tensor as it is, ONNX refuses it."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Squeeze" or len(node.inputs) != 2:
            continue
        source, axes = node.inputs
        if source is None or source.shape is None or axes is None or axes.const_value is None:
            continue
        sizes = [source.shape[axis] for axis in axes.const_value.numpy().reshape(-1).tolist()]
        if sizes and all(isinstance(size, int) and size != 1 for size in sizes):
            node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _promote_concatenated(model: ir.Model) -> None:
    """Cast what is concatenated to the type of the result: torch does that by itself, ONNX does not."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        dtype = node.outputs[0].dtype
        if node.op_type != "Concat" or dtype is None:
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype in (None, dtype):
                continue
            cast = ir.node("Cast", [value], {"to": dtype})
            promoted = cast.outputs[0]
            promoted.dtype, promoted.shape = dtype, value.shape
            graph.insert_before(node, cast)
            node.replace_input_with(index, promoted)


def _transpose_instead_of_einsum(model: ir.Model) -> None:
    """Write an einsum of one tensor, which only reorders it, as that: ONNX's has no bfloat16."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        if node.op_type != "Einsum" or len(node.inputs) != 1:
            continue
        before, _, after = node.attributes["equation"].as_string().replace(" ", "").partition("->")
        if sorted(before) != sorted(set(after)) or not before.isalpha():
            continue
        transpose = ir.node("Transpose", node.inputs, {"perm": [before.index(axis) for axis in after]})
        result, old = transpose.outputs[0], node.outputs[0]
        result.name, result.shape = old.name, old.shape
        if old.dtype is not None:
            result.dtype = old.dtype
        graph.insert_before(node, transpose)
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _make_bytes_last(model: ir.Model) -> None:
    """Round to bytes at the very end: TensorRT has them at a network's edge only.

    Whole numbers from 0 to 255 are the same as floats, so what a stage does with its pixels after rounding
    them, transposing and concatenating, may as well be done before.

    Raises:
        CompileError: bytes are computed with, or are no result.
    """
    import onnx_ir as ir

    graph = model.graph
    casts = [
        node
        for node in graph
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.UINT8
    ]
    if not casts:
        return
    dtypes = {value.dtype for node in casts for value in node.inputs if value is not None and value.dtype}
    if len(dtypes) != 1:
        raise CompileError(f"bytes are made of one type, not of {', '.join(sorted(map(str, dtypes)))}")
    (dtype,) = dtypes
    byte_outputs = [index for index, value in enumerate(graph.outputs) if value.dtype == ir.DataType.UINT8]
    for cast in casts:
        (source,) = cast.inputs
        assert source is not None
        cast.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(cast, safe=True)
    for node in graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.UINT8:
                if node.op_type not in MOVES:
                    raise CompileError(f"{node.op_type} computes with bytes, which TensorRT does not")
                value.dtype = dtype
    for index in byte_outputs:
        rounded = graph.outputs[index]
        name, rounded.name = rounded.name, f"{rounded.name}_rounded"
        last = ir.node("Cast", [rounded], {"to": ir.DataType.UINT8})
        pixels = last.outputs[0]
        pixels.name, pixels.dtype, pixels.shape = name, ir.DataType.UINT8, rounded.shape
        graph.append(last)
        graph.outputs[index] = pixels


def _forget_sources(model: ir.Model) -> None:
    """Take out stack traces, which are longer than the graph and name folders of this machine."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
    for value in (*_values(model.graph), *model.graph.initializers.values()):
        value.metadata_props.clear()


def check_onnx(path: Path, stage: str) -> None:
    """Check a file with ONNX's own checker, shapes and types included, and against what TensorRT reads.

    Raises:
        CompileError: it is not valid, or something in it is not supported; names the operator and its node.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CompileError(f"stage {stage}: {path.name} is no valid ONNX: {error}") from None
    problems = unsupported(onnx.load(str(path), load_external_data=False))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CompileError(f"stage {stage}: TensorRT cannot read {path.name}: {problems[0]}{more}")


@functools.cache
def supported_operators() -> dict[str, Any]:
    """`operators` (name: types), `opsets` (first, last), and of which TensorRT: `tensorrt`, `source`."""
    table: dict[str, Any] = json.loads(OPERATORS.read_text(encoding="utf-8"))
    return table


def unsupported(model: onnx.ModelProto, table: dict[str, Any] | None = None) -> list[str]:
    """What of a model the parser does not read: operators, their types, opsets, inputs it must know early.

    Args:
        model: with the types of all its tensors, as the exporter writes them.
        table: as `supported_operators`, which is the default.

    Returns:
        One line per problem.
    """
    import onnx

    table = table or supported_operators()
    first, last = table["opsets"]
    problems = [
        f"opset {entry.version} is not one of {first} to {last}"
        for entry in model.opset_import
        if entry.domain in ("", "ai.onnx") and not first <= entry.version <= last
    ]
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    graph = model.graph
    typed = {
        one.name: one.type.tensor_type.elem_type for one in (*graph.input, *graph.output, *graph.value_info)
    }
    typed |= {one.name: one.data_type for one in graph.initializer}
    constants = {one.name for one in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants.update(node.output)
        where = f"operator {node.op_type} (node {node.name or node.output[0]})"
        if node.domain not in ("", "ai.onnx"):
            problems.append(f"{where} is of the domain {node.domain}")
            continue
        types = table["operators"].get(node.op_type)
        if types is None:
            problems.append(f"{where} is not supported")
            continue
        late = [
            position
            for position in BUILD_TIME_INPUTS.get(node.op_type, ())
            if position < len(node.input) and node.input[position] and node.input[position] not in constants
        ]
        problems += [f"{where}: input {position} must be a constant" for position in late]
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        for name in _data_tensors(node, schema):
            if name not in typed:
                problems.append(f"{where}: the type of {name} is not known")
                continue
            onnx_type = onnx.TensorProto.DataType.Name(typed[name])
            if TYPES.get(onnx_type, onnx_type) not in types:
                problems.append(f"{where} does not take {onnx_type} ({name}), only {', '.join(types)}")
    return problems


def _data_tensors(node: onnx.NodeProto, schema: onnx.defs.OpSchema) -> Iterator[str]:
    """Inputs and outputs whose type is free; the table is about those, not about indices and axes."""
    free = {one.type_param_str for one in schema.type_constraints if len(one.allowed_type_strs) > 1}
    for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for position, name in enumerate(names):
            # the last one may take any number of tensors
            if name and formal[min(position, len(formal) - 1)].type_str in free:
                yield name

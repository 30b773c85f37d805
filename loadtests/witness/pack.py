"""Writes what the TensorRT witness runs: every stage as ONNX, inputs, and what eager makes of them.

    python -m loadtests.witness.pack STUDENT ... --out DIR

The newest TensorRT whose libraries a package index has is 8.6.0, for Python 3.10. Its parser reads opset 17
and takes axes of a reduction for an attribute; given one of opset 18, it would reduce all axes without a
word. So the files that bundles are built from are taken at opset 18 and lowered by one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from engines.bundle.stages import StageSpec
from engines.compile.export import example_inputs
from engines.compile.onnx_export import export_onnx
from engines.families.spec import get_family
from engines.families.student import read_student

OPSET = 17
IR_VERSION = 8
"""Of ONNX files when opset 17 was new."""

REDUCTIONS = ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin")
NEW_IN_18 = {"Resize": ("antialias", "axes", "keep_aspect_ratio_policy"), "Split": ("num_outputs",)}
"""Attributes that opset 17 does not have; what the exporter writes in them is what 17 does anyway, which the
comparison with eager would tell."""


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn a model of opset 18 into one of opset 17, in place.

    Raises:
        ValueError: a reduction's axes are not constant.
        onnx.checker.ValidationError: it has something that opset 17 has not.
    """
    constants = {one.name: one for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = next(one.t for one in node.attribute if one.name == "value")
    for node in model.graph.node:
        dropped = {"noop_with_empty_axes"} if node.op_type in REDUCTIONS else set()
        dropped |= set(NEW_IN_18.get(node.op_type, ()))
        kept = [attribute for attribute in node.attribute if attribute.name not in dropped]
        del node.attribute[:]
        node.attribute.extend(kept)
        if node.op_type in REDUCTIONS and len(node.input) == 2:
            if node.input[1] not in constants:
                raise ValueError(f"{node.op_type} {node.name}: its axes are not constant")
            axes = numpy_helper.to_array(constants[node.input[1]]).reshape(-1).tolist()
            node.attribute.append(helper.make_attribute("axes", axes))
            del node.input[1:]
    model.opset_import[0].version = OPSET
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    return model


def write_stage(student: Path, spec: StageSpec, family: str, folder: Path, batches: Sequence[int]) -> None:
    """Write one stage: `stage.onnx`, and `BATCH.npz` with `in_NAME` and `out_NAME` for each batch size."""
    module = get_family(family).load_stage(student, spec, torch.float32)
    path = export_onnx(
        module, spec, folder / "stage.onnx", min_batch=1, max_batch=max(batches), opset=OPSET + 1
    )
    onnx.save(lower(onnx.load(str(path))), str(path))
    for batch in batches:
        inputs = example_inputs(spec, batch, seed=batch)
        with torch.no_grad():
            outputs = module(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        arrays = {f"in_{one.name}": tensor.numpy() for one, tensor in zip(spec.inputs, inputs, strict=True)}
        made = {f"out_{one.name}": tensor.numpy() for one, tensor in zip(spec.outputs, outputs, strict=True)}
        np.savez(folder / f"{batch}.npz", allow_pickle=False, **arrays, **made)


def write_pack(students: Sequence[Path], out: Path, batches: Sequence[int]) -> list[str]:
    """Write the stages of several students.

    Returns:
        Their folders' names.
    """
    names = []
    for directory in students:
        student = read_student(directory)
        for spec in get_family(student.family).stages(directory, student):
            name = f"{student.name}-{spec.label}"
            write_stage(directory, spec, student.family, out / name, batches)
            names.append(name)
    (out / "pack.json").write_text(json.dumps({"stages": names, "batches": list(batches)}, indent=1) + "\n")
    return names


def main() -> None:
    """Write a pack."""
    parser = argparse.ArgumentParser(description="Write what the TensorRT witness runs.")
    parser.add_argument("students", type=Path, nargs="+", metavar="STUDENT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    for name in write_pack(args.students, args.out, sorted(args.batches)):
        print(name)


if __name__ == "__main__":
    main()

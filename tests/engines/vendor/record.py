"""Records what released wheels really offer, for tests that have neither TensorRT nor a network.

    python -m tests.engines.vendor.record tensorrt WHEEL ...              > tensorrt_api.json
    python -m tests.engines.vendor.record torch-tensorrt WHEEL ...        > torch_tensorrt_api.json
    python -m tests.engines.vendor.record operators OPERATORS.md SOURCE   > tensorrt_operators.json

The first two belong beside this file, the third into `engines/compile`. `pip download --no-deps` gets the
wheels: `tensorrt_cu12_bindings` or `tensorrt_cu13_bindings` for the Python that runs this (1 MB each), and
`torch_tensorrt` for any (4 MB). The bindings need TensorRT's libraries, which no package index has. They are
imported here against empty ones, compiled on the spot, and never called: their classes, enumerations and
signatures are pybind11's own, made when the module is loaded. `torch_tensorrt` is not imported at all, its
signatures are read from the source. OPERATORS.md is `docs/operators.md` of a release of
github.com/onnx/onnx-tensorrt, SOURCE says which.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

CLASSES = (
    "Builder", "BuilderFlag", "DataType", "EngineInspector", "ExecutionContextAllocationStrategy",
    "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILogger", "INetworkDefinition",
    "IOptimizationProfile", "ITimingCache", "LayerInformationFormat", "Logger", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "ProfilingVerbosity", "Runtime",
    "TensorIOMode",
)  # fmt: skip

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip

FUNCTIONS = {
    "torch_tensorrt/dynamo/_compiler.py": ("compile", "convert_exported_program_to_serialized_trt_engine"),
    "torch_tensorrt/_compile.py": ("save", "load"),
    "torch_tensorrt/_Input.py": ("Input.__init__",),
}

INSPECT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tensorrt_bindings.tensorrt as trt

def entry(owner, name):
    value = getattr(owner, name)
    lines = (getattr(value, "__doc__", None) or "").splitlines()
    if isinstance(value, property):
        return "property, read only" if value.fset is None else "property"
    if not callable(value):
        return f"value {int(value)}" if isinstance(value, owner) else "attribute"
    calls = [line.strip() for line in lines if f"{name}(" in line and "->" in line]
    return [call.partition(". ")[2] if call[0].isdigit() else call for call in calls]

print(json.dumps({
    name: {
        member: entry(getattr(trt, name), member)
        for member in sorted(dir(getattr(trt, name)))
        if member == "__init__" or not member.startswith("_")
        # what a network can be made of by hand is long and not used: the ONNX parser makes it
        if name != "INetworkDefinition" or not member.startswith("add_")
    }
    for name in sys.argv[2:] if hasattr(trt, name)
}))
"""


def tensorrt_api(wheel: Path) -> dict[str, Any]:
    """Classes of one wheel of bindings: {class: {member: signatures, or what else it is}}."""
    version = wheel.name.split("-")[1]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("tensorrt_bindings/tensorrt.so", root)
        source = root / "empty.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
        for library in LIBRARIES:
            name = f"lib{library}.so.{version.split('.')[0]}"
            flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(root / name)]
            subprocess.run(["cc", *flags, str(source)], check=True)
        done = subprocess.run(
            [sys.executable, "-c", INSPECT, folder, *CLASSES],
            env={"LD_LIBRARY_PATH": folder},
            capture_output=True,
            text=True,
            check=True,
        )
    text = done.stdout.replace("tensorrt_bindings.tensorrt.", "")
    found: dict[str, Any] = json.loads(text)
    return {version: found}


def torch_tensorrt_api(wheel: Path) -> dict[str, Any]:
    """Parameters of the functions of one wheel: {function: [names, `*` before keyword-only, `**kwargs`]}."""
    version = wheel.name.split("-")[1]
    found: dict[str, Any] = {}
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"torch_tensorrt-{version}.dist-info/METADATA").decode()
        found["requires"] = sorted(
            match[1]
            for match in re.finditer(r"^Requires-Dist: ((?:torch|tensorrt)[^;\n]*)", metadata, re.MULTILINE)
        )
        for path, names in FUNCTIONS.items():
            tree = ast.parse(archive.read(path))
            for name in names:
                found[name] = _parameters(_function(tree, name))
                if name == "Input.__init__":  # it takes `**kwargs`, and looks names up in them
                    found["Input"] = _looked_up(_function(tree, name))
    return {version: found}


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
    *owner, function = name.split(".")
    body: list[ast.stmt] = tree.body
    if owner:
        body = next(one.body for one in body if isinstance(one, ast.ClassDef) and one.name == owner[0])
    # the last definition counts; the ones before it are overloads
    return [one for one in body if isinstance(one, ast.FunctionDef) and one.name == function][-1]


def _looked_up(function: ast.FunctionDef) -> list[str]:
    """Strings that are looked for in `kwargs`, or taken out of it."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "kwargs":
            found.add(node.left)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "kwargs":
            found.add(node.slice)
    return sorted(
        {one.value for one in found if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    )


def _parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    names += [argument.arg for argument in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def operators(document: Path, source: str) -> dict[str, Any]:
    """Operators that ONNX-TensorRT reads, and the types it reads them in."""
    text = document.read_text(encoding="utf-8")
    heading = re.search(
        r"TensorRT ([\d.]+) supports operators .*opset (\d+) to opset (\d+)", text, re.IGNORECASE
    )
    if heading is None:
        raise SystemExit(f"{document}: no range of opsets in it")
    rows = re.findall(r"^\|\s*(\w+)\s*\|\s*Y[^|]*\|([^|\n]*)", text, re.MULTILINE)
    # the document has one slip of the pen
    types = {
        name: sorted({one.replace("INF", "INT") for one in re.findall(r"\w+", cell)}) for name, cell in rows
    }
    return {
        "source": source,
        "tensorrt": heading[1],
        "opsets": [int(heading[2]), int(heading[3])],
        "operators": dict(sorted(types.items())),
    }


def main(kind: str, *arguments: str) -> None:
    """Print a recording."""
    if kind == "operators":
        document, source = arguments
        recording = operators(Path(document), source)
    else:
        read = {"tensorrt": tensorrt_api, "torch-tensorrt": torch_tensorrt_api}[kind]
        recording = {}
        for wheel in arguments:
            recording.update(read(Path(wheel)))
    sys.stdout.write(_dump(recording) + "\n")


def _dump(recording: dict[str, Any]) -> str:
    """JSON with a line for each class, function or operator: differences stay readable."""
    pretty: dict[str, str] = {}

    def shorten(value: Any, depth: int) -> Any:
        if isinstance(value, dict) and depth:
            return {key: shorten(one, depth - 1) for key, one in value.items()}
        if isinstance(value, dict | list):
            pretty[mark := f"@{len(pretty)}@"] = json.dumps(value)
            return mark
        return value

    text = json.dumps(shorten(recording, 2), indent=1)
    return re.sub(r'"(@\d+@)"', lambda match: pretty[match[1]], text)


if __name__ == "__main__":
    main(*sys.argv[1:])

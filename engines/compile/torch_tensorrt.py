"""A stage through Torch-TensorRT: TensorRT for what it can take of a graph, torch for the rest.

Every stage of every family here converts whole (`onnx_export.py`), so no bundle is built this way; it is for
families to come. What it makes is a package like AOTInductor's, which can be loaded once `torch_tensorrt` has
been imported. Its own archive format would be unpickled when loaded.

`dynamo.compile` swallows keyword arguments that it does not know. So everything passed is looked up in its
signature first, and an unknown name is an error here. This has never run on a GPU; names were checked against
the released wheels of 2.11 to 2.14.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import nn
from torch.export import Dim

from engines.bundle.stages import StageSpec
from engines.compile.export import example_inputs, export_stage
from engines.errors import BackendUnavailable, CompileError
from engines.runtime.stages import torch_dtype

NEVER: Final = ("enabled_precisions", "use_explicit_typing")
"""Gone in 2.13, where they are swallowed without a word. The module's own dtypes say the precision."""


def import_torch_tensorrt() -> Any:
    """The `torch_tensorrt` module.

    Raises:
        BackendUnavailable: it is not installed, or its libraries do not load; with the remedy.
    """
    try:
        import torch_tensorrt
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailable(
            f"torch_tensorrt is not to be had here ({error}); install the extra torch-tensorrt, the version "
            "that goes with this torch"
        ) from None
    return torch_tensorrt


def compile_arguments(version: str, *, whole: bool = False, optimization_level: int = 5) -> dict[str, Any]:
    """What `dynamo.compile` is told, inputs aside.

    Args:
        version: of torch_tensorrt.
        whole: fail rather than leave a part of the graph to torch.
        optimization_level: 0 to 5.
    """
    major, minor = (int(number) for number in version.split(".")[:2])
    return {
        "require_full_compilation": whole,
        "min_block_size": 1 if whole else 5,
        "immutable_weights": True,
        "optimization_level": optimization_level,
        "truncate_double": True,
        # by default a bias is taken for a causal mask, and dropped: T5's positions, PixArt's mask
        "attn_bias_is_causal": False,
        # the converters of 2.11 refuse queries and keys of different lengths, that is all cross-attention
        "decompose_attention": (major, minor) < (2, 12),
        "use_fp32_acc": False,
        "workspace_size": 0,
    }


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that a function would swallow without knowing them.

    Raises:
        CompileError: names them.
    """
    parameters = inspect.signature(function).parameters
    known = {name for name, one in parameters.items() if one.kind is not inspect.Parameter.VAR_KEYWORD}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise CompileError(
            f"torch_tensorrt: {function.__name__} of this version does not know {', '.join(unknown)}"
        )
    wrong = sorted(set(arguments) & set(NEVER))
    if wrong:
        raise CompileError(f"torch_tensorrt: {', '.join(wrong)} must not be passed; cast the module instead")


def compile_partly(
    module: nn.Module, spec: StageSpec, path: Path, *, max_batch: int, whole: bool = False
) -> Path:
    """Compile a stage, and save it as a package that AOTInductor's loader reads.

    Args:
        module: the stage's wrapper on the GPU, cast to what it is to compute in.
        spec: the stage.
        path: file to write, `.pt2`.
        max_batch: largest batch; the smallest is 1.
        whole: fail rather than leave a part of the graph to torch.

    Returns:
        `path`.

    Raises:
        BackendUnavailable: torch_tensorrt is not installed.
        CompileError: this version does not know an argument, or the stage does not compile.
    """
    library = import_torch_tensorrt()
    device = next(module.parameters()).device
    program = export_stage(module, spec, min_batch=1, max_batch=max_batch, device=device.type)
    inputs = [
        library.Input(
            min_shape=(1, *tensor.shape),
            opt_shape=(max_batch, *tensor.shape),
            max_shape=(max_batch, *tensor.shape),
            dtype=torch_dtype(tensor),
        )
        for tensor in spec.inputs
    ]
    arguments = {"arg_inputs": inputs, **compile_arguments(library.__version__, whole=whole)}
    check_arguments(library.dynamo.compile, arguments)
    batch = Dim("batch", min=1, max=max_batch)
    saving = {
        "output_format": "aot_inductor",
        "arg_inputs": [tensor.to(device) for tensor in example_inputs(spec, min(2, max_batch))],
        "retrace": True,
        "dynamic_shapes": tuple({0: batch} for _ in spec.inputs),
    }
    check_arguments(library.save, saving)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        compiled = library.dynamo.compile(program, **arguments)
        library.save(compiled, str(path), **saving)
    except Exception as error:  # converters raise what they like
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise CompileError(f"stage {spec.name}: torch_tensorrt: {first}") from error
    return path

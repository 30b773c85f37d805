"""Torch-TensorRT: what it is told exists in every version, by signatures recorded of the released wheels."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from engines.bundle.stages import StageSpec, TensorSpec
from engines.compile.torch_tensorrt import NEVER, check_arguments, compile_arguments, compile_partly
from engines.errors import BackendUnavailable, CompileError

RECORDED = json.loads(
    (Path(__file__).parent / "vendor" / "torch_tensorrt_api.json").read_text(encoding="utf-8")
)
VERSIONS = tuple(RECORDED)
SPEC = StageSpec(
    name="denoise",
    parts=("transformer",),
    bucket=None,
    inputs=(TensorSpec(name="latents", dtype="float32", shape=(4,)),),
    outputs=(TensorSpec(name="prediction", dtype="float32", shape=(4,)),),
)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, latents: Tensor) -> Tensor:
        return latents * self.factor


def with_signature(names: list[str], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under the recorded parameters, `**kwargs` among them: it swallows what it does not know."""
    parameters, named_only = [], names.index("*") if "*" in names else len(names)
    for index, name in enumerate(names):
        if name.startswith("**"):
            parameters.append(inspect.Parameter(name[2:], inspect.Parameter.VAR_KEYWORD))
        elif name != "*":
            keyword, either = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters.append(
                inspect.Parameter(name, keyword if index > named_only else either, default=None)
            )

    def call(*positional: Any, **named: Any) -> Any:
        return function(*positional, **named)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__name__ = function.__name__
    return call


def make_fake(version: str) -> Any:
    """`torch_tensorrt` as recorded, which notes what it is told."""
    api, told = RECORDED[version], {}

    def compile(program: ExportedProgram, **arguments: Any) -> Any:  # noqa: A001
        told["compile"] = arguments
        return program

    def save(module: Any, file_path: str, **arguments: Any) -> None:
        told["save"] = arguments
        Path(file_path).write_text(type(module).__name__)

    def make_input(**fields: Any) -> Any:
        unknown = set(fields) - set(api["Input"])
        assert not unknown
        return SimpleNamespace(**fields)

    return SimpleNamespace(
        __version__=version,
        Input=make_input,
        dynamo=SimpleNamespace(compile=with_signature(api["compile"], compile)),
        save=with_signature(api["save"], save),
        told=told,
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_stage_is_compiled_with_what_the_version_knows(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = make_fake(version)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    path = compile_partly(Doubled(), SPEC, tmp_path / "stage.pt2", max_batch=4)
    assert path.read_text() == "ExportedProgram"
    told = fake.told["compile"]
    assert told["attn_bias_is_causal"] is False
    assert told["decompose_attention"] is (version == "2.11.0")
    assert not set(NEVER) & set(told)
    (given,) = told["arg_inputs"]
    assert (given.min_shape, given.opt_shape, given.max_shape) == ((1, 4), (4, 4), (4, 4))
    assert given.dtype == torch.float32
    assert fake.told["save"]["output_format"] == "aot_inductor"


@pytest.mark.parametrize("version", VERSIONS)
def test_same_arguments_make_one_whole_plan(version: str) -> None:
    api = RECORDED[version]
    names = set(api["convert_exported_program_to_serialized_trt_engine"])
    assert set(compile_arguments(version, whole=True)) <= names
    assert compile_arguments(version, whole=True)["require_full_compilation"] is True


def test_argument_that_would_be_swallowed_is_an_error() -> None:
    fake = make_fake("2.13.0")
    with pytest.raises(CompileError, match="does not know use_explicit_typing"):
        check_arguments(fake.dynamo.compile, {"use_explicit_typing": True})
    fake.dynamo.compile(None, use_explicit_typing=True)  # as said, without a word
    with pytest.raises(CompileError, match="enabled_precisions must not be passed; cast the module"):
        check_arguments(make_fake("2.11.0").dynamo.compile, {"enabled_precisions": {torch.bfloat16}})


def test_recorded_versions_go_with_the_torches_and_tensorrts_that_are_supported() -> None:
    for version, api in RECORDED.items():
        minor = version.split(".")[1]
        (torches,) = [one for one in api["requires"] if one.startswith("torch<")]
        assert torches == f"torch<2.{int(minor) + 1}.0,>=2.{minor}.0"
        oldest = {re.search(r">=(\d+)\.(\d+)", one) for one in api["requires"] if one.startswith("tensorrt")}
        found = {(int(match[1]), int(match[2])) for match in oldest if match is not None}
        assert min(found) >= (10, 15)


def test_failure_is_a_compile_error_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = make_fake("2.14.0")

    def compile(*_: Any, **__: Any) -> Any:  # noqa: A001
        raise RuntimeError("conversion of aten.det failed\nand a long trace")

    fake.dynamo.compile = with_signature(RECORDED["2.14.0"]["compile"], compile)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    with pytest.raises(
        CompileError, match=r"^stage denoise: torch_tensorrt: conversion of aten\.det failed$"
    ):
        compile_partly(Doubled(), SPEC, tmp_path / "stage.pt2", max_batch=4)


def test_absence_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(BackendUnavailable, match="install the extra torch-tensorrt"):
        compile_partly(Doubled(), SPEC, tmp_path / "stage.pt2", max_batch=4)

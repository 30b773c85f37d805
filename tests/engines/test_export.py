"""The steps of a compilation, each without a compiler: export, constants, its errors, measuring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.bundle.manifest import read_manifest
from engines.compile.aotinductor import bind_constants, last_error_line
from engines.compile.export import example_inputs, export_stage
from engines.compile.measure import MAX_CALLS, MIN_CALLS, median_ms
from engines.errors import CompileError
from tests.engines.doubling import doubling_spec


def test_example_inputs_depend_on_the_seed_alone_and_stay_in_range(eager_bundle: Path) -> None:
    for spec in read_manifest(eager_bundle).stages:
        first, again, other = (example_inputs(spec, 3, seed) for seed in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        for tensor, expected in zip(first, spec.inputs, strict=True):
            if expected.maximum is not None:
                assert tensor.min() >= 0
                assert tensor.max() <= expected.maximum
            if expected.name == "mask":
                assert (tensor[:, 0] == 1).all()


def test_module_that_cannot_be_traced_is_a_compile_error() -> None:
    class Branching(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return latents if latents.sum() > 0 else -latents

    with pytest.raises(CompileError, match="stage denoise: export failed"):
        export_stage(Branching(), doubling_spec(), min_batch=1, max_batch=4)


def test_module_that_works_for_one_batch_size_only_is_a_compile_error() -> None:
    class Fixed(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return latents.reshape(2, 4) * 2

    with pytest.raises(CompileError, match="export failed"):
        export_stage(Fixed(), doubling_spec(), min_batch=1, max_batch=4)


def test_constants_are_found_under_any_of_their_names() -> None:
    weights = {"shared.weight": torch.randn(3, 2).half(), "proj.weight": torch.randn(2, 2).half()}
    shared = weights["shared.weight"].float()
    module = {
        "text_encoder.encoder.embed_tokens.weight": shared,
        "text_encoder.shared.weight": shared,
        "proj.weight": weights["proj.weight"].float().t().contiguous().t(),
        "table": torch.arange(4.0),
    }
    names = ["text_encoder.encoder.embed_tokens.weight", "proj.weight", "table"]
    bindings, own = bind_constants(names, module, {"text_encoder": weights})
    assert bindings[names[0]].tensor == "shared.weight"
    assert bindings[names[0]].dtype == "float32"
    assert bindings["proj.weight"].stride == (1, 2)
    assert bindings["table"].own
    assert own.keys() == {"table"}
    with pytest.raises(CompileError, match="constant ghost"):
        bind_constants(["ghost"], module, {"text_encoder": weights})


def test_constants_are_found_in_the_part_that_has_them() -> None:
    first, second = torch.randn(3, 2), torch.randn(3, 2)
    weights = {"text_encoder": {"text_model.weight": first}, "text_encoder_2": {"weight": second}}
    module = {"text_encoder.weight": first, "text_encoder_2.weight": second}
    bindings, own = bind_constants(module, module, weights)
    assert own == {}
    assert [(binding.part, binding.tensor) for binding in bindings.values()] == [
        (None, "text_model.weight"),
        ("text_encoder_2", "weight"),
    ]


def test_compiler_errors_are_told_by_their_telling_line() -> None:
    error = RuntimeError("C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nx.cpp:1: fatal error: omp.h\n")
    assert last_error_line(error) == "x.cpp:1: fatal error: omp.h"
    assert last_error_line(RuntimeError("")) == "no message"


def test_median_takes_a_few_calls_and_not_many() -> None:
    calls: list[None] = []
    assert median_ms(lambda: calls.append(None), budget_s=0.0) >= 0
    assert len(calls) == 1 + MIN_CALLS
    calls.clear()
    median_ms(lambda: calls.append(None), budget_s=60.0)
    assert len(calls) == 1 + MAX_CALLS

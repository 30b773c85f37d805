"""Compiled code against eager: what is compared, what may differ, and in which precision it pays."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.bundle.platform import current_platform
from engines.bundle.stages import Backend, StageSpec, TensorSpec
from engines.compile import precision
from engines.compile.parity import MIN_COSINE, check_parity, compare, worst
from engines.compile.precision import choose_dtype
from engines.errors import ParityError
from engines.families.spec import get_family
from engines.runtime.stages import EagerEngine, Stage
from tests.engines.doubling import doubling_spec, scaled_stage


@pytest.mark.parametrize(
    ("flags", "half_error", "half_is_faster", "expected"),
    [
        (("avx2",), 0, True, "float32"),  # no instructions for it
        (("avx512_bf16",), 0, True, "bfloat16"),
        (("avx512_bf16",), 7, True, "float32"),  # too far off
        (("amx_bf16",), 0, False, "float32"),  # not faster
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster_and_close(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    half_error: int,
    half_is_faster: bool,
    expected: str,
) -> None:
    class Pixels(nn.Module):
        def __init__(self, value: int) -> None:
            super().__init__()
            self.value = value

        def forward(self, latents: Tensor) -> Tensor:
            return torch.full_like(latents, self.value, dtype=torch.uint8)

    def load_stage(_: Path, __: StageSpec, dtype: torch.dtype) -> nn.Module:
        return Pixels(100 if dtype == torch.float32 else 100 + half_error)

    times_s = itertools.cycle([2.0, 1.0 if half_is_faster else 2.0])  # float32, bfloat16, float32, ...
    monkeypatch.setattr(precision, "_time_s", lambda *_: next(times_s))
    family = replace(get_family("pixart"), load_stage=load_stage)
    spec = doubling_spec().model_copy(
        update={"name": "decode", "outputs": (TensorSpec(name="pixels", dtype="uint8", shape=(4,)),)}
    )
    platform = current_platform().model_copy(update={"cpu_flags": flags})
    assert choose_dtype(family, tmp_path, spec, platform) == expected


def test_parity_of_a_stage_with_itself_is_exact() -> None:
    row = check_parity(doubling_spec(), scaled_stage(2), scaled_stage(2), 3, Backend.AOTINDUCTOR)
    assert (row.max_abs, row.finite) == (0.0, True)
    assert row.cosine == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (-2.0, "cosine -1.00000"),
        (float("nan"), "not finite"),
        (0.0, "cosine 0.0"),
        (200.0, r"9.9e\+03 % too large or too small"),  # what the cosine does not see
        (2.02, "1 % too large or too small"),
        (1.98, "1 % too large or too small"),
    ],
)
def test_stage_that_disagrees_is_refused(factor: float, message: str) -> None:
    with pytest.raises(ParityError, match=f"stage denoise, batch 2, .*{message}"):
        check_parity(doubling_spec(), scaled_stage(2), scaled_stage(factor), 2, Backend.AOTINDUCTOR)


def test_agreement_is_that_of_the_worst_row() -> None:
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    candidate = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert compare(reference, candidate).cosine == pytest.approx(0.0)
    larger = torch.tensor([[1.0, 0.0], [1.5, 0.0]])
    assert compare(reference, larger).scale_error == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize(
    ("factor", "message"),
    [(-1.0, "cosine -1.00000"), (float("nan"), "not finite"), (1.5, "50 % too large or too small")],
)
def test_agreement_is_that_of_the_worst_output(bad: int, factor: float, message: str) -> None:
    output = doubling_spec().outputs[0]
    spec = doubling_spec().model_copy(update={"outputs": (output, output)})

    class Pair(nn.Module):
        def __init__(self, factors: tuple[float, float]) -> None:
            super().__init__()
            self.factors = factors

        def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
            return latents * self.factors[0], latents * self.factors[1]

    def stage(*factors: float) -> Stage:
        return Stage(spec, [EagerEngine(Pair((factors[0], factors[1])), 4)], 4)

    assert check_parity(spec, stage(1.0, 1.0), stage(1.0, 1.0), 2, Backend.AOTINDUCTOR).finite
    factors = (factor, 1.0) if bad == 0 else (1.0, factor)
    with pytest.raises(ParityError, match=message):
        check_parity(spec, stage(1.0, 1.0), stage(*factors), 2, Backend.AOTINDUCTOR)


def test_worst_pixel_of_all_outputs_counts() -> None:
    near, far = (compare(torch.zeros(1, 2), torch.full((1, 2), by)) for by in (1.0, 3.0))
    assert worst([near, far]).max_abs == worst([far, near]).max_abs == 3.0


@pytest.mark.parametrize(
    ("dtype", "cosine"), [("float32", 0.998), ("bfloat16", 0.998), ("float16", 0.998), ("float8", 0.98)]
)
def test_every_precision_has_to_keep_the_direction(dtype: str, cosine: float) -> None:
    spec = doubling_spec().model_copy(update={"compute_dtype": dtype})

    class Turned(nn.Module):
        """Each pair of numbers by an angle, which keeps the scale of none."""

        def __init__(self, cosine: float) -> None:
            super().__init__()
            self.cosine, self.sine = cosine, math.sqrt(1 - cosine**2)

        def forward(self, latents: Tensor) -> Tensor:
            first, second = latents.unflatten(1, (2, 2)).unbind(1)
            turned = (self.cosine * first - self.sine * second, self.cosine * second + self.sine * first)
            return torch.cat(turned, dim=1) / self.cosine

    def turned(cosine: float) -> Stage:
        return Stage(spec, [EagerEngine(Turned(cosine), 4)], 4)

    near = 1 - (1 - MIN_COSINE[spec.compute_dtype]) / 2
    assert check_parity(
        spec, scaled_stage(1.0), turned(near), 2, Backend.AOTINDUCTOR
    ).cosine == pytest.approx(near)
    with pytest.raises(ParityError, match=rf"cosine {cosine:.5f} is below .*{dtype} must reach"):
        check_parity(spec, scaled_stage(1.0), turned(cosine), 2, Backend.AOTINDUCTOR)


def test_pixels_may_differ_by_two() -> None:
    spec = doubling_spec().model_copy(
        update={"name": "decode", "outputs": (TensorSpec(name="pixels", dtype="uint8", shape=(4,)),)}
    )

    class Pixels(nn.Module):
        def __init__(self, offset: int) -> None:
            super().__init__()
            self.offset = offset

        def forward(self, latents: Tensor) -> Tensor:
            return torch.full_like(latents, 100 + self.offset, dtype=torch.uint8)

    def stage(offset: int) -> Stage:
        return Stage(spec, [EagerEngine(Pixels(offset), 4)], 4)

    assert check_parity(spec, stage(0), stage(2), 1, Backend.AOTINDUCTOR).max_abs == 2
    with pytest.raises(ParityError, match="a pixel differs by 3 of 255, 2 are allowed"):
        check_parity(spec, stage(0), stage(3), 1, Backend.AOTINDUCTOR)

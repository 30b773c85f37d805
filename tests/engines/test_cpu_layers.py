"""Layers rewritten for compiled CPU code compute what the originals do, under the same names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from engines.bundle.platform import current_platform
from engines.bundle.stages import StageName
from engines.compile.aotinductor import CompileJob, load_for_compiling
from engines.compile.cpu_layers import ChannelsLastGroupNorm, TanhGelu, rewrite_for_cpu
from engines.families.spec import get_family
from engines.families.student import read_student
from tests.shared import make_tiny_checkpoint


def group_norm(num_groups: int, num_channels: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(num_groups, num_channels, eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.5)
        norm.bias.normal_()
    return norm


@pytest.mark.parametrize("shape", [(2, 48, 6, 10), (1, 48, 1, 1), (3, 48, 7), (2, 48, 3, 4, 5)])
@pytest.mark.parametrize("num_groups", [1, 8, 24])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_group_norm_is_as_exact_as_the_original(
    shape: tuple[int, ...], num_groups: int, offset: float
) -> None:
    torch.manual_seed(0)
    norm = group_norm(num_groups, shape[1])
    x = torch.randn(shape) * torch.linspace(0.1, 5, shape[1]).view(-1, *[1] * (len(shape) - 2)) + offset
    exact = norm.double()(x.double())

    def error(result: Tensor) -> float:
        return (result.double() - exact).detach().abs().max().item()

    rewritten = ChannelsLastGroupNorm(norm.float())(x)
    assert error(rewritten) <= 4 * error(norm(x)) + 1e-5


def test_group_norm_in_bfloat16_keeps_its_statistics_in_float32() -> None:
    torch.manual_seed(1)
    norm = group_norm(8, 48)  # groups of six: no sixth is a bfloat16
    x = (torch.randn(2, 48, 16, 16) + 20).bfloat16()
    exact = norm.double()(x.double())
    rewritten = ChannelsLastGroupNorm(norm.bfloat16())(x)
    assert rewritten.dtype == torch.bfloat16
    assert (rewritten.double() - exact).detach().abs().max().item() < 0.05


def test_gelu_is_its_tanh_approximation() -> None:
    x = torch.linspace(-30, 30, 4001)
    expected = nn.GELU(approximate="tanh")(x)
    assert torch.allclose(TanhGelu()(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(NewGELUActivation()(x), expected, rtol=1e-5, atol=1e-6)


def test_only_what_is_meant_is_replaced_and_every_name_stays() -> None:
    def layers() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 8, 1), group_norm(2, 8)),
            nn.GroupNorm(2, 8, affine=False),
            nn.GELU(),
            nn.GELU(approximate="tanh"),
            GELU(5, 6, approximate="tanh"),
            GELU(6, 7),
            NewGELUActivation(),
        )

    original, rewritten, other_order = layers(), layers(), layers()
    rewrite_for_cpu(rewritten, channels_last=True)
    rewrite_for_cpu(other_order, channels_last=False)

    names = [name for name, _ in original.named_parameters()]
    assert [name for name, _ in rewritten.named_parameters()] == names
    changed = [type(a) is not type(b) for a, b in zip(original, rewritten, strict=True)]
    assert changed == [False, False, False, True, True, False, True]
    assert isinstance(rewritten.get_submodule("0.1"), ChannelsLastGroupNorm)
    assert isinstance(other_order.get_submodule("0.1"), nn.GroupNorm)
    x = torch.randn(2, 4, 3, 5)
    assert torch.allclose(rewritten(x), original(x), rtol=1e-5, atol=1e-5)


def test_linear_layers_keep_their_weights_by_columns_and_tied_ones_tied() -> None:
    table = nn.Embedding(7, 3)
    tied, half = nn.Linear(3, 7, bias=False), nn.Linear(3, 2, dtype=torch.bfloat16)
    tied.weight = table.weight
    before = table.weight.detach().clone()
    module = nn.Sequential(nn.Sequential(table, tied), GELU(3, 6, approximate="tanh"), half)

    rewrite_for_cpu(module, channels_last=False)

    assert tied.weight is table.weight
    assert torch.equal(tied.weight, before)
    projection = module.get_submodule("1.proj")
    assert isinstance(projection, nn.Linear)
    assert (tied.weight.stride(), projection.weight.stride()) == ((1, 7), (1, 6))
    assert half.weight.is_contiguous()


@pytest.mark.parametrize("stage", ["text", "denoise", "decode"])
def test_what_is_compiled_for_a_cpu_is_rewritten(stage: StageName, tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint")
    family, student = get_family("pixart"), read_student(checkpoint)
    (spec,) = [one for one in family.stages(checkpoint, student) if one.name == stage]
    job = CompileJob(
        family="pixart",
        spec=spec,
        min_batch=1,
        max_batch=2,
        num_threads=1,
        bundle=tmp_path,
        platform=current_platform(),
    )
    module = load_for_compiling(job)
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert weights
    assert all(weight.t().is_contiguous() for weight in weights)
    kinds = {type(part) for part in module.modules()}
    assert kinds.isdisjoint({nn.GroupNorm, GELU, NewGELUActivation})
    assert (ChannelsLastGroupNorm in kinds) == (stage == "decode")
    assert (TanhGelu in kinds) == (stage != "decode")

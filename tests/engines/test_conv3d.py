"""Convolutions over time on a CPU: the same numbers as PyTorch's own, from oneDNN for every batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engines.families.spec import get_family
from engines.families.student import read_student
from engines.runtime.conv3d import use_onednn
from engines.runtime.stages import load_module
from tests.engines.tiny import make_tiny_cogvideox

SLOW = "aten::slow_conv3d_forward"


def kernels(module: nn.Module, features: torch.Tensor) -> set[str]:
    """Operators that PyTorch runs for it on one thread, as a worker has."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), torch.profiler.profile() as profile:
            module(features)
    finally:
        torch.set_num_threads(num_threads)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"stride": (1, 2, 2), "padding": 1}, {"groups": 2}, {"dilation": 2, "padding": 2}],
)
def test_it_computes_what_pytorch_does(options: dict[str, object], batch: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(8, 4, 3, **options)  # type: ignore[arg-type]
    features = torch.randn(batch, 8, 7, 9, 10)
    expected = conv(features)
    use_onednn(conv)
    torch.testing.assert_close(conv(features), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conv.bfloat16()(features.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
def test_what_is_not_plain_stays_as_it_is(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 4, 3, **options)  # type: ignore[arg-type]
    features = torch.randn(1, 4, 5, 6, 6)
    expected = conv(features)
    use_onednn(conv)
    assert torch.equal(conv(features), expected)


def test_decoder_of_clips_leaves_no_convolution_to_the_slow_loop(tmp_path: Path) -> None:
    checkpoint = make_tiny_cogvideox(tmp_path / "student")
    family = get_family("cogvideox")
    spec = next(one for one in family.stages(checkpoint, read_student(checkpoint)) if one.name == "decode")
    module = load_module(family, checkpoint, spec, torch.float32, torch.device("cpu"))
    latents = torch.randn(1, *spec.inputs[0].shape)
    assert SLOW not in kernels(module, latents)
    plain = family.load_stage(checkpoint, spec, torch.float32)
    assert SLOW in kernels(plain, latents)  # else this test would say nothing
    with torch.inference_mode():
        assert (module(latents).int() - plain(latents).int()).abs().max() <= 1

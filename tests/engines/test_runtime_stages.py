"""A stage over its engines, and the cache of prompts before the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.bundle.stages import StageSpec, TensorSpec
from engines.runtime.pipeline import Pipeline
from engines.runtime.prompt_cache import PromptCache
from engines.runtime.stages import EagerEngine, Stage, pick_engine
from tests.engines.batches import BUCKET

# A real compilation may have to run first.
pytestmark = pytest.mark.timeout(2400)


# --- stages ---


class Doubling(nn.Module):
    """Doubles; remembers the batch sizes it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, latents: Tensor) -> Tensor:
        self.batches.append(len(latents))
        assert latents.is_contiguous()
        return latents * 2


def toy_spec() -> StageSpec:
    return StageSpec(
        name="denoise",
        parts=("transformer",),
        bucket=BUCKET,
        inputs=(TensorSpec(name="latents", dtype="float32", shape=(3,)),),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=(3,)),),
    )


def fixed_size(module: nn.Module, batch: int) -> EagerEngine:
    engine = EagerEngine(module, batch)
    engine.min_batch = batch
    return engine


def test_padded_rows_do_not_change_real_rows() -> None:
    module = Doubling()
    stage = Stage(toy_spec(), [fixed_size(module, 2), fixed_size(module, 4)], 4)
    for batch, expected in [(1, 2), (2, 2), (3, 4), (4, 4)]:
        latents = torch.randn(batch, 3)
        assert torch.equal(stage(latents)[0], latents * 2)
        assert module.batches[-1] == expected


def test_engine_for_exactly_this_size_comes_before_one_for_a_range_before_padding() -> None:
    module = Doubling()
    exact, wide, large = fixed_size(module, 2), EagerEngine(module, 4), fixed_size(module, 8)
    engines = [large, wide, exact]
    assert pick_engine(2, engines) == (exact, 2)
    assert pick_engine(3, engines) == (wide, 3)
    assert pick_engine(5, engines) == (large, 8)
    with pytest.raises(ValueError, match="batch of 9"):
        pick_engine(9, engines)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "takes 1 tensors, not 0"),
        ([torch.zeros(1, 4)], r"takes latents as float32 \(1, 3\), not float32 \(1, 4\)"),
        ([torch.zeros(1, 3, dtype=torch.float64)], r"not float64 \(1, 3\)"),
        ([torch.zeros(1, 3, 1)], r"not float32 \(1, 3, 1\)"),
        ([torch.zeros(5, 3)], "batches of 1 to 4, not 5"),
        ([torch.zeros(0, 3)], "batches of 1 to 4, not 0"),
    ],
)
def test_stage_refuses_what_compiled_code_would_misread(inputs: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(toy_spec(), [EagerEngine(Doubling(), 4)], 4)(*inputs)


def test_compiled_stage_refuses_another_dtype_and_takes_any_stride(compiled_bundle: Path) -> None:
    stage = Pipeline.load(compiled_bundle).stage("decode", BUCKET)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="float32"):
        stage(latents.double())
    channels_last = latents.to(memory_format=torch.channels_last)
    assert torch.equal(stage(channels_last)[0], stage(latents)[0])


# --- the prompt cache ---


def entry(kilobytes: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(kilobytes * 1024, dtype=torch.uint8), torch.zeros(0)


def test_least_recently_used_prompt_is_forgotten_first() -> None:
    cache = PromptCache(max_bytes=3 * 1024)
    for prompt in "abc":
        cache.put(prompt, entry(1))
    assert cache.get("a") is not None
    cache.put("d", entry(1))
    assert [prompt for prompt in "abcd" if cache.get(prompt) is not None] == ["a", "c", "d"]


def test_replacing_an_entry_counts_its_bytes_once() -> None:
    cache = PromptCache(max_bytes=2 * 1024)
    cache.put("a", entry(1))
    for _ in range(5):
        cache.put("b", entry(1))
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == 0
    assert cache.get("a") is None


def test_entry_larger_than_the_cache_is_not_kept() -> None:
    cache = PromptCache(max_bytes=1024)
    cache.put("a", entry(2))
    assert len(cache) == 0

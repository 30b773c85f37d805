import pytest
import torch

from engines.noise import seeded_latents

SHAPE = (16, 8, 8)


def test_latents_for_a_seed_do_not_depend_on_batch_size() -> None:
    alone = seeded_latents([7], SHAPE)
    crowd = seeded_latents([1, 2**63 - 1, 7, 0], SHAPE)
    assert torch.equal(crowd[2], alone[0])


def test_different_seeds_give_different_unit_variance_noise() -> None:
    latents = seeded_latents(range(64), SHAPE)
    assert latents.shape == (64, *SHAPE)
    assert abs(latents.var().item() - 1.0) < 0.02
    assert abs((latents[0] * latents[1]).mean().item()) < 0.2


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_high_bits_of_a_seed_count(seed: int) -> None:
    seeds = [seed, seed + 2**32, seed + 2**33, seed + 2**62, seed * 2**31, (seed << 32) % 2**63]
    latents = seeded_latents(list(dict.fromkeys(seeds)), (16, 32, 32)).flatten(1)
    correlation = torch.corrcoef(latents) - torch.eye(len(latents))
    assert correlation[1:].abs().max() < 0.7  # those that share a half have 0.6 in common
    assert len(torch.unique(latents, dim=0)) == len(latents)
    assert (latents.var(dim=1) - 1.0).abs().max() < 0.05


def test_swapped_halves_of_a_seed_are_another_seed() -> None:
    one, other = seeded_latents([(5 << 32) + 9, (9 << 32) + 5], SHAPE)
    assert not torch.allclose(one, other)


def test_noise_is_what_diffusers_would_start_from() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    assert torch.equal(seeded_latents([7, 8], SHAPE), randn_tensor((2, *SHAPE), generator=generators))


def test_lower_precision_rounds_the_same_noise() -> None:
    assert torch.equal(seeded_latents([3], SHAPE, torch.bfloat16), seeded_latents([3], SHAPE).bfloat16())


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    seeded_latents([3], SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_out_of_range_seed_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=str(seed)):
        seeded_latents([seed], SHAPE)

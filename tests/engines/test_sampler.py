from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from engines.denoiser import Conditioning, NetworkDenoiser
from engines.families.pixart import load_transformer, predict
from engines.noise import seeded_latents
from engines.sampler import ddim_step, sample
from engines.schedule import CLEAN, NoiseSchedule, student_timesteps
from tests.engines.tiny import make_tiny_checkpoint

CONFIG = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "v_prediction"}
SCHEDULE = NoiseSchedule.from_config(CONFIG)
COND = Conditioning(torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1)), torch.ones(2, 20))
UNCOND = Conditioning(torch.zeros(1, 20, 32), torch.ones(1, 20))


class GaussianDenoiser:
    """The exact denoiser of data drawn from N(mean, std**2)."""

    schedule = SCHEDULE

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std
        self.batches: list[int] = []

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        self.batches.append(latents.shape[0])
        alpha, sigma = self.schedule.at(timesteps)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (latents - alpha * self.mean)


def test_many_steps_reach_the_data_distribution() -> None:
    latents = seeded_latents(range(2), (16, 16, 16))
    x0 = sample(GaussianDenoiser(2.0, 0.5), latents, student_timesteps(200), COND)
    assert abs(x0.mean().item() - 2.0) < 0.02
    assert abs(x0.std().item() - 0.5) < 0.02


@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_sampling_agrees_with_diffusers_ddim(num_steps: int) -> None:
    denoiser = GaussianDenoiser(1.0, 0.3)
    latents = seeded_latents([1, 2], (4, 8, 8))
    scheduler = DDIMScheduler(**CONFIG, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(num_steps)
    expected = latents
    for timestep in scheduler.timesteps:
        now = timestep.expand(2)
        x0 = denoiser(expected, now, COND)
        alpha, sigma = SCHEDULE.at(now)
        v = (alpha * expected - x0) / sigma
        expected = scheduler.step(v, timestep, expected).prev_sample
    x0 = sample(denoiser, latents, student_timesteps(num_steps), COND)
    torch.testing.assert_close(x0, expected, atol=2e-4, rtol=0)


def test_step_to_clean_is_x0_and_rows_move_independently() -> None:
    x0, eps = torch.full((2, 1, 1, 1), 3.0), torch.ones(2, 1, 1, 1)
    latents = ddim_step(x0, eps, SCHEDULE, torch.tensor([CLEAN, 749]))
    assert latents[0].item() == 3.0
    assert latents[1].item() == pytest.approx(3 * SCHEDULE.alphas[749].item() + SCHEDULE.sigmas[749].item())


def test_guidance_asks_for_both_prompts_in_one_call_and_moves_away_from_the_empty_one(tmp_path: Path) -> None:
    network = load_transformer(make_tiny_checkpoint(tmp_path, student=False))
    denoiser = NetworkDenoiser(network, SCHEDULE, predict)
    latents = seeded_latents([1, 2], (16, 8, 8))
    one_step = student_timesteps(1)
    with_text = sample(denoiser, latents, one_step, COND)
    without = sample(denoiser, latents, one_step, UNCOND.expand(2))
    guided = sample(denoiser, latents, one_step, COND, guidance_scale=3.0, uncond=UNCOND)
    torch.testing.assert_close(guided, without + 3.0 * (with_text - without), atol=1e-4, rtol=0)


def test_unguided_sampling_costs_one_call_of_the_batch_per_step() -> None:
    denoiser = GaussianDenoiser(0.0, 1.0)
    latents = seeded_latents([1, 2], (1, 2, 2))
    seen: list[tuple[int, tuple[int, ...]]] = []
    sample(
        denoiser,
        latents,
        student_timesteps(4),
        COND,
        on_step=lambda step, x0: seen.append((step, tuple(x0.shape))),
    )
    assert denoiser.batches == [2, 2, 2, 2]
    assert seen == [(step, (2, 1, 2, 2)) for step in range(4)]
    sample(denoiser, latents, [999], COND, guidance_scale=2.0, uncond=UNCOND)
    assert denoiser.batches[4:] == [4]


@pytest.mark.parametrize("timesteps", [[], [499, 999], [999, 999], [999, -1]])
def test_timesteps_that_do_not_decrease_are_refused(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        sample(GaussianDenoiser(0.0, 1.0), torch.zeros(2, 1, 2, 2), timesteps, COND)


def test_guidance_without_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="uncond"):
        sample(GaussianDenoiser(0.0, 1.0), torch.zeros(2, 1, 2, 2), [999], COND, guidance_scale=2.0)

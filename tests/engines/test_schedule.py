import pytest
import torch
from diffusers import DDIMScheduler

from engines.schedule import CLEAN, NoiseSchedule, student_timesteps

PIXART = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "v_prediction"}


def test_noise_levels_are_those_of_diffusers() -> None:
    schedule = NoiseSchedule.from_config(PIXART)
    alpha_bar = DDIMScheduler(**PIXART).alphas_cumprod
    torch.testing.assert_close(schedule.alphas**2, alpha_bar, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(schedule.alphas**2 + schedule.sigmas**2, torch.ones(1000))


def test_scaled_linear_noise_levels_are_those_of_diffusers() -> None:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = NoiseSchedule.from_config(config)
    alpha_bar = DDIMScheduler(**config).alphas_cumprod
    torch.testing.assert_close(schedule.alphas**2, alpha_bar, atol=1e-6, rtol=1e-4)
    assert schedule.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("beta_schedule", "squaredcos_cap_v2"),
        ("prediction_type", "sample"),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", [0.1]),
    ],
)
def test_unsupported_schedule_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=setting):
        NoiseSchedule.from_config({**PIXART, setting: value})


def test_lookup_is_per_row_and_clean_is_noise_free() -> None:
    schedule = NoiseSchedule.from_config(PIXART)
    alpha, sigma = schedule.at(torch.tensor([999, CLEAN, 0]))
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    assert alpha[1].item() == 1.0
    assert sigma[1].item() == 0.0
    assert alpha[0].item() == schedule.alphas[999].item()
    assert sigma[2].item() == schedule.sigmas[0].item()


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 50])
def test_student_timesteps_are_diffusers_trailing_timesteps(num_steps: int) -> None:
    scheduler = DDIMScheduler(**PIXART, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    assert student_timesteps(num_steps) == scheduler.timesteps.tolist()


def test_four_steps_start_at_the_last_timestep() -> None:
    assert student_timesteps(4) == [999, 749, 499, 249]
    assert student_timesteps(1) == [999]


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=str(num_steps)):
        student_timesteps(num_steps)

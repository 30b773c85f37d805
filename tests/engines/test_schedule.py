import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from engines.schedule import CLEAN, NoiseSchedule, flow_schedule, student_timesteps

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


def test_cosine_noise_levels_are_those_of_diffusers() -> None:
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    schedule = NoiseSchedule.from_config(config)
    alpha_bar = DDIMScheduler(**config).alphas_cumprod
    torch.testing.assert_close(schedule.alphas**2, alpha_bar, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(schedule.alphas**2 + schedule.sigmas**2, torch.ones(1000))


COGVIDEOX = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
}


def test_cogvideox_noise_levels_are_those_of_diffusers() -> None:
    schedule = NoiseSchedule.from_config(COGVIDEOX)
    alpha_bar = CogVideoXDDIMScheduler(**COGVIDEOX).alphas_cumprod
    torch.testing.assert_close(schedule.alphas**2, alpha_bar.float(), atol=1e-6, rtol=1e-4)
    assert schedule.alphas[-1].item() == 0.0
    assert schedule.sigmas[-1].item() == 1.0


def test_zero_terminal_snr_is_that_of_diffusers() -> None:
    config = {**PIXART, "rescale_betas_zero_snr": True}
    alpha_bar = DDIMScheduler(**config).alphas_cumprod
    torch.testing.assert_close(NoiseSchedule.from_config(config).alphas ** 2, alpha_bar, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_flow_student_sees_the_noise_levels_and_times_of_diffusers(shift: float, num_steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_config({**scheduler.config, "_class_name": type(scheduler).__name__})
    torch.testing.assert_close(schedule.sigmas.flip(0), scheduler.sigmas)
    torch.testing.assert_close(schedule.alphas + schedule.sigmas, torch.ones(1000))
    visited = torch.tensor(student_timesteps(num_steps))
    scheduler.set_timesteps(sigmas=[(num_steps - i) / num_steps for i in range(num_steps)])
    torch.testing.assert_close(schedule.sigmas[visited], scheduler.sigmas[:-1])
    torch.testing.assert_close(schedule.network_time(visited), scheduler.timesteps)
    assert schedule.prediction_type == "flow_prediction"


def test_sana_style_flow_config_is_a_flow() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    torch.testing.assert_close(NoiseSchedule.from_config(config).sigmas, flow_schedule(3.0).sigmas)


def test_flow_shift_must_be_positive() -> None:
    with pytest.raises(ValueError, match="shift"):
        flow_schedule(0.0)


def test_diffusion_models_are_told_the_timestep_itself() -> None:
    timesteps = torch.tensor([3, 999])
    assert NoiseSchedule.from_config(PIXART).network_time(timesteps) is timesteps


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("beta_schedule", "laplace"),
        ("prediction_type", "sample"),
        ("use_dynamic_shifting", True),
        ("shift_terminal", 0.1),
        ("invert_sigmas", True),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
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


def test_epsilon_models_without_terminal_signal_are_refused() -> None:
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        NoiseSchedule.from_config({"prediction_type": "epsilon", "rescale_betas_zero_snr": True})


@pytest.mark.parametrize("schedule", [NoiseSchedule.from_config(PIXART), flow_schedule(3.0)])
def test_moved_schedule_is_the_same_one(schedule: NoiseSchedule) -> None:
    moved, timesteps = schedule.to("cpu"), torch.tensor([0, 499, 999])
    assert moved.prediction_type == schedule.prediction_type
    assert torch.equal(moved.network_time(timesteps), schedule.network_time(timesteps))
    for ours, theirs in zip(moved.at(timesteps), schedule.at(timesteps), strict=True):
        assert torch.equal(ours, theirs)


def test_lookup_has_as_many_dimensions_as_the_latents() -> None:
    alpha, sigma = flow_schedule().at(torch.tensor([0, 999]), ndim=5)
    assert alpha.shape == sigma.shape == (2, 1, 1, 1, 1)

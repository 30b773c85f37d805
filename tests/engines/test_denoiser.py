from pathlib import Path

import pytest
import torch

from engines.denoiser import Conditioning, NetworkDenoiser, concat, to_x0_eps, x0_to_eps
from engines.families.pixart import load_transformer, predict, size_conditions
from engines.schedule import NoiseSchedule, PredictionType, flow_schedule
from tests.engines.tiny import make_tiny_checkpoint

V_SCHEDULE = NoiseSchedule.from_config({"prediction_type": "v_prediction"})


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("student"))


def conditioning(batch: int, num_steps: int | None = None) -> Conditioning:
    generator = torch.Generator().manual_seed(1)
    steps = None if num_steps is None else torch.full((batch,), num_steps)
    return Conditioning(torch.randn(batch, 20, 32, generator=generator), torch.ones(batch, 20), steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_conversion_recovers_the_parts_of_noisy_latents(prediction_type: PredictionType) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 16, 8, 8, generator=generator)
    alpha, sigma = V_SCHEDULE.at(torch.tensor([20, 300, 700, 950]))
    latents = alpha * x0 + sigma * eps
    prediction = eps if prediction_type == "epsilon" else alpha * eps - sigma * x0
    x0_found, eps_found = to_x0_eps(prediction, latents, alpha, sigma, prediction_type)
    torch.testing.assert_close(x0_found, x0, atol=1e-4, rtol=0)
    torch.testing.assert_close(eps_found, eps, atol=1e-5, rtol=0)
    torch.testing.assert_close(x0_to_eps(x0_found, latents, alpha, sigma), eps, atol=1e-4, rtol=0)


def test_conversion_of_a_flow_recovers_the_parts_of_noisy_videos() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 3, 4, 2, 8, 8, generator=generator)
    alpha, sigma = flow_schedule(3.0).at(torch.tensor([20, 500, 999]), ndim=5)
    x0_found, eps_found = to_x0_eps(eps - x0, alpha * x0 + sigma * eps, alpha, sigma, "flow_prediction")
    torch.testing.assert_close(x0_found, x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(eps_found, eps, atol=1e-5, rtol=0)


def test_conversion_is_fp32_whatever_the_network_returns() -> None:
    half = torch.ones(1, 16, 8, 8, dtype=torch.bfloat16)
    x0, eps = to_x0_eps(half, half, *V_SCHEDULE.at(torch.tensor([999])), "v_prediction")
    assert x0.dtype == eps.dtype == torch.float32


def test_step_count_changes_a_students_answer_but_not_a_plain_teachers(student: Path, tmp_path: Path) -> None:
    latents, timesteps = (
        torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([999, 499]),
    )
    aware = NetworkDenoiser(load_transformer(student), V_SCHEDULE, predict)
    plain = NetworkDenoiser(
        load_transformer(make_tiny_checkpoint(tmp_path, student=False)), V_SCHEDULE, predict
    )
    assert aware.step_aware
    assert not plain.step_aware
    with torch.no_grad():
        assert not torch.equal(
            aware(latents, timesteps, conditioning(2, 1)), aware(latents, timesteps, conditioning(2, 4))
        )
        assert torch.equal(
            aware(latents, timesteps, conditioning(2)), aware(latents, timesteps, conditioning(2, 4))
        )
        assert torch.equal(
            plain(latents, timesteps, conditioning(2, 1)), plain(latents, timesteps, conditioning(2, 4))
        )


def test_rows_may_have_different_timesteps_and_step_counts(student: Path) -> None:
    denoiser = NetworkDenoiser(load_transformer(student), V_SCHEDULE, predict)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([999, 499])
    cond = conditioning(2)
    cond = Conditioning(cond.text, cond.mask, torch.tensor([1, 2]))
    with torch.no_grad():
        together = denoiser(latents, timesteps, cond)
        for row in (slice(0, 1), slice(1, 2)):
            alone = denoiser(latents[row], timesteps[row], cond.rows(row))
            torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=0)


def test_learned_variance_is_dropped(tmp_path: Path) -> None:
    directory = make_tiny_checkpoint(tmp_path, student=False, transformer_config={"out_channels": 32})
    denoiser = NetworkDenoiser(load_transformer(directory), V_SCHEDULE, predict)
    with torch.no_grad():
        assert denoiser(torch.zeros(1, 16, 8, 8), torch.tensor([999]), conditioning(1)).shape == (1, 16, 8, 8)


def test_large_models_are_told_the_size_in_pixels(tmp_path: Path) -> None:
    config = {"use_additional_conditions": True, "attention_head_dim": 48, "cross_attention_dim": 96}
    directory = make_tiny_checkpoint(tmp_path, student=False, transformer_config=config)
    transformer = load_transformer(directory)
    sizes = size_conditions(transformer, torch.zeros(2, 16, 8, 4))
    assert sizes["resolution"] is not None
    assert sizes["resolution"].tolist() == [[64, 32], [64, 32]]
    assert sizes["aspect_ratio"] is not None
    assert sizes["aspect_ratio"].tolist() == [[2.0], [2.0]]
    with torch.no_grad():
        NetworkDenoiser(transformer, V_SCHEDULE, predict)(
            torch.zeros(2, 16, 8, 8), torch.tensor([9, 99]), conditioning(2)
        )


def test_autocast_stays_close_and_returns_fp32(student: Path) -> None:
    transformer = load_transformer(student)
    latents, timesteps = (
        torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([999, 249]),
    )
    with torch.no_grad():
        exact = NetworkDenoiser(transformer, V_SCHEDULE, predict)(latents, timesteps, conditioning(2, 4))
        cast = NetworkDenoiser(transformer, V_SCHEDULE, predict, autocast=torch.bfloat16)(
            latents, timesteps, conditioning(2, 4)
        )
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, exact, atol=0.05, rtol=0)


def test_single_row_expands_and_batches_concatenate() -> None:
    both = concat([conditioning(3, 4), conditioning(1, 4).expand(3)])
    assert len(both) == 6
    assert both.num_steps is not None
    assert both.num_steps.tolist() == [4] * 6
    with pytest.raises(ValueError, match="2 rows"):
        conditioning(2).expand(3)
    with pytest.raises(ValueError, match="num_steps"):
        concat([conditioning(1, 4), conditioning(1)])


def test_pooled_captions_follow_their_rows() -> None:
    cond = Conditioning(torch.randn(2, 4, 8), torch.ones(2, 4), pooled=torch.randn(2, 6))
    assert cond.pooled is not None
    both = concat([cond.rows(slice(1, 2)).expand(3), cond]).to("cpu")
    assert both.pooled is not None
    assert torch.equal(both.pooled, cond.pooled[[1, 1, 1, 0, 1]])
    with pytest.raises(ValueError, match="pooled"):
        concat([cond, Conditioning(cond.text, cond.mask)])

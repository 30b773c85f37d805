"""Distances between pictures: Fréchet's, those of one prompt, and those from the same noise."""

import pytest
import torch
from torch import Tensor

from engines.gate.evaluator import paired_distance, pairwise_distance
from engines.gate.frechet import Reference, frechet_distance


def gaussian(num: int, dim: int, seed: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn(
        num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# Fréchet distance


def test_distance_of_known_gaussians() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    zero, three = torch.zeros(3, dtype=torch.float64), torch.full((3,), 3.0, dtype=torch.float64)
    assert frechet_distance(zero, eye, zero, eye) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(zero, eye, three, eye) == pytest.approx(27.0)
    assert frechet_distance(zero, eye, zero, 4 * eye) == pytest.approx(3.0)  # 3 axes of (2 - 1)^2


def test_distance_of_correlated_gaussians_matches_the_matrix_square_root() -> None:
    a, b = gaussian(500, 6, 1) @ gaussian(6, 6, 2), gaussian(500, 6, 3) @ gaussian(6, 6, 4)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eig(cov_a @ cov_b)
    root = (vectors @ torch.diag(values.sqrt()) @ torch.linalg.inv(vectors)).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a.mean(0), cov_a, b.mean(0), cov_b) == pytest.approx(float(expected), rel=1e-6)


def test_same_distribution_is_near_zero_and_a_constant_picture_is_a_hundred_percent() -> None:
    reference = Reference.fit(gaussian(4000, 16, 0), num_axes=16)
    assert reference.distance(gaussian(4000, 16, 1)) < 1.0
    constant = reference.centre.expand(50, -1) + 1e-6 * gaussian(50, 16, 2)
    assert reference.distance(constant) == pytest.approx(100.0, abs=0.1)


def test_distance_grows_with_the_shift_and_counts_missing_variance() -> None:
    reference = Reference.fit(gaussian(4000, 16, 0), num_axes=8)
    shifts = [reference.distance(gaussian(2000, 16, 1, mean=mean)) for mean in (0.0, 0.3, 1.0)]
    assert shifts == sorted(shifts)
    assert reference.distance(gaussian(2000, 16, 1, std=0.5)) > 5.0


def test_one_picture_is_no_distribution() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Reference.fit(torch.zeros(1, 4))


def test_diversity_is_the_mean_distance_of_pictures_of_one_prompt() -> None:
    features = torch.tensor([[0.0], [3.0], [3.0], [100.0], [100.0], [100.0]])
    assert pairwise_distance(features, 3) == pytest.approx((3 + 3 + 0) / 3 / 2)


def test_paired_distance_is_none_for_the_same_and_a_hundred_for_strangers() -> None:
    features, others = gaussian(500, 32, 0), gaussian(500, 32, 1)
    assert paired_distance(features, features) == 0.0
    assert paired_distance(features, others) == pytest.approx(100.0, abs=2.0)
    assert paired_distance(features + 0.1 * others, features) < 15.0

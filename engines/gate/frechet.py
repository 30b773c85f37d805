"""Fréchet distance between two sets of pictures, in some network's features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    """The real pictures' features: their principal axes, and the Gaussian they form along them.

    Attributes:
        centre: (D,) mean of the features.
        axes: (D, P) principal axes, the largest variance first.
        covariance: (P, P) along the axes.
        total_variance: over all D features, not only along the axes.
    """

    centre: Tensor
    axes: Tensor
    covariance: Tensor
    total_variance: float

    @classmethod
    def fit(cls, features: Tensor, num_axes: int = 64) -> Reference:
        """Fit to (N, D) features; with fewer axes than D a thousand pictures estimate a covariance well."""
        features = features.double()
        if len(features) < 2:
            raise ValueError(f"a distribution needs at least 2 pictures, got {len(features)}")
        covariance = torch.cov(features.T).reshape(features.shape[1], -1)
        variances, axes = torch.linalg.eigh(covariance)
        order = variances.argsort(descending=True)[:num_axes]
        return cls(
            centre=features.mean(0),
            axes=axes[:, order],
            covariance=torch.diag(variances[order].clamp(min=0.0)),
            total_variance=float(covariance.trace()),
        )

    def distance(self, features: Tensor) -> float:
        """Fréchet distance of (N, D) features, in percent of the real pictures' total variance.

        0 is the same distribution; 100 is every picture being the real pictures' mean. It depends on N, so
        only distances at equal N compare.
        """
        projected = (features.double() - self.centre) @ self.axes
        covariance = torch.cov(projected.T).reshape(self.axes.shape[1], -1)
        squared = frechet_distance(
            projected.mean(0), covariance, torch.zeros_like(projected[0]), self.covariance
        )
        return 100.0 * squared / self.total_variance


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson & Landau, 1982), as FID uses it.

    Args:
        mean, other_mean: (P,) float64.
        covariance, other_covariance: (P, P) float64, positive semi-definite.
    """
    # the trace of (A B)^1/2 equals that of (A^1/2 B A^1/2)^1/2, which is symmetric
    variances, axes = torch.linalg.eigh(covariance)
    root = axes * variances.clamp(min=0.0).sqrt() @ axes.T
    shared = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0.0).sqrt().sum()
    squared = (
        (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2.0 * shared
    )
    return max(0.0, float(squared))

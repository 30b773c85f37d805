"""The normalisation of CogVideoX's decoder, conditioned on the latents at the latents' own size.

In each norm diffusers enlarges the latents to the size of the features and then mixes their channels. It
enlarges by nearest neighbour and mixes by 1 x 1 x 1 convolutions, so the two may change places: the same
numbers, and the mixing is done once per latent instead of once per feature. The demo's decoder, eager on one
core, takes half the time it took.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D
from torch import Tensor, nn
from torch.nn import functional


class SpatialNorm(nn.Module):
    """Stands in for a `CogVideoXSpatialNorm3D`; parameters keep their names.

    Args:
        norm: whose parameters it takes over.
    """

    def __init__(self, norm: CogVideoXSpatialNorm3D) -> None:
        super().__init__()
        self.norm_layer, self.conv_y, self.conv_b = norm.norm_layer, norm.conv_y, norm.conv_b

    def forward(
        self,
        f: Tensor,
        zq: Tensor,
        conv_cache: Any = None,  # noqa: ARG002 - of the signature that diffusers calls
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalise, then scale and shift by what the latents say.

        Args:
            f: (B, C, F, H, W) features.
            zq: (B, D, f, h, w) latents of the same chunk.
            conv_cache: not used: these convolutions do not look back in time.

        Returns:
            (B, C, F, H, W), and an empty cache for the next chunk.
        """
        # `.conv`: the causal wrapper would hand a copy of its whole input on to the next chunk
        scale, shift = self.conv_y.conv(zq), self.conv_b.conv(zq)
        features = self.norm_layer(f)
        num_frames = f.shape[2]
        if num_frames == 1 or num_frames % 2 == 0:
            return _modulate(features, scale, shift), {}
        # the video's first frame has a latent frame to itself
        first = _modulate(features[:, :, :1], scale[:, :, :1], shift[:, :, :1])
        rest = _modulate(features[:, :, 1:], scale[:, :, 1:], shift[:, :, 1:])
        return torch.cat([first, rest], dim=2), {}


def _modulate(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    size = features.shape[-3:]
    return features * functional.interpolate(scale, size=size) + functional.interpolate(shift, size=size)


def use_spatial_norms(module: nn.Module) -> None:
    """Put a `SpatialNorm` in the place of every `CogVideoXSpatialNorm3D` below `module`."""
    for name, child in list(module.named_children()):
        if isinstance(child, CogVideoXSpatialNorm3D):
            setattr(module, name, SpatialNorm(child))
        else:
            use_spatial_norms(child)

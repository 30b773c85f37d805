"""The studio's AutoencoderKL: a decoder that draws crisp outlines from a linear code of patches.

As for the smaller demo, the code is fixed before any network learns, so that teacher and decoder can learn at
the same time. What a decoder has to add is what 32 numbers of a patch leave open: where exactly an edge runs.
"""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from engines.demo.codec import PatchCode
from engines.demo.codec import make_vae as make_autoencoder
from engines.demo.fit import FitConfig, autocast, fit
from engines.demo.judge import to_input
from engines.demo.studio.renderer import IMAGE_SIZE

LATENT_CHANNELS = 32
LATENT_SIZE = IMAGE_SIZE // 8
_LOG_VARIANCE = -12.0  # the encoder's code is meant to be exact; its posterior is a formality
_EDGE_WEIGHT = 4.0


def make_vae() -> AutoencoderKL:
    """An untrained f8 AutoencoderKL for 96 x 96 pictures with 32 latent channels and scaling factor 1."""
    return make_autoencoder((16, 32, 96, 128), latent_channels=LATENT_CHANNELS, sample_size=IMAGE_SIZE)


def edges(masks: Tensor) -> Tensor:
    """Where outlines run in masks (B, H, W): (B, 1, H, W), 1 beside an outline, else 0."""
    marks = masks[:, None].float()
    padded = functional.pad(marks, (1, 1, 1, 1), mode="replicate")
    return (functional.max_pool2d(padded, 3, 1) != -functional.max_pool2d(-padded, 3, 1)).float()


def picture_loss(decoded: Tensor, target: Tensor, masks: Tensor) -> Tensor:
    """Absolute differences of pixels and of steps between neighbours, outlines counting more; scalar.

    Args:
        decoded, target: (B, 3, H, W) in [-1, 1].
        masks: (B, H, W), the renderer's.
    """
    weight = 1 + _EDGE_WEIGHT * edges(masks)
    weight = weight / weight.mean()
    total = (weight * (decoded - target).abs()).mean()
    for axis in (2, 3):
        step = (decoded.diff(dim=axis) - target.diff(dim=axis)).abs()
        total = total + (weight.narrow(axis, 1, step.shape[axis]) * step).mean()
    return total


def train_vae(
    images: Tensor,
    masks: Tensor,
    code: PatchCode,
    config: FitConfig,
    directory: Path,
    *,
    batch: int = 16,
    noise: float = 0.06,
    begin: Path | None = None,
) -> AutoencoderKL:
    """Fit the decoder to the code of (N, 96, 96, 3) uint8 pictures and the encoder to the code itself.

    The decoder sees codes with a little noise, as a diffusion model makes them. The encoder has the easier
    job and trains on every fourth step only. `begin` as of `fit`.
    """
    torch.manual_seed(config.seed)
    vae = make_vae().to(memory_format=torch.channels_last)
    device = config.device
    on_device = PatchCode(code.mean.to(device), code.encode_matrix.to(device))

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=rng).to(images.device)
        drawn = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng)))
        flip, turn = torch.rand(2, generator=rng).tolist()
        pictures, marks = images[rows].to(device), masks[rows].to(device)
        if flip < 0.5:
            pictures, marks = pictures.flip(2), marks.flip(2)
        target, latents = to_input(pictures), on_device.encode(pictures)
        level = noise * torch.rand((batch, 1, 1, 1), generator=drawn, device=device)
        noisy = latents + level * torch.randn(latents.shape, generator=drawn, device=device)
        with autocast(device):
            decoded = vae.decoder(noisy.contiguous(memory_format=torch.channels_last)).float()
        total = picture_loss(decoded, target, marks)
        if turn < 1 / 4:
            with autocast(device):
                moments = vae.encoder(target.contiguous(memory_format=torch.channels_last)).float()
            mean, log_variance = moments.chunk(2, dim=1)
            total = total + functional.mse_loss(mean, latents)
            total = total + 1e-3 * (log_variance - _LOG_VARIANCE).square().mean()
        return total

    fit("vae", {"vae": vae}, loss, config, directory, begin=begin)
    return vae.eval()


@torch.no_grad()
def decoded(vae: AutoencoderKL, latents: Tensor, *, batch: int = 100) -> Tensor:
    """Pictures (N, 96, 96, 3) uint8 of latents (N, 32, 12, 12), on the CPU."""
    parts = []
    for part in latents.split(batch):
        pixels = vae.decode(part.to(vae.device, vae.dtype)).sample.float()
        parts.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(parts)

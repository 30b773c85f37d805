"""The video demo's AutoencoderKLCogVideoX, taught to speak a code that is fixed beforehand.

As for the pictures of the image demo, the latent code is the principal components of patches, here of 4
frames x 8 x 8 pixels: the teacher can train on exact codes while the autoencoder still learns them. CogVideoX
has a cell for the first frame alone; it counts as four equal frames, so that one basis serves all cells.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    AutoencoderKLCogVideoX,
    CogVideoXResnetBlock3D,
    CogVideoXSpatialNorm3D,
)
from torch import Tensor
from torch.nn import functional

from engines.demo.fit import FitConfig, autocast, fit
from engines.demo.video.scenes import CLIP_SIZE

PATCH = 8
FRAMES_PER_CELL = 4
LATENT_CHANNELS = 48
_KERNEL = (FRAMES_PER_CELL, PATCH, PATCH)
_PATCH_SIZE = 3 * FRAMES_PER_CELL * PATCH * PATCH


def to_pixels(videos: Tensor) -> Tensor:
    """(B, F, H, W, 3) uint8 to (B, 3, F, H, W) fp32 in [-1, 1]."""
    return videos.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def num_cells(num_frames: int) -> int:
    """Latent frames of a video of 4 k + 1 frames: k + 1."""
    return (num_frames - 1) // FRAMES_PER_CELL + 1


@dataclass(frozen=True, slots=True)
class ClipCode:
    """Principal components of space-time patches: a linear code (48, 3, 4, 4) of 9 frames of 32 x 32.

    Attributes:
        mean: (768,) of a flattened patch of a clip in [-1, 1].
        encode_matrix: (48, 768); the standard deviation of a channel is the square root of its component's,
            so that coarse components stay louder than fine ones, and the whole code has unit variance.
    """

    mean: Tensor
    encode_matrix: Tensor

    @classmethod
    def fit(cls, videos: Tensor) -> "ClipCode":
        """From (N, 4 k + 1, H, W, 3) uint8 clips."""
        covariance, total, count = torch.zeros(_PATCH_SIZE, _PATCH_SIZE).double(), torch.zeros(()), 0
        for part in videos.split(200):
            patches = _patches(_with_equal_frames(to_pixels(part))).double()
            covariance, total = covariance + patches.T @ patches, total + patches.sum(0)
            count += len(patches)
        mean = total / count
        values, vectors = torch.linalg.eigh(covariance / count - torch.outer(mean, mean))
        values, vectors = values.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS]
        scale = values**-0.25
        scale = scale / (values * scale**2).mean().sqrt()
        return cls(mean.float(), (vectors * scale).T.contiguous().float())

    def encode(self, videos: Tensor) -> Tensor:
        """(B, 4 k + 1, H, W, 3) uint8 to (B, 48, k + 1, H / 8, W / 8) fp32."""
        kernel = self.encode_matrix.view(LATENT_CHANNELS, 3, *_KERNEL)
        bias = -(self.encode_matrix @ self.mean)
        return functional.conv3d(_with_equal_frames(to_pixels(videos)), kernel, bias, stride=_KERNEL)

    def decode(self, latents: Tensor) -> Tensor:
        """The best linear reconstruction, (B, 3, 4 k + 1, H, W) in [-1, 1]; what the decoder has to beat."""
        inverse = torch.linalg.pinv(self.encode_matrix).T.contiguous().view(LATENT_CHANNELS, 3, *_KERNEL)
        mean = self.mean.view(3, *_KERNEL).repeat(1, *latents.shape[2:])
        frames = functional.conv_transpose3d(latents, inverse, stride=_KERNEL) + mean
        first, rest = frames[:, :, :FRAMES_PER_CELL], frames[:, :, FRAMES_PER_CELL:]
        return torch.cat([first.mean(2, keepdim=True), rest], dim=2)


def _with_equal_frames(pixels: Tensor) -> Tensor:
    """(B, 3, 4 k + 1, H, W) to (B, 3, 4 k + 4, H, W): the first frame is shown four times."""
    return torch.cat([pixels[:, :, :1].expand(-1, -1, FRAMES_PER_CELL - 1, -1, -1), pixels], dim=2)


def _patches(pixels: Tensor) -> Tensor:
    """(B, 3, 4 F, 8 h, 8 w) to (B F h w, 768), channel first."""
    batch, _, frames, height, width = pixels.shape
    grid = pixels.view(
        batch, 3, frames // FRAMES_PER_CELL, FRAMES_PER_CELL, height // PATCH, PATCH, width // PATCH, PATCH
    )
    return grid.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, _PATCH_SIZE)


def make_vae(block_out_channels: tuple[int, int, int, int] = (16, 24, 32, 48)) -> AutoencoderKLCogVideoX:
    """An untrained autoencoder of CogVideoX's compression (4 frames, 8 x 8 pixels); 1.5 M parameters."""
    return AutoencoderKLCogVideoX(
        block_out_channels=block_out_channels,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=FRAMES_PER_CELL,
        sample_height=CLIP_SIZE,
        sample_width=CLIP_SIZE,
        scaling_factor=1.0,
    )


def silence(vae: AutoencoderKLCogVideoX) -> None:
    """Start residual branches at zero and norms without regard to the code, in place."""
    for module in vae.modules():
        if isinstance(module, CogVideoXResnetBlock3D):
            _zero(module.conv2.conv)
        elif isinstance(module, CogVideoXSpatialNorm3D):
            _zero(module.conv_y.conv, bias=1.0)
            _zero(module.conv_b.conv)


def _zero(layer: Any, bias: float = 0.0) -> None:
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(layer.bias, bias)


_LOG_VARIANCE = -12.0  # the encoder's code is meant to be exact; its posterior is a formality


def train_vae(
    videos: Tensor, code: ClipCode, config: FitConfig, directory: Path, *, batch: int = 8
) -> AutoencoderKLCogVideoX:
    """Fit the decoder to the code of (N, 9, 32, 32, 3) uint8 clips and the encoder to the code itself.

    The decoder sees codes with a little noise, as a diffusion model makes them. The encoder, not needed to
    draw, trains on every third step, and then as long again alone: its steps take a quarter of the time.
    """
    torch.manual_seed(config.seed)
    vae = make_vae()
    silence(vae)

    def encoder_loss(target: Tensor, latents: Tensor) -> Tensor:
        with autocast(config.device):
            moments = vae.encoder(target)[0].float()
        mean, log_variance = moments.chunk(2, dim=1)
        spread = (log_variance - _LOG_VARIANCE).square().mean()
        return cast("Tensor", functional.mse_loss(mean, latents) + 1e-3 * spread)

    def draw(rng: torch.Generator) -> Tensor:
        clips = videos[torch.randint(len(videos), (batch,), generator=rng)]
        return clips.flip(3) if torch.rand((), generator=rng) < 0.5 else clips

    def loss(rng: torch.Generator) -> Tensor:
        clips = draw(rng)
        target, latents = to_pixels(clips), code.encode(clips)
        noise = torch.randn(latents.shape, generator=rng)
        noise = noise * 0.08 * torch.rand((batch, 1, 1, 1, 1), generator=rng)
        turn = torch.rand((), generator=rng)
        noisy = (latents + noise).to(config.device)
        target, latents = target.to(config.device), latents.to(config.device)
        with autocast(config.device):
            decoded = vae.decoder(noisy)[0].float()
        total = (decoded - target).abs().mean()
        for axis in (2, 3, 4):  # edges in space and time are few pixels, but they are what one looks at
            total = total + (decoded.diff(dim=axis) - target.diff(dim=axis)).abs().mean()
        if turn < 1 / 3:
            total = total + encoder_loss(target, latents)
        return cast("Tensor", total)

    def loss_of_encoder(rng: torch.Generator) -> Tensor:
        clips = draw(rng)
        return encoder_loss(to_pixels(clips).to(config.device), code.encode(clips).to(config.device))

    fit("vae", {"vae": vae}, loss, config, directory)
    fit("encoder", {"vae.encoder": vae.encoder}, loss_of_encoder, config, directory)
    return vae.eval()

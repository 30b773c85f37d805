"""Pictures of scenes and the outlines of their solids, by ray casting; on a CPU or a GPU."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engines.demo.studio.scenes import Scene
from engines.demo.studio.shading import Points, hazy, mirrored, shade, sky_colour, solids_of, surface
from engines.demo.studio.solids import trace, unit
from engines.demo.studio.staging import FIELD_OF_VIEW_DEG, Stage, stage, sun_offsets

IMAGE_SIZE = 96
_EXPOSURE = 0.72


@dataclass(frozen=True, slots=True)
class Rendered:
    """Pictures and what is where in them.

    Attributes:
        images: (N, size, size, 3) uint8.
        masks: (N, size, size) uint8, 0 where no solid covers half of the pixel, else 1 + its place in
            the scene.
    """

    images: Tensor
    masks: Tensor


def _camera_rays(scenes: Stage, size: int, samples: int) -> Tensor:
    """(3, N, size * size * samples^2) unit directions, those of one pixel side by side."""
    reach = math.tan(math.radians(FIELD_OF_VIEW_DEG) / 2)
    steps = torch.arange(size * samples, device=scenes.camera.device) + 0.5
    steps = ((steps / (size * samples) * 2 - 1) * reach).view(size, samples)
    v = -steps[:, None, :, None].expand(size, size, samples, samples).reshape(-1)
    u = steps[None, :, None, :].expand(size, size, samples, samples).reshape(-1)
    axes = (scenes.forward, scenes.right, scenes.up)
    forward, right, up = (axis.T[:, :, None] for axis in axes)
    return unit(forward + u * right + v * up)


def _sun_rays(scenes: Stage, samples: int) -> Tensor:
    """(3, N, samples^2): the sun as the samples of a pixel see it."""
    sun = scenes.sun_at.T[:, :, None]
    across = unit(torch.stack([-sun[1], sun[0], torch.zeros_like(sun[0])]))
    upwards = torch.stack(
        [
            sun[1] * across[2] - sun[2] * across[1],
            sun[2] * across[0] - sun[0] * across[2],
            sun[0] * across[1] - sun[1] * across[0],
        ]
    )
    offsets = sun_offsets(samples * samples).to(sun.device)
    return unit(sun + offsets[:, 0] * across + offsets[:, 1] * upwards)


def _draw(scenes: Stage, size: int, samples: int) -> tuple[Tensor, Tensor]:
    subsamples = samples * samples
    rays = _camera_rays(scenes, size, samples)
    num, per_picture = rays.shape[1], rays.shape[2]
    camera = scenes.camera.T[:, :, None]
    found = trace(solids_of(scenes), camera, rays)
    ground = torch.where(rays[2] < -1e-4, -camera[2] / rays[2].clamp_max(-1e-4), math.inf)
    t_first = torch.minimum(found.t, ground).reshape(-1)
    slot = torch.where(found.t < ground, found.slot, -1).reshape(-1)
    row_all = torch.arange(num, device=rays.device)[:, None].expand(num, per_picture).reshape(-1)
    rays = rays.reshape(3, -1)
    suns = _sun_rays(scenes, samples)[:, :, None, :].expand(3, num, per_picture // subsamples, subsamples)
    suns = suns.reshape(3, -1)
    colour = torch.empty_like(rays)
    pixel = 2 * math.tan(math.radians(FIELD_OF_VIEW_DEG) / 2) / size

    sky = (~torch.isfinite(t_first)).nonzero()[:, 0]
    colour[:, sky] = sky_colour(scenes, row_all[sky], rays[:, sky])
    for on_solid in (False, True):
        index = ((slot >= 0) == on_solid).logical_and(torch.isfinite(t_first)).nonzero()[:, 0]
        row, ray, t = row_all[index], rays[:, index], t_first[index]
        at = scenes.camera.T[:, row] + t * ray
        normal = found.normal.reshape(3, -1)[:, index] if on_solid else None
        local = found.local.reshape(3, -1)[:, index] if on_solid else None
        footprint = pixel * t / (1 if on_solid else ray[2].abs().clamp_min(0.03))
        points = surface(scenes, row, slot[index], at, ray, suns[:, index], normal, local, footprint)
        light = _lit(scenes, points)
        colour[:, index] = hazy(scenes, row, light, t, on_solid=on_solid)
    return _developed(colour).view(3, num, size, size, subsamples), slot.view(num, size, size, subsamples)


def _lit(scenes: Stage, points: Points) -> Tensor:
    return shade(scenes, points) + mirrored(scenes, points)


def _developed(light: Tensor) -> Tensor:
    """Light to display values in [0, 1]: a film curve (Narkowicz 2016), then gamma."""
    x = (light * _EXPOSURE).clamp_min(0)
    x = x * (2.51 * x + 0.03) / (x * (2.43 * x + 0.59) + 0.14)
    return x.clamp(0, 1) ** (1 / 2.2)


def _majority(slot: Tensor) -> Tensor:
    """(..., samples) slots to the one that covers half of the pixel, from 1; 0 if none does."""
    out = torch.zeros(slot.shape[:-1], dtype=torch.uint8, device=slot.device)
    for number in range(int(slot.max().item()) + 1):
        out[(slot == number).sum(-1) * 2 >= slot.shape[-1]] = number + 1
    return out


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    seed: int,
    *,
    size: int = IMAGE_SIZE,
    samples: int = 2,
    chunk: int = 4,
    device: torch.device | str = "cpu",
    keep: bool = False,
) -> Rendered:
    """Draw complete scenes; scene i always looks the same for the same (seed, i).

    Args:
        scenes: what to draw.
        seed: chooses light, pose, exact place, camera and textures.
        size: height and width in pixels.
        samples: samples per pixel edge, for smooth outlines and soft shadows.
        chunk: pictures cast together; bounds the memory, changes nothing else.
        device: where rays are cast.
        keep: leave the pictures there instead of bringing them to the CPU.
    Raises:
        ValueError: a scene is not complete.
    """
    where = device if keep else "cpu"
    images = torch.empty(len(scenes), size, size, 3, dtype=torch.uint8, device=where)
    masks = torch.empty(len(scenes), size, size, dtype=torch.uint8, device=where)
    for start in range(0, len(scenes), chunk):
        part = scenes[start : start + chunk]
        rngs = [np.random.default_rng([seed, start + i]) for i in range(len(part))]
        colour, slot = _draw(stage(part, rngs).to(device), size, samples)
        pixels = colour.mean(-1).permute(1, 2, 3, 0)
        images[start : start + chunk] = (pixels * 255).round().to(torch.uint8)
        masks[start : start + chunk] = _majority(slot)
    return Rendered(images, masks)

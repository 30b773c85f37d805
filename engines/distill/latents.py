"""Clean latents with their prompts, for methods that need them: rendered, or read from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.distill.config import DistillConfig
from engines.domains import load_domain
from engines.errors import ConfigError
from engines.families.codec import Codec


@dataclass(frozen=True, slots=True)
class Latents:
    """Clean latents (N, ...) fp16 on the CPU, and the prompt of each."""

    latents: Tensor
    prompts: list[str]


def write_latents(path: Path, latents: Tensor, prompts: Sequence[str]) -> None:
    """Write clean latents (N, ...) with their prompts, for `read_latents`."""
    if len(latents) != len(prompts):
        raise ValueError(f"{len(latents)} rows of latents and {len(prompts)} prompts")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents.half().contiguous()}, path, {"prompts": json.dumps(list(prompts))})


def read_latents(path: Path, shape: tuple[int, ...], limit: int) -> Latents:
    """Read the first rows of a file.

    Raises:
        ConfigError: it is missing or no such file, has no prompts, or latents of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            prompts = json.loads((file.metadata() or {}).get("prompts", "null"))
            latents = file.get_tensor("latents")[:limit]
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ConfigError(f"latents: cannot read {path}: {error}") from None
    if not isinstance(prompts, list) or len(prompts[:limit]) != len(latents) or len(latents) == 0:
        raise ConfigError(f"latents: {path}: metadata prompts: a list with one prompt per row is expected")
    if tuple(latents.shape[1:]) != shape:
        raise ConfigError(f"latents: {path}: rows of {tuple(latents.shape[1:])}, the teacher's are {shape}")
    return Latents(latents.half(), [str(prompt) for prompt in prompts[:limit]])


def latents_of_scenes(
    teacher: Path, domain: str, num: int, seed: int, device: torch.device | str = "cpu"
) -> Latents:
    """Have real pictures of a domain rendered, see `engines.domains`, and encode them."""
    codec = Codec(teacher, device)
    prompts, pictures = load_domain(domain).illustrated(num, seed)
    return Latents(torch.cat([codec.encode(part).half() for part in pictures.split(250)]), prompts)


def load_latents(
    config: DistillConfig, shape: tuple[int, ...], device: torch.device | str = "cpu"
) -> Latents | None:
    """Read or make the clean latents that a method needs, with their prompts; None for one that needs none.

    Raises:
        ConfigError: they cannot be read, or are of another shape.
    """
    if config.latents is None:
        return None
    if isinstance(config.latents, Path):
        return read_latents(config.latents, shape, config.num_prompts)
    made = latents_of_scenes(config.teacher, config.latents, config.num_prompts, config.seed, device)
    if tuple(made.latents.shape[1:]) != shape:
        raise ConfigError(f"latents: scenes give rows of {tuple(made.latents.shape[1:])}, not {shape}")
    return made

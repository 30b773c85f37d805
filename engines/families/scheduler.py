"""A diffusers directory's noise levels."""

from __future__ import annotations

from pathlib import Path

from engines.errors import CheckpointError
from engines.families.checkpoint import read_json
from engines.schedule import NoiseSchedule

# fmt: off
SCHEDULERS = (
    "DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete",
    "KDPM2Discrete", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep",
    "SASolver", "LCM", "TCD", "CogVideoXDDIM", "CogVideoXDPM", "FlowMatchEulerDiscrete",
    "FlowMatchHeunDiscrete", "FlowMatchLCM",
)
# fmt: on
"""Diffusers' solvers for models trained with betas or flow matching. Others, of EDM models for one, keep
their noise levels in fields that `NoiseSchedule` does not read, and it must not fall back to its defaults."""


def load_schedule(directory: Path) -> NoiseSchedule:
    """Read the noise levels of a diffusers directory.

    Raises:
        CheckpointError: the scheduler's config is missing, or asks for what `NoiseSchedule` does not know;
            names the field.
    """
    path = directory / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    name = str(config.get("_class_name"))
    if name.removesuffix("Scheduler") not in SCHEDULERS:
        raise CheckpointError(
            f"{path}: field _class_name: {name} is not supported: the noise levels of a "
            "diffusion (DDPM) or flow-matching model are expected"
        )
    try:
        schedule = NoiseSchedule.from_config(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not bool((schedule.alphas.diff() < 0).all()):
        raise CheckpointError(
            f"{path}: fields beta_start, beta_end: noise has to rise with every timestep, with "
            f"{config.get('beta_start')} and {config.get('beta_end')} it does not"
        )
    return schedule

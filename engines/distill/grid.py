"""The timesteps that a run trains: whether a teacher's noise levels allow them."""

from __future__ import annotations

import torch

from engines.distill import forward, trajectory
from engines.distill.config import DistillConfig
from engines.errors import ConfigError
from engines.schedule import NoiseSchedule

MIN_EPSILON_ALPHA = 0.01
"""Below it x0 = (x - sigma eps) / alpha multiplies every error of the network by more than a hundred."""


def check_schedule(config: DistillConfig, schedule: NoiseSchedule) -> None:
    """Refuse settings that a teacher's noise levels do not allow.

    Raises:
        ConfigError: timesteps that the teacher does not have or an epsilon model cannot start from, or a K
            that leaves no room between its steps; names the setting.
    """
    if (config.grid_timesteps or 1) > schedule.num_timesteps:
        raise ConfigError(
            f"grid_timesteps: {config.grid_timesteps}, the teacher has {schedule.num_timesteps} timesteps"
        )
    try:
        table = trajectory.timestep_table(config.student_timesteps(schedule.num_timesteps))
    except ValueError as error:
        raise ConfigError(f"timesteps: {error}") from None
    if int(table.max()) >= schedule.num_timesteps:
        raise ConfigError(
            f"timesteps: {int(table.max())} is not among the teacher's {schedule.num_timesteps}"
        )
    if schedule.prediction_type == "epsilon" and float(schedule.alphas[table.max()]) < MIN_EPSILON_ALPHA:
        raise ConfigError(
            f"timesteps: an epsilon model cannot say its x0 at timestep {int(table.max())}, where alpha is "
            f"{float(schedule.alphas[table.max()]):.3f}; set grid_timesteps to 900 or less"
        )
    if config.method == "lcm":
        grid = config.grid_timesteps or schedule.num_timesteps
        if config.consistency.skip > grid:
            raise ConfigError(f"consistency.skip: {config.consistency.skip} is more than {grid} timesteps")
        return
    for count in config.num_steps:
        step = torch.arange(count)
        now, to = trajectory.step_ends(table[torch.full_like(step, count)], step)
        try:
            forward.draw_tau(now, to, config.objective, torch.Generator())
        except ValueError as error:
            raise ConfigError(f"num_steps: {count} steps: {error}") from None

"""From gradients to weights: optimizers, the rates they run at, and the moving average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engines.distill.checkpoint import TrainingState
from engines.distill.config import DistillConfig
from engines.distill.distributed import local
from engines.errors import ConfigError

FINAL_LR_FACTOR = 0.05


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], lr: float, config: DistillConfig, steps_key: str
) -> torch.optim.Optimizer:
    """AdamW; the steps embedding has a rate of its own and no decay. `peak_lr` is what `lr_factor` scales.

    Raises:
        ConfigError: 8-bit AdamW without bitsandbytes.
    """
    steps = [value for key, value in parameters.items() if key == steps_key]
    others = [value for key, value in parameters.items() if key != steps_key]
    groups = [
        {"params": others, "peak_lr": lr, "weight_decay": config.weight_decay},
        {"params": steps, "peak_lr": config.steps_lr, "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError("optimizer: adamw8bit needs CUDA and pip install bitsandbytes") from None
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, betas=config.betas)
    return optimizer


def make_state(
    config: DistillConfig, parameters: Mapping[str, Mapping[str, nn.Parameter]], steps_key: str
) -> TrainingState:
    """What is trained, and by which optimizers."""
    average = {key: value.detach().clone() for key, value in parameters["student"].items()}
    if config.method == "lcm":
        # its third network is the average itself
        average = {key: value.detach() for key, value in parameters["fake_score"].items()}
        for key, value in parameters["student"].items():
            average[key].copy_(value.detach())
        parameters = {"student": parameters["student"]}
    rates = {"student": config.student_lr, "fake_score": config.fake_lr}
    return TrainingState(
        parameters=parameters,
        optimizers={
            name: make_optimizer(parameters[name], rates[name], config, steps_key) for name in parameters
        },
        average=average,
    )


def lr_factor(iteration: int, config: DistillConfig) -> float:
    """Share of the peak learning rate in an iteration (from 0): a linear rise, a plateau, a linear fall."""
    rise = (iteration + 1) / max(1, config.warmup_iterations)
    left = (config.iterations - iteration) / max(1.0, config.iterations * config.decay_share)
    return min(1.0, rise, FINAL_LR_FACTOR + (1 - FINAL_LR_FACTOR) * left)


@torch.no_grad()
def update_average(state: TrainingState, decay: float) -> None:
    """Move the average towards the parameters; faster at first, so that it forgets the teacher."""
    decay = min(decay, (1 + state.iteration) / (10 + state.iteration))
    current: list[Tensor] = [local(value) for value in state.parameters["student"].values()]
    torch._foreach_lerp_([local(value) for value in state.average.values()], current, 1.0 - decay)

"""FLOPs of one row in each part of an iteration, counted on networks that have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engines.denoiser import Conditioning
from engines.distill.config import DistillConfig
from engines.distill.roles import Roles, separate_roles, shared_roles
from engines.distill.student import student_bucket
from loadtests.distill.backbones import Size, random_teacher

TERA = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFlops:
    """Multiplications and additions of one row, each counted as one.

    Attributes:
        teacher, learner: a forward pass without gradient.
        training: forward and backward pass of a learner.
        recomputed: what gradient checkpointing adds to `training`, which does not contain it.
        parameters: of the network.
        trained: of one learner.
    """

    teacher: int
    learner: int
    training: int
    recomputed: int
    parameters: int
    trained: int

    def iteration(self, rows: Mapping[str, float]) -> float:
        """FLOPs of an iteration, without what is computed again.

        Args:
            rows: of each part, see `stopwatch.PARTS`; "fake_query" are the fake score's without gradient.
        """
        return (
            self.learner * (rows["rollout"] + rows["fake_query"])
            + self.training * (rows["student"] + rows["fake_score"])
            + self.teacher * rows["teacher"]
        )


def count(directory: Path, size: Size, config: DistillConfig) -> RowFlops:
    """Count the roles of a config, built as the trainer builds them.

    Args:
        directory: as `backbones.write_directory` leaves it.
    """
    settings: dict[str, Any] = {
        "max_num_steps": max(config.num_steps),
        "zero_row": config.default_num_steps,
        "autocast": None,
    }
    teacher = random_teacher(directory, dtype=torch.float32, device="meta")
    parameters = sum(parameter.numel() for parameter in teacher.network.parameters())
    if config.lora is None:
        roles = separate_roles(teacher, **settings)
    else:
        roles = shared_roles(teacher, config.lora, seed=0, **settings)
    _, shape = student_bucket(config, teacher.family)
    latents = torch.empty(1, *shape, device="meta")
    times = torch.zeros(1, dtype=torch.int64, device="meta")
    cond = _meta_prompt(size)

    def call(name: str) -> Tensor:
        return {"teacher": roles.teacher, "learner": roles.student}[name].predict(latents, times, cond)

    with torch.no_grad():
        forward = {name: _flops(call, name) for name in ("teacher", "learner")}
    training = _flops(lambda name: _train(roles, call(name)), "learner")
    with_recomputation = training
    if config.gradient_checkpointing:
        network: Any = roles.student.network
        network.enable_gradient_checkpointing()
        with_recomputation = _flops(lambda name: _train(roles, call(name)), "learner")
    return RowFlops(
        **forward,
        training=training,
        recomputed=with_recomputation - training,
        parameters=parameters,
        trained=sum(parameter.numel() for parameter in roles.parameters["student"].values()),
    )


def _flops(work: Callable[[str], object], name: str) -> int:
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        # fused kernels have formulas of their own, which count some of the backward pass twice
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(counter)
        work(name)
    return int(counter.get_total_flops())


def _train(roles: Roles, prediction: Tensor) -> None:
    roles.activate("student")
    prediction.sum().backward()
    for parameter in roles.parameters["student"].values():
        parameter.grad = None


def _meta_prompt(size: Size) -> Conditioning:
    pooled = None if size.pooled_width is None else torch.empty(1, size.pooled_width, device="meta")
    return Conditioning(
        torch.empty(1, size.text_tokens, size.text_width, device="meta"),
        torch.ones(1, size.text_tokens, dtype=torch.int64, device="meta"),
        torch.ones(1, dtype=torch.int64, device="meta"),
        pooled,
    )

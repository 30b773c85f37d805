"""What a run's training computes, in forward passes of one row: methods compare at equal compute only.

A backward pass counts as two forward passes, or as one where gradients reach the input alone. Text encoders,
decoders and optimizers are not counted.
"""

from __future__ import annotations

from engines.distill.config import DistillConfig

TRAINED = 3
"""A forward pass and its backward pass."""


def row_forwards(config: DistillConfig) -> float:
    """Forward passes that each row of an iteration takes, on average over the steps that rows train."""
    guided = 2 if config.objective.guidance_scale > 1.0 else 1
    if config.method == "lcm":
        return TRAINED + guided + 1  # the student, the teacher's step, and the average that is agreed with
    objective = config.objective
    shares = {count: weight / sum(config.num_steps.values()) for count, weight in config.num_steps.items()}
    rollout = sum(share * (count - 1) / 2 for count, share in shares.items())
    fake_update = TRAINED + (1 if objective.fake_anchor > 0.0 else 0)
    teacher = guided if guided == 1 or objective.guidance_tau == "shared" else 3
    # Fisher's gradient passes through the teacher to its input, and through the fake score as if it learnt
    compared = 2 * teacher + TRAINED if objective.divergence == "fisher" else teacher + 1
    total = rollout + TRAINED + config.fake_updates * fake_update + compared
    if objective.diversity > 0.0:
        first = sum(share / count for count, share in shares.items() if count > 1)
        total += first * objective.diversity_substeps * guided
    return total


def iterations_within(config: DistillConfig, budget: float) -> int:
    """As many iterations as `budget` row forwards pay for, at least one."""
    return max(1, int(budget / (config.batch_size * row_forwards(config))))

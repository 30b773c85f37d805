"""What training is said to compute is what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from engines.distill.cost import iterations_within, row_forwards
from engines.distill.latents import write_latents
from engines.noise import seeded_latents
from tests.engines.distilling import PROMPTS, config_of
from tests.engines.test_distill_methods import SHAPE, trainer_of


class Count:
    """Row forwards of networks, a backward pass counted from what its forward pass has prepared."""

    def __init__(self, *networks: nn.Module) -> None:
        self.total = 0
        for network in networks:
            network.register_forward_hook(self._add)

    def _add(self, network: nn.Module, _: object, output: Any) -> None:
        rows: Tensor = output[0]
        learns = any(parameter.requires_grad for parameter in network.parameters())
        self.total += len(rows) * (1 + (2 if learns else 1) * rows.requires_grad)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": {"guidance_scale": 1.0}},
        {"objective": {"guidance_tau": "own"}},
        {"objective": {"divergence": "fisher"}},
        {"objective": {"diversity": 0.25, "diversity_substeps": 2}},
        {"objective": {"fake_anchor": 0.1}, "fake_updates": 2},
        {"method": "dmd2"},
        {"method": "lcm"},
    ],
)
def test_cost_of_an_iteration_is_what_the_networks_are_called_for(
    teacher: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = {"batch_size": 400, "num_steps": {4: 0.5, 2: 0.3, 1: 0.2}, "default_num_steps": 4, **changes}
    if changes.get("method") == "lcm":
        write_latents(tmp_path / "latents.safetensors", seeded_latents(range(3), SHAPE), PROMPTS)
        settings["latents"] = str(tmp_path / "latents.safetensors")
    trainer = trainer_of(teacher, tmp_path, **settings)
    roles = trainer.roles
    count = Count(roles.teacher.network, roles.student.network, roles.fake_score.network)
    trainer.step()
    # rows draw their steps, so a batch is only near the average
    assert count.total == pytest.approx(400 * row_forwards(trainer.config), rel=0.03)


def test_budget_pays_for_whole_iterations_and_for_one_at_least(teacher: Path, tmp_path: Path) -> None:
    config = config_of(teacher, tmp_path, batch_size=10, num_steps={1: 1.0}, default_num_steps=1)
    assert row_forwards(config) == 9.0  # student 3, fake score 3, guided teacher 2, fake score's answer 1
    assert [iterations_within(config, budget) for budget in (1, 90, 269, 270)] == [1, 1, 2, 3]

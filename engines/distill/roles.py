"""Teacher, student and fake score: three networks, or one with an adapter for each that learns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from engines.denoiser import Conditioning, NetworkDenoiser, Predict
from engines.distill.config import LoraSettings
from engines.distill.distributed import World, collected, copy_weights, shard_weights
from engines.distill.student import Teacher
from engines.errors import ConfigError
from engines.families.spec import FamilySpec

LEARNERS = ("student", "fake_score")


@dataclass(slots=True)
class Roles:
    """The three networks of TDM as denoisers, and what of them learns.

    Attributes:
        teacher, student, fake_score: ready to be called, in any order.
        parameters: what each learner trains, by name.
    """

    teacher: NetworkDenoiser
    student: NetworkDenoiser
    fake_score: NetworkDenoiser
    parameters: Mapping[str, dict[str, nn.Parameter]]
    _adapters: Adapters | None = field(default=None)

    def spread(self, world: World, predict: Predict, steps_key: str, *, shard: bool) -> None:
        """Have several processes train these roles together, with copies of all weights or shards of them.

        Args:
            predict: the family's.
            steps_key: the steps embedding, which stays whole, as adapters do.
        """
        if world.size == 1:
            return
        learners = {"student": self.student, "fake_score": self.fake_score}
        if not shard:
            for name, denoiser in learners.items():
                self.activate(name)
                copy_weights(denoiser, predict, world.device)
            return
        if self._adapters is not None:
            learning = [one for named in self.parameters.values() for one in named.values()]
            shard_weights(self.teacher.network, world, learning)
            return
        shard_weights(self.teacher.network, world)
        for denoiser in learners.values():
            shard_weights(denoiser.network, world, [denoiser.network.get_parameter(steps_key)])
        self.parameters = {
            name: dict(denoiser.network.named_parameters()) for name, denoiser in learners.items()
        }

    def activate(self, name: str) -> None:
        """To be called before the backward pass of a learner's loss.

        With shared weights, a checkpointed forward is repeated there, and gradients go to whose adapter is
        switched on.
        """
        if self._adapters is not None:
            self._adapters.switch(name)

    @torch.no_grad()
    def export(self, weights: Mapping[str, Tensor], world: World | None = None) -> dict[str, Tensor]:
        """The student's whole network with `weights` for what it trains, adapters merged into their layers.

        Args:
            weights: by the names in `parameters["student"]`.
            world: the processes that train together, of which the first gets the answer; all have to ask.
        Returns:
            Tensors by the names of the step-aware network without adapters.
        """
        world = world or World()
        whole = collected({**self.student.network.state_dict(), **weights}, world)
        return whole if self._adapters is None or not world.is_main else self._adapters.merged(whole)


def separate_roles(
    teacher: Teacher, *, max_num_steps: int, zero_row: int, autocast: torch.dtype | None
) -> Roles:
    """Student and fake score as full copies of the teacher: all parameters learn.

    Args:
        zero_row: row of the steps embedding that stays zero, see `step_aware_copy`.
    """
    copies = {name: step_aware_copy(teacher, max_num_steps, zero_row).train() for name in LEARNERS}
    plain, student, fake_score = (
        NetworkDenoiser(network, teacher.schedule, teacher.family.predict, autocast=autocast)
        for network in (teacher.network, *copies.values())
    )
    parameters = {name: dict(network.named_parameters()) for name, network in copies.items()}
    return Roles(plain, student, fake_score, parameters)


def shared_roles(
    teacher: Teacher,
    lora: LoraSettings,
    *,
    max_num_steps: int,
    zero_row: int,
    autocast: torch.dtype | None,
    seed: int,
) -> Roles:
    """All three on the teacher's weights, which stay as they are: no copy, and gradients of adapters alone.

    The teacher is the network with its adapters switched off. Each learner has adapters and a steps embedding
    of its own. The network becomes theirs: nobody else may use `teacher` afterwards.

    Args:
        seed: of the adapters' starting values; with their other factor zero they change nothing at first.
    Raises:
        ConfigError: no layer has a target's name.
    """
    adapters = Adapters(
        teacher.network, teacher.family, lora, max_num_steps=max_num_steps, zero_row=zero_row, seed=seed
    )
    plain, student, fake_score = (
        RoleDenoiser(teacher, adapters, name, autocast=autocast) for name in ("teacher", *LEARNERS)
    )
    return Roles(plain, student, fake_score, adapters.parameters, adapters)


class RoleDenoiser(NetworkDenoiser):
    """One role of a shared network: switches to it, then runs."""

    def __init__(
        self, teacher: Teacher, adapters: Adapters, name: str, *, autocast: torch.dtype | None
    ) -> None:
        super().__init__(teacher.network, teacher.schedule, teacher.family.predict, autocast=autocast)
        self._adapters = adapters
        self._name = name

    def predict(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """As `NetworkDenoiser.predict`, in this role."""
        self._adapters.switch(self._name)
        if self._name == "teacher":  # the steps embedding in the network is a learner's
            cond = replace(cond, num_steps=None)
        return NetworkDenoiser.predict(self, latents, timesteps, cond)


class Adapters:
    """The learners' adapters and steps embeddings on one frozen network."""

    def __init__(
        self,
        network: nn.Module,
        family: FamilySpec,
        lora: LoraSettings,
        *,
        max_num_steps: int,
        zero_row: int,
        seed: int,
    ) -> None:
        network.requires_grad_(False)
        family.make_step_aware(network, max_num_steps)
        self._network = network
        self._steps_key = family.steps_key
        self._holder: Any = network.get_submodule(family.steps_key.rpartition(".steps_embedding")[0])
        names = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        matched = [name for name in names if any(name.endswith(target) for target in lora.targets)]
        if not matched:
            ends = sorted({_end(name) for name in names})
            raise ConfigError(
                f"lora.targets: no linear layer's name ends with {', '.join(lora.targets)}; there are "
                f"{', '.join(ends)}"
            )
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=sorted(matched), init_lora_weights=True
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two are meant
            torch.manual_seed(seed)
            for name in LEARNERS:
                inject_adapter_in_model(config, network, name)
        self._layers = {
            name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)
        }
        self._embeddings = {name: self._steps_embedding(zero_row) for name in LEARNERS}
        self.parameters = {name: self._parameters(name) for name in LEARNERS}
        for named in self.parameters.values():
            for parameter in named.values():
                parameter.data = parameter.data.float()  # the base may be bfloat16; what learns is not
        self._current = ""
        self.switch("teacher")

    def switch(self, name: str) -> None:
        """Make the network play a role: "teacher", "student" or "fake_score"."""
        if name == self._current:
            return
        for layer in self._layers.values():
            if name == "teacher":
                layer.enable_adapters(False)
            else:
                layer.set_adapter([name])
                layer.enable_adapters(True)
        if name != "teacher":
            self._holder.steps_embedding = self._embeddings[name]
        self._current = name

    def merged(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's state with the student's adapters added to their layers.

        Args:
            weights: that state, and what the student trains by the names in `parameters["student"]`.
        """
        state = {
            key.replace(".base_layer.", "."): tensor for key, tensor in weights.items() if ".lora_" not in key
        }
        for name, layer in self._layers.items():
            down, up = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
            base = state[f"{name}.weight"]
            delta = layer.scaling["student"] * (up.float() @ down.float())
            state[f"{name}.weight"] = (base.float() + delta.to(base.device)).to(base.dtype)
        return state

    def _steps_embedding(self, zero_row: int) -> nn.Embedding:
        embedding = copy.deepcopy(self._holder.steps_embedding)
        assert isinstance(embedding, nn.Embedding)
        embedding.requires_grad_(True)
        keep_row_zero(embedding.weight, zero_row)
        return embedding

    def _parameters(self, name: str) -> dict[str, nn.Parameter]:
        steps = self._embeddings[name].weight
        assert isinstance(steps, nn.Parameter)
        named = {self._steps_key: steps}
        for path, layer in self._layers.items():
            for factor in ("lora_A", "lora_B"):
                weight = getattr(layer, factor)[name].weight
                assert isinstance(weight, nn.Parameter)
                named[f"{path}.{factor}.weight"] = weight
        return named


def _end(name: str) -> str:
    """The last part of a module's name that is no number, and what follows: "to_out.0", "proj"."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def step_aware_copy(teacher: Teacher, max_num_steps: int, zero_row: int) -> nn.Module:
    """Copy the teacher with a steps embedding, all parameters trainable.

    Args:
        zero_row: the row that never learns and stays zero. A student with this many steps is the
            network without the embedding, which is what software unaware of it runs.
    """
    network = copy.deepcopy(teacher.network)
    teacher.family.make_step_aware(network, max_num_steps)
    network.requires_grad_(True)
    keep_row_zero(network.get_parameter(teacher.family.steps_key), zero_row)
    return network


def keep_row_zero(weight: Tensor, row: int) -> None:
    """Have no gradient reach one row of an embedding."""

    def mask(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[row] = 0.0
        return gradient

    weight.register_hook(mask)

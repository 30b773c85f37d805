"""Several processes that train one student: what each has a share of, and what they agree on.

Every process draws all random numbers of the whole batch and keeps its own rows of them, so that a run has
the same numbers, but for rounding, with any number of processes. They are started by `accelerate launch` or
`torchrun`, which tell each its place in environment variables. Weights are copied (DDP) or sharded (FSDP).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from engines.denoiser import Conditioning, NetworkDenoiser, Predict
from engines.distill.draws import SharedGenerator
from engines.errors import ConfigError

T = TypeVar("T")
CPU = torch.device("cpu")
PATIENCE = timedelta(hours=2)
"""How long a process waits for another one, which may be encoding prompts for all. Launchers notice deaths at
once."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, seen from one of them. One process alone never communicates.

    Attributes:
        rank: of this process; 0 writes files and talks.
        size: how many there are.
        device: of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """This process's rows of a batch of all.

        Raises:
            ConfigError: the rows cannot be divided evenly.
        """
        if batch % self.size:
            raise ConfigError(f"batch_size: {batch} rows cannot be shared evenly by {self.size} processes")
        rows = batch // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers for the whole batch, of which `draws` keeps this process's rows."""
        generator = SharedGenerator()
        generator.rank, generator.size = self.rank, self.size
        return generator.manual_seed(seed)

    def sum(self, values: Tensor) -> Tensor:
        """Add up over processes, in place where they run on one device."""
        if self.size == 1:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved)
        return moved.to(values.device)

    def mean(self, value: float) -> float:
        """Average over processes."""
        return (
            value if self.size == 1 else self.sum(torch.tensor(value, dtype=torch.float64)).item() / self.size
        )

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.size == 1 else self.mean(float(flag)) > 0.0

    def first(self, value: T) -> T:
        """What the first process has."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def rows(self, mine: Tensor) -> Tensor:
        """All processes' rows, of which each has as many, one process's after another's."""
        if self.size == 1:
            return mine
        moved = mine.contiguous().to(self.device)
        parts = [torch.empty_like(moved) for _ in range(self.size)]
        dist.all_gather(parts, moved)
        return torch.cat(parts).to(mine.device)

    def main_first(self, task: Callable[[], T]) -> T:
        """Do a task in the first process, then in the others, which find what it left on disk."""
        if self.size == 1:
            return task()
        result = self.main_only(task)
        return result if self.is_main and result is not None else task()

    def main_only(self, task: Callable[[], T]) -> T | None:
        """Do a task in the first process; others wait, get None, and fail with it if it fails."""
        if self.size == 1:
            return task()
        result, error = None, None
        if self.is_main:
            try:
                result = task()
            except Exception as failure:  # noqa: BLE001  (raised again in every process)
                error = failure
        error = self.first(error)
        if error is not None:
            raise error
        return result


@contextlib.contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that a launcher started, if one did; they stay so until the outermost block ends.

    Args:
        device: "auto" is CUDA if there is one; each process takes the one of its local rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if size == 1:
        yield World(device=torch.device(("cuda" if cuda else "cpu") if device == "auto" else device))
        return
    place = torch.device("cpu")
    if cuda:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    if dist.is_initialized():
        yield World(dist.get_rank(), size, place)
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), size, place)
    finally:
        dist.destroy_process_group()


def wants_shards(setting: bool) -> bool:
    """Whether weights are to be sharded: by the setting, or by `accelerate launch --use_fsdp`."""
    return setting or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


# Weights


class _Call(nn.Module):
    """A family's call of its network as a module, which is what DDP wraps."""

    def __init__(self, network: nn.Module, predict: Predict) -> None:
        super().__init__()
        self.network = network
        self._predict = predict

    def forward(self, latents: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        return self._predict(self.network, latents, times, cond)


def copy_weights(denoiser: NetworkDenoiser, predict: Predict, device: torch.device) -> None:
    """Have gradients averaged over processes as they are computed (DDP).

    What requires gradients now is what learns.
    """
    module = DistributedDataParallel(
        _Call(denoiser.network, predict),
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
    denoiser.call_through(module)


def shard_weights(network: nn.Module, world: World, whole: Iterable[nn.Parameter] = ()) -> None:
    """Shard a network's parameters over processes (FSDP), block by block, in place.

    Forward and backward passes gather a block at a time and give it back, so every process has to make the
    same calls.

    Args:
        whole: parameters that stay whole; whoever trains them averages their gradients.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    blocks = set(getattr(network, "_no_split_modules", None) or ())
    kept = set(whole)
    for module in reversed(list(network.modules())):  # inner blocks before those around them
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, ignored_params=kept)
    # by default the outermost would keep what it gathered, and not see what an update changed since
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    for parameter in kept:
        parameter.data = parameter.data.to(world.device)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, sharded or not; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collected(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """All tensors whole in the first process, and none in the others; every process has to ask.

    Those that were sharded come to the CPU one by one, since together they may not fit on a device.
    """
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        value = gathered(tensor.detach())
        if world.is_main:
            whole[key] = value.cpu() if isinstance(tensor, DTensor) else value
    return whole


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, sharded as another one is."""
    if not isinstance(other, DTensor):
        return tensor.to(other.device)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float, world: World, *, sharded: bool
) -> float:
    """Scale all gradients down to a common norm.

    Args:
        sharded: the network's weights are: gradients of those that stayed whole are averaged first.
    Returns:
        Their norm before.
    """
    learning = [parameter for parameter in parameters if parameter.grad is not None]
    if not sharded:
        return float(nn.utils.clip_grad_norm_(learning, max_norm))
    shards = [parameter for parameter in learning if isinstance(parameter, DTensor)]
    wholes = [parameter for parameter in learning if not isinstance(parameter, DTensor)]
    for parameter in wholes:
        dist.all_reduce(_gradient(parameter))
        _gradient(parameter).div_(world.size)
    zero = torch.zeros((), device=world.device)
    squares = world.sum(sum((local(_gradient(one)).square().sum() for one in shards), zero.clone()))
    norm = float(sum((_gradient(one).square().sum() for one in wholes), squares).sqrt())
    factor = min(1.0, max_norm / (norm + 1e-6))
    for parameter in learning:
        local(_gradient(parameter)).mul_(factor)
    return norm


def _gradient(parameter: nn.Parameter) -> Any:
    assert parameter.grad is not None
    return parameter.grad

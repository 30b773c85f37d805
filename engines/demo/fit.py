"""One resumable training loop for the demo's judge, VAE and teacher."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.bundle.platform import has_fast_bfloat16
from engines.errors import TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How to train.

    Attributes:
        num_steps: optimizer steps; the learning rate warms up for 2 % of them (at most 200), then falls as a
            cosine to 2 %. Those that `fit(begin=...)` goes on from count.
        learning_rate: peak.
        betas: AdamW.
        weight_decay: AdamW, on matrices and kernels only.
        clip: largest gradient norm.
        ema_decay: of the averaged weights that training returns.
        save_every: steps between checkpoints.
        seed: step i draws from generator (seed, i), so a resumed run sees the same batches.
        device: where the modules are trained; random numbers are drawn on the CPU whatever it is.
        max_seconds: training ends after so long, interruptions left out, if that is before `num_steps`; the
            learning rate falls accordingly.
    """

    num_steps: int
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema_decay: float = 0.998
    save_every: int = 500
    seed: int = 0
    device: str = "cpu"
    max_seconds: float = math.inf

    def rate(self, step: int, elapsed: float = 0.0, begun: int = 0) -> float:
        """Learning rate of a step that begins after so many seconds of training.

        Args:
            step: counted from 0.
            elapsed: seconds.
            begun: step at which the optimizer's moments were empty; it warms up from there.
        """
        warm_up = max(1, min(200, self.num_steps // 50))
        share = (step - warm_up) / max(1, self.num_steps - warm_up)
        share = min(1.0, max(0.0, share, elapsed / self.max_seconds))
        fallen = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        return self.learning_rate * fallen * min(1.0, (step - begun + 1) / warm_up)


def autocast(device: str) -> torch.autocast:
    """Compute in bfloat16 inside, where the device is faster at it."""
    return torch.autocast(device, torch.bfloat16, enabled=has_fast_bfloat16(device))


class _Weights:
    """Parameters, their running averages and the optimizer's moments: what a checkpoint holds.

    Attributes:
        begun: the step from which there are moments.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: FitConfig, begun: int = 0) -> None:
        self.begun = begun
        self.live = {f"{name}.{key}": p for name, m in modules.items() for key, p in m.named_parameters()}
        self.average = {key: p.detach().clone() for key, p in self.live.items()}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in self.live.values() if p.ndim >= 2],
                    "weight_decay": config.weight_decay,
                },
                {"params": [p for p in self.live.values() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )

    def save(self, path: Path, step: int, elapsed: float) -> None:
        tensors: dict[str, Tensor] = {f"weight.{key}": p.detach() for key, p in self.live.items()}
        tensors |= {f"average.{key}": p for key, p in self.average.items()}
        for moment in ("exp_avg", "exp_avg_sq"):
            for key, p in self.live.items():  # what no step has reached yet has no moments
                tensors[f"{moment}.{key}"] = self.optimizer.state[p].get(moment, torch.zeros_like(p))
        partial = path.with_suffix(".part")
        done = {"step": str(step), "seconds": f"{elapsed:.3f}", "begun": str(self.begun)}
        save_file({key: value.contiguous() for key, value in tensors.items()}, partial, done)
        partial.replace(path)

    @torch.no_grad()
    def load(self, path: Path) -> tuple[int, float]:
        stored, done = _read(path)
        step, self.begun = int(done["step"]), int(done.get("begun", 0))
        for key, p in self.live.items():
            p.copy_(stored[f"weight.{key}"])
            self.average[key].copy_(stored[f"average.{key}"])
            self.optimizer.state[p] = {
                "step": torch.tensor(float(step - self.begun)),
                "exp_avg": stored[f"exp_avg.{key}"].to(p),
                "exp_avg_sq": stored[f"exp_avg_sq.{key}"].to(p),
            }
        return step, float(done.get("seconds", 0))

    def descend(self, loss: Tensor, *, rate: float, clip: float) -> None:
        """One optimizer step along the clipped gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.live.values()), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), 1 - decay)

    @torch.no_grad()
    def settle(self) -> None:
        for key, p in self.live.items():
            p.copy_(self.average[key])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header."""
    with safe_open(path, framework="pt") as file:
        done: dict[str, str] = file.metadata()
        return {key: file.get_tensor(key) for key in file.keys()}, done  # noqa: SIM118


def keep_average(path: Path, kept: Path) -> int:
    """Write the averaged weights of a checkpoint of `fit` in float16, an eighth of its size.

    Returns:
        The steps that they were trained for, which the file's header has, too.
    """
    stored, done = _read(path)
    averages = {key: value.half() for key, value in stored.items() if key.startswith("average.")}
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file(averages, kept, {name: done[name] for name in ("step", "seconds") if name in done})
    kept.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
    return int(done["step"])


def load_average(path: Path, modules: Mapping[str, nn.Module]) -> int:
    """Put the averaged weights of a checkpoint of `fit`, finished or not, or of `keep_average`, into modules
    built alike.

    Returns:
        The steps that they were trained for.
    """
    stored, done = _read(path)
    with torch.no_grad():
        for name, module in modules.items():
            for key, p in module.named_parameters():
                p.copy_(stored[f"average.{name}.{key}"])
    return int(done["step"])


def _progress() -> Progress:
    """A line with the loss behind it."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )


def fit(
    name: str,
    modules: Mapping[str, nn.Module],
    loss: Callable[[torch.Generator], Tensor],
    config: FitConfig,
    directory: Path,
    *,
    begin: Path | None = None,
) -> None:
    """Train modules in place and leave the averaged (EMA) weights in them.

    A checkpoint in `directory` (safetensors: weights, averages, both optimizer moments) is continued; a
    finished one is only loaded. The loss goes to `NAME.jsonl` beside it.

    Args:
        name: of the stage, for files and the progress line.
        modules: all of them are trained.
        loss: returns a scalar to minimise, drawing everything random from the generator it is given.
        config: how.
        directory: of the checkpoint and the log.
        begin: averaged weights to go on from where `directory` has no checkpoint: their steps count, and the
            optimizer begins anew. None: the modules' own weights, and no step done.

    Raises:
        TrainingError: the loss is not finite; the last checkpoint is kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for module in modules.values():
        module.to(config.device)
    path = directory / f"{name}.safetensors"
    begun = 0 if begin is None or path.exists() else load_average(begin, modules)
    weights = _Weights(modules, config, begun)
    start, before = weights.load(path) if path.exists() else (begun, 0.0)
    smooth, began = math.nan, time.monotonic()
    elapsed = before
    log_path = directory / f"{name}.jsonl"
    with _progress() as progress, log_path.open("a", encoding="utf-8") as log:
        task = progress.add_task(name, total=config.num_steps, completed=start, loss=math.nan)
        for step in range(start, config.num_steps):
            if elapsed >= config.max_seconds:
                break
            value = loss(torch.Generator().manual_seed(config.seed * 1_000_003 + step))
            if not torch.isfinite(value):
                raise TrainingError(f"{name}: loss is {value.item()} at step {step}; kept: {path}")
            weights.descend(value, rate=config.rate(step, elapsed, weights.begun), clip=config.clip)
            weights.follow(min(config.ema_decay, (step + 1) / (step + 10)))
            smooth = value.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * value.item()
            progress.update(task, completed=step + 1, loss=smooth)
            elapsed = before + time.monotonic() - began
            if (step + 1) % 50 == 0:
                row = {
                    "step": step + 1,
                    "loss": round(smooth, 6),
                    "seconds": round(time.monotonic() - began, 1),
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
            last = step + 1 == config.num_steps or elapsed >= config.max_seconds
            if (step + 1) % config.save_every == 0 or last:
                weights.save(path, step + 1, elapsed)
    if not path.exists():  # what was to go on from has had all its steps
        weights.save(path, start, before)
    weights.settle()
    for module in modules.values():
        module.to("cpu")

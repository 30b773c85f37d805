"""Ending a run when its student no longer gets better, by a measure of the gate, and keeping the best one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.denoiser import Conditioning
from engines.distill.checkpoint import TrainingState
from engines.distill.config import DistillConfig, EarlyStopSettings
from engines.distill.disk import room_for
from engines.distill.distributed import World, collected, sharded_like
from engines.distill.prompts import PromptBank, load_prompt_bank
from engines.distill.studio import Studio
from engines.domains import default_domain, load_domain
from engines.errors import CheckpointError
from engines.families.codec import Codec
from engines.families.spec import family_of
from engines.files import write_json
from engines.gate.domain import Domain, FileDomain, Judge, PromptSet
from engines.gate.evaluator import NUM_AXES, REFERENCE_SEED, digest, noise_seeds, read_accuracy
from engines.gate.features import Features, check_features, make_features
from engines.gate.frechet import Reference

PROMPT_SEED = 30_000
"""Of prompts and noise that a gate does not draw: whom it judges must not be chosen by its own pictures."""
FEATURE_BATCH = 64


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the averaged student was worth after an iteration."""

    iteration: int
    value: float


class Examiner:
    """Measures the student of a run: scenes of a demo by their judge, others against the teacher's pictures.

    All processes of the run have to ask; the first one measures.

    Raises:
        CheckpointError: the judge or an image network cannot be used.
        ConfigError: the feature space does not exist.
    """

    def __init__(self, studio: Studio, bank: PromptBank, config: DistillConfig, device: torch.device) -> None:
        assert config.early_stop is not None
        self.settings: EarlyStopSettings = config.early_stop
        self._studio, self._bank, self._config, self._device = studio, bank, config, device
        self._world = studio.world
        kind = family_of(config.teacher).kind
        drawn = isinstance(config.prompts, str)
        self._demo: Domain | None = load_domain(default_domain(kind)) if drawn else None
        self._num_steps = self.settings.num_steps or config.default_num_steps
        domain = self._demo or FileDomain(tuple(bank.captions))
        self._prompts = domain.prompts(PROMPT_SEED, self.settings.pictures)
        self._cond = self._encode(self._prompts)
        self._judge: Judge | None = None
        self._features: Features | None = None
        self._world.main_only(self._load)

    def measure(self) -> float:
        """Draw and measure; the same value in every process."""
        count = len(self._prompts.captions)
        seeds = noise_seeds(PROMPT_SEED, count)
        pictures = self._studio.student(self._cond, seeds, self._num_steps)
        if self.settings.metric == "frechet":
            self._reference  # noqa: B018  (all draw it)
        return self._world.first(self._world.main_only(lambda: self._value(pictures))) or 0.0

    def _value(self, pictures: Tensor) -> float:
        if self.settings.metric == "accuracy":
            assert self._judge is not None
            return read_accuracy(pictures, self._prompts, self._judge)["all"]
        assert self._reference is not None
        assert self._features is not None
        return self._reference.distance(self._features(pictures))

    def _load(self) -> None:
        settings = self.settings
        if self._demo is None:
            check_features(settings.features)
            encode = Codec(self._config.teacher, self._device).encode
            self._features = make_features(
                settings.features, encode, batch=FEATURE_BATCH, device=self._device
            )
            return
        path = settings.judge or self._demo.judge_file
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; early_stop.judge names the demo's judge")
        self._judge = self._demo.load_judge(path)
        self._features = self._judge.features

    def _encode(self, prompts: PromptSet) -> Conditioning:
        if self._demo is None:
            row_of = {caption: row for row, caption in enumerate(self._bank.captions)}
            return self._bank.rows(torch.tensor([row_of[caption] for caption in prompts.captions]))
        bank = self._world.main_first(
            lambda: load_prompt_bank(
                self._config, self._device, prompts.captions, file="early_stop_prompts.safetensors"
            )
        )
        return bank.rows(torch.arange(len(prompts.captions)))

    @cached_property
    def _reference(self) -> Reference | None:
        """What pictures are compared with, in the first process: real ones, or the teacher's."""
        count = self.settings.reference
        if self._demo is not None:
            prompts = self._demo.prompts(REFERENCE_SEED, count)
            render = self._demo.render
            return self._world.main_only(lambda: self._fit(render(prompts)))
        path = self._config.out / "early_stop_reference.safetensors"
        key = digest([self._config.numerics(), count])
        features = self._world.main_only(lambda: _read_features(path, key))
        if not self._world.first(features is not None):
            prompts = FileDomain(tuple(self._bank.captions)).prompts(REFERENCE_SEED, count)
            pictures = self._studio.teacher(
                self._encode(prompts),
                noise_seeds(REFERENCE_SEED, count),
                self.settings.teacher_steps,
                self._config.objective.guidance_scale,
            )
            features = self._world.main_only(lambda: self._keep(path, key, pictures))
        return None if features is None else Reference.fit(features, NUM_AXES)

    def _fit(self, pictures: Tensor) -> Reference:
        assert self._features is not None
        return Reference.fit(self._features(pictures), NUM_AXES)

    def _keep(self, path: Path, key: str, pictures: Tensor) -> Tensor:
        assert self._features is not None
        features = self._features(pictures).contiguous()
        partial = path.with_suffix(".partial")
        with room_for(path, features.nbytes, "The last checkpoint stays"):
            save_file({"features": features}, partial, {"key": key})
            partial.replace(path)
        return features


class EarlyStop:
    """How good the student was so far, the best one's weights, and whether there is hope for a better one.

    Evaluations are in `out/early_stop.json`, weights in `out/best/`. Those of iterations after the newest
    checkpoint are made again when a run goes on.

    Args:
        measure: what the student is worth now, the same in every process.
        world: the processes that train together; all have to make the same calls.
    """

    def __init__(
        self, config: DistillConfig, measure: Callable[[], float], state: TrainingState, world: World
    ) -> None:
        assert config.early_stop is not None
        self.settings: EarlyStopSettings = config.early_stop
        self.evaluations: list[Evaluation] = []
        self._measure, self._state, self._world = measure, state, world
        self._file, self._folder = config.out / "early_stop.json", config.out / "best"
        self._iterations = config.iterations

    def resume(self) -> None:
        """Read what was known at the iteration that the run goes on from.

        Raises:
            CheckpointError: the best weights are missing.
        """
        self.evaluations = self._world.first(self._world.main_only(self._read) or [])
        best = self.best
        if best is not None and not self._world.first(self._path(best).is_file()):
            raise CheckpointError(f"{self._path(best)}: no such file; start over with --restart")

    @property
    def best(self) -> Evaluation | None:
        """The first one of the best."""
        return self._best_until(self._state.iteration)

    def _best_until(self, iteration: int) -> Evaluation | None:
        sign = 1.0 if self.settings.metric == "frechet" else -1.0
        known = [one for one in self.evaluations if one.iteration <= iteration]
        return min(known, key=lambda one: sign * one.value, default=None)

    @property
    def exhausted(self) -> bool:
        """Whether as many in a row as patience allows were no better."""
        best = self.best
        return best is not None and len(self.evaluations) > self.evaluations.index(best) + (
            self.settings.patience
        )

    @property
    def is_due(self) -> bool:
        """Whether the student is to be evaluated as it is, and was not yet."""
        iteration = self._state.iteration
        if iteration == 0 or any(one.iteration == iteration for one in self.evaluations):
            return False
        return iteration % self.settings.every == 0 or iteration == self._iterations

    def evaluate(self) -> str:
        """Measure the student, keep its averaged weights if it is the best one, say what came of it."""
        evaluation = Evaluation(self._state.iteration, self._measure())
        self.evaluations.append(evaluation)
        is_best = self.best is evaluation
        if is_best:
            weights = collected(self._state.average, self._world)
            self._world.main_only(lambda: self._keep(self._path(evaluation), weights))
        self._world.main_only(self._write)
        best = self.best
        assert best is not None
        verdict = "the best so far" if is_best else f"best after iteration {best.iteration}: {best.value:.2f}"
        return f"{self._named(evaluation)}, {verdict}"

    def prune(self, checkpoints: Sequence[int]) -> None:
        """Delete weights that were the best once, and are not the best of any checkpoint that is still there.

        Args:
            checkpoints: their iterations.
        """

        def delete() -> None:
            best = [self._best_until(iteration) for iteration in checkpoints]
            kept = {self._path(one) for one in best if one is not None}
            for path in self._folder.glob("*.safetensors"):
                if path not in kept:
                    path.unlink()

        self._world.main_only(delete)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights into the average.

        Raises:
            CheckpointError: they cannot be read.
        """
        if self.best is None:
            return
        path = self._path(self.best)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        for key, average in self._state.average.items():
            average.copy_(sharded_like(tensors[key], average))

    def summary(self) -> dict[str, Any]:
        """For `student.json`: which iteration was kept, and why."""
        best = self.best
        return {
            "metric": self.settings.metric,
            "kept_iteration": self._state.iteration if best is None else best.iteration,
            "last_iteration": self._state.iteration,
            "stopped_early": self._state.iteration < self._iterations,
            "evaluations": [asdict(one) for one in self.evaluations],
        }

    def verdict(self) -> str:
        """Which iteration was kept, and why, in a sentence."""
        best = self.best
        if best is None:
            return "early stop: the student was never evaluated; its last weights are kept"
        ended = f"the run ended after iteration {self._state.iteration} of {self._iterations}"
        if self._state.iteration < self._iterations:
            ended += f" because {self.settings.patience} evaluations in a row were no better"
        count = len(self.evaluations)
        of = "the only evaluation" if count == 1 else f"the best of {count} evaluations"
        return f"early stop: kept {self._named(best)}, {of}; {ended}"

    def _named(self, evaluation: Evaluation) -> str:
        return f"iteration {evaluation.iteration}: {self.settings.metric} {evaluation.value:.2f} %"

    def _path(self, evaluation: Evaluation) -> Path:
        return self._folder / f"{evaluation.iteration:08d}.safetensors"

    def _read(self) -> list[Evaluation]:
        try:
            stored = json.loads(self._file.read_text(encoding="utf-8"))["evaluations"]
            found = [Evaluation(**one) for one in stored]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._file}: cannot be read: {error}; use --restart") from None
        return [one for one in found if one.iteration <= self._state.iteration]

    def _write(self) -> None:
        evaluations = [asdict(one) for one in self.evaluations]
        with room_for(self._file, 10_000, "The last checkpoint stays"):
            write_json(self._file, {"metric": self.settings.metric, "evaluations": evaluations})

    def _keep(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        tensors = {key: value.cpu().contiguous() for key, value in weights.items()}
        with room_for(path, sum(value.nbytes for value in tensors.values()), "The last checkpoint stays"):
            try:
                save_file(tensors, partial)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        partial.replace(path)


def _read_features(path: Path, key: str) -> Tensor | None:
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        found: Tensor | None = file.get_tensor("features") if file.metadata() == {"key": key} else None
    return found

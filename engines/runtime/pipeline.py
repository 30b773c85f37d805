"""Prompts and seeds in, pixels out: what a worker calls, and its only door into `engines`.

A run is three stages: encode the prompts, a few denoiser calls, decode. Rows of a run may differ in prompt,
seed and number of steps; a row's picture does not depend on the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.bucket import Bucket
from engines.bundle import Backend, Manifest, StageName, check_platform, verify_files
from engines.denoiser import to_x0_eps
from engines.errors import BackendUnavailable, BundleError, NonFiniteError
from engines.families.checkpoint import read_json
from engines.families.tokenizer import PromptTokenizer
from engines.noise import seeded_latents
from engines.runtime.aotinductor import Constants
from engines.runtime.prompt_cache import PromptCache
from engines.runtime.stages import Stage, load_compiled_stage, load_eager_stage
from engines.sampler import ddim_step
from engines.schedule import CLEAN, NoiseSchedule

Pixels = NDArray[np.uint8]
"""(F, H, W, 3) uint8 RGB; an image has F = 1."""

Stages = dict[tuple[StageName, Bucket | None], Stage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture to draw."""

    prompt: str
    seed: int
    num_steps: int
    bucket: Bucket


@dataclass(slots=True, eq=False)
class BatchRun:
    """Samples on their way through the stages together.

    Attributes:
        samples: rows still in the run.
        step_index: denoiser calls done, per row.
        timing_ms: time spent so far in `encode`, `denoise` and `decode`.
    """

    samples: list[Sample]
    text: Tensor
    mask: Tensor
    latents: Tensor
    x0: Tensor
    step_index: list[int]
    timing_ms: dict[str, float] = field(
        default_factory=lambda: {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
    )

    @property
    def finished(self) -> bool:
        """Every row has had all its steps, or there is none left."""
        return not self.unfinished

    @property
    def unfinished(self) -> list[int]:
        """Rows that still have steps to go."""
        return [
            row
            for row, (sample, done) in enumerate(zip(self.samples, self.step_index, strict=True))
            if done < sample.num_steps
        ]

    def drop(self, indices: Sequence[int]) -> None:
        """Take rows out of the run, between steps; the rest keep their order.

        Raises:
            IndexError: there is no such row.
        """
        gone = set(indices)
        if not gone <= set(range(len(self.samples))):
            raise IndexError(f"rows {sorted(gone)} of a run of {len(self.samples)}")
        kept = [row for row in range(len(self.samples)) if row not in gone]
        self.samples = [self.samples[row] for row in kept]
        self.step_index = [self.step_index[row] for row in kept]
        self.text, self.mask, self.latents, self.x0 = (
            tensor[kept] for tensor in (self.text, self.mask, self.latents, self.x0)
        )

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time inside to `timing_ms[name]`."""
        start = time.perf_counter()
        yield
        self.timing_ms[name] += (time.perf_counter() - start) * 1e3


class Pipeline:
    """A bundle in memory. One thread at a time.

    Attributes:
        manifest: of the bundle.
        backend: what really runs, `aotinductor` or `eager`.
        warnings: why it is not what the bundle was built for, if it is not.
    """

    def __init__(
        self,
        manifest: Manifest,
        stages: Stages,
        tokenizer: PromptTokenizer,
        schedule: NoiseSchedule,
        *,
        backend: Backend,
        warnings: Sequence[str] = (),
    ) -> None:
        self.manifest = manifest
        self.backend: Backend = backend
        self.warnings = list(warnings)
        self._stages = stages
        self._tokenizer = tokenizer
        self._schedule = schedule
        self._prompts = PromptCache()

    @classmethod
    def load(
        cls,
        bundle_dir: Path,
        *,
        backend: Literal["auto", "eager", "aotinductor"] = "auto",
        num_threads: int | None = None,
    ) -> Pipeline:
        """Check a bundle and load it.

        Args:
            bundle_dir: the bundle.
            backend: `auto` takes the compiled code where it fits this machine and falls back to eager, with a
                line in `warnings`, where it does not.
            num_threads: of torch, for this process; by default the number the bundle was compiled for.

        Raises:
            BundleError: the bundle is damaged or foreign; names the field.
            BackendUnavailable: `backend` was asked for by name and cannot run here.
        """
        bundle_dir = Path(bundle_dir)
        manifest = verify_files(bundle_dir)
        torch.set_num_threads(num_threads or manifest.num_threads)
        stages: Stages | None = None
        warnings: list[str] = []
        if backend != "eager":
            try:
                stages = _load_compiled(bundle_dir, manifest)
            except BackendUnavailable as error:
                if backend != "auto":
                    raise
                warnings.append(f"{error}; eager serves instead, slower")
        checkpoint = bundle_dir / "checkpoint"
        return cls(
            manifest,
            stages or _load_eager(bundle_dir, manifest),
            PromptTokenizer(checkpoint / "tokenizer", manifest.max_text_tokens),
            _load_schedule(checkpoint / "scheduler" / "scheduler_config.json"),
            backend="eager" if stages is None else "aotinductor",
            warnings=warnings,
        )

    def stage(self, name: StageName, bucket: Bucket) -> Stage:
        """The stage that serves `bucket`."""
        return self._stages[name, self.manifest.stage(name, bucket).bucket]

    def warm_up(self) -> None:
        """Run every bucket at every batch size once: kernels are chosen and memory claimed at first use."""
        for bucket in self.manifest.buckets:
            # large to small: the allocator then has room for everything that follows
            for batch in sorted(self.manifest.batch_sizes, reverse=True):
                samples = [
                    Sample(prompt=f"{row}", seed=row, num_steps=min(self.manifest.num_steps), bucket=bucket)
                    for row in range(batch)
                ]
                self.run(samples)
                self._prompts.clear()

    def run(self, samples: Sequence[Sample]) -> list[Pixels]:
        """Draw a batch from start to end; arguments and errors as `prepare`, result as `decode`."""
        run = self.prepare(samples)
        while not run.finished:
            self.step(run)
        return self.decode(run)

    def prepare(self, samples: Sequence[Sample]) -> BatchRun:
        """Encode the prompts and draw the noise of a batch.

        Raises:
            ValueError: no samples, too many, different or unknown buckets, a number of steps that the student
                was not trained for, or a seed out of range.
        """
        bucket = self._check(samples)
        start = time.perf_counter()
        text, mask = self._encode([sample.prompt for sample in samples], bucket)
        shape = self.manifest.stage("denoise", bucket).output.shape
        latents = seeded_latents([sample.seed for sample in samples], shape)
        run = BatchRun(list(samples), text, mask, latents, torch.zeros_like(latents), [0] * len(samples))
        run.timing_ms["encode"] = (time.perf_counter() - start) * 1e3
        return run

    def step(self, run: BatchRun) -> None:
        """Make one denoiser call for every row that has steps to go; rows may differ in how many they take.

        Raises:
            ValueError: no row has.
        """
        rows = run.unfinished
        if not rows:
            raise ValueError("every row of this run is finished")
        with run.timed("denoise"):
            visited = [self.manifest.timesteps[run.samples[row].num_steps] for row in rows]
            done = [run.step_index[row] for row in rows]
            now = torch.tensor([steps[i] for steps, i in zip(visited, done, strict=True)])
            following = torch.tensor([[*steps, CLEAN][i + 1] for steps, i in zip(visited, done, strict=True)])
            num_steps = torch.tensor([len(steps) for steps in visited])

            latents = run.latents[rows]
            denoise = self.stage("denoise", run.samples[0].bucket)
            prediction = denoise(latents, now, run.text[rows], run.mask[rows], num_steps)
            alpha, sigma = self._schedule.at(now)
            x0, eps = to_x0_eps(prediction, latents, alpha, sigma, self._schedule.prediction_type)
            run.x0[rows] = x0
            run.latents[rows] = ddim_step(x0, eps, self._schedule, following)
        for row in rows:
            run.step_index[row] += 1

    def decode(self, run: BatchRun) -> list[Pixels]:
        """Decode a finished run.

        Returns:
            (F, H, W, 3) uint8 per row, in the order of `run.samples`.

        Raises:
            ValueError: the run is not finished.
            NonFiniteError: a row is NaN or infinite; names the rows.
        """
        if not run.finished:
            raise ValueError("this run has steps to go; preview() shows it as it is")
        return self._decode(run, run.latents)

    def preview(self, run: BatchRun) -> list[Pixels]:
        """Decode each row as the student sees it at this moment; as `decode` otherwise.

        Raises:
            ValueError: a row has had no step yet.
        """
        if 0 in run.step_index:
            raise ValueError("a row has had no step yet, there is nothing to see")
        return self._decode(run, run.x0)

    def _decode(self, run: BatchRun, latents: Tensor) -> list[Pixels]:
        if not run.samples:
            return []
        with run.timed("decode"):
            broken = (~latents.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            if broken:
                raise NonFiniteError(f"latents of rows {broken} are not finite")
            pixels = self.stage("decode", run.samples[0].bucket)(latents).numpy()
        return [row[None] if row.ndim == 3 else row for row in pixels]

    def _check(self, samples: Sequence[Sample]) -> Bucket:
        if not 1 <= len(samples) <= self.manifest.max_batch:
            raise ValueError(f"a batch has 1 to {self.manifest.max_batch} samples, not {len(samples)}")
        bucket = samples[0].bucket
        if bucket not in self.manifest.buckets:
            allowed = ", ".join(known.label for known in self.manifest.buckets)
            raise ValueError(f"bucket {bucket.label} is not in this bundle, which has {allowed}")
        for sample in samples:
            if sample.bucket != bucket:
                raise ValueError(f"one batch, two buckets: {bucket.label} and {sample.bucket.label}")
            if sample.num_steps not in self.manifest.num_steps:
                raise ValueError(f"num_steps {sample.num_steps} is not one of {self.manifest.num_steps}")
        return bucket

    def _encode(self, prompts: Sequence[str], bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) and masks (B, L); each distinct prompt that is not cached is encoded once."""
        known = {prompt: entry for prompt in prompts if (entry := self._prompts.get(prompt)) is not None}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            input_ids, mask = self._tokenizer(new)
            text = self.stage("text", bucket)(input_ids, mask)
            for row, prompt in enumerate(new):
                known[prompt] = (text[row].clone(), mask[row])
                self._prompts.put(prompt, known[prompt])
        entries = [known[prompt] for prompt in prompts]
        return torch.stack([text for text, _ in entries]), torch.stack([mask for _, mask in entries])


def _load_schedule(path: Path) -> NoiseSchedule:
    try:
        return NoiseSchedule.from_config(read_json(path))
    except ValueError as error:
        raise BundleError("checkpoint.scheduler", str(error)) from None


def _load_eager(bundle: Path, manifest: Manifest) -> Stages:
    return {(spec.name, spec.bucket): load_eager_stage(bundle, manifest, spec) for spec in manifest.stages}


def _load_compiled(bundle: Path, manifest: Manifest) -> Stages:
    """Load the compiled stages.

    Raises:
        BackendUnavailable: there is no compiled code, or it does not fit or load on this machine.
    """
    if not manifest.engines:
        raise BackendUnavailable(f"this bundle has no compiled code ({manifest.eager_only})")
    mismatches = check_platform(manifest)
    if mismatches:
        details = "; ".join(str(mismatch) for mismatch in mismatches)
        raise BackendUnavailable(f"compiled code does not fit this machine ({details})")
    constants = Constants(bundle)
    try:
        return {
            (spec.name, spec.bucket): load_compiled_stage(bundle, manifest, spec, constants)
            for spec in manifest.stages
        }
    except (BundleError, ValueError, RuntimeError) as error:
        raise BackendUnavailable(f"compiled code does not load ({error})") from error

"""Prompts and seeds in, pixels out: what a worker calls, and its only door into `engines`.

A run is three stages: encode the prompts, a few denoiser calls, decode. Rows of a run may differ in prompt,
seed and number of steps; a row's picture does not depend on the others.

On a GPU everything runs on one stream of the pipeline's own. Noise is drawn on the CPU all the same, so that
a seed means the same picture everywhere. Each call below returns when its work is done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.bundle.bucket import Bucket
from engines.bundle.integrity import verify_files
from engines.bundle.manifest import Manifest
from engines.bundle.signature import check_signature
from engines.bundle.stages import Backend, StageName
from engines.denoiser import to_x0_eps
from engines.errors import NonFiniteError
from engines.families.tokenizer import PromptTokenizers
from engines.noise import seeded_latents
from engines.runtime.cuda_graphs import GraphDecision, TorchGraphs, capture_stages
from engines.runtime.loading import Stages, load_first, load_schedule, pick_device
from engines.runtime.memory import MemoryPlan
from engines.runtime.prompt_cache import PromptCache
from engines.runtime.stages import CPU, Stage
from engines.sampler import ddim_step
from engines.schedule import CLEAN, NoiseSchedule

Pixels = NDArray[np.uint8]
"""(F, H, W, 3) uint8 RGB; an image has F = 1."""

SAMPLER_INPUTS = {"latents", "timestep", "num_steps"}
"""Inputs of a denoise stage that differ from step to step or row to row; the others come from the prompt."""


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
        cond: what the denoiser is told of the prompts, by the names of its inputs.
        step_index: denoiser calls done, per row.
        timing_ms: time spent so far in `encode`, `denoise` and `decode`.
    """

    samples: list[Sample]
    cond: dict[str, Tensor]
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
        self.cond = {name: tensor[kept] for name, tensor in self.cond.items()}
        self.latents, self.x0 = self.latents[kept], self.x0[kept]

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
        backend: what really runs: `aotinductor`, `tensorrt` or `eager`.
        device: where it runs.
        warnings: why it is not what the bundle was built for, if it is not.
        graphs: which stages are replayed as CUDA graphs, decided by `warm_up`; empty on the CPU.
        memory: what it needs of the GPU's memory; None on the CPU.
    """

    def __init__(
        self,
        manifest: Manifest,
        stages: Stages,
        tokenizers: PromptTokenizers,
        schedule: NoiseSchedule,
        *,
        backend: Backend,
        device: torch.device = CPU,
        warnings: Sequence[str] = (),
        memory: MemoryPlan | None = None,
    ) -> None:
        self.manifest = manifest
        self.backend: Backend = backend
        self.device = device
        self.warnings = list(warnings)
        self.graphs: list[GraphDecision] = []
        self.memory = memory
        self._stages = stages
        self._tokenizers = tokenizers
        self._schedule = schedule.to(device)
        self._prompts = PromptCache()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @classmethod
    def load(
        cls,
        bundle_dir: Path,
        *,
        backend: Backend | Literal["auto"] = "auto",
        num_threads: int | None = None,
        key: bytes | None = None,
        device_index: int = 0,
    ) -> Pipeline:
        """Check a bundle and load it, onto a GPU if it was built for one and there is one.

        Args:
            bundle_dir: the bundle.
            backend: `auto` takes the first that the bundle lists and that fits this machine, eager if none
                does, with a line in `warnings` for each that does not.
            num_threads: of torch, for this process; by default the number the bundle was compiled for.
            key: refuse a bundle that was not signed with it; None takes any.
            device_index: which of the GPUs that this process sees.

        Raises:
            BundleError: the bundle is damaged, foreign or not signed; names the field.
            MemoryPlanError: the GPU's free memory does not suffice.
            BackendUnavailable: `backend` was asked for by name and cannot run here.
        """
        bundle_dir = Path(bundle_dir)
        if key is not None:
            check_signature(bundle_dir, key)
        manifest = verify_files(bundle_dir)
        torch.set_num_threads(num_threads or manifest.num_threads)
        device, warnings = pick_device(manifest, device_index)
        serving, stages, memory, refused = load_first(bundle_dir, manifest, backend, device)
        checkpoint = bundle_dir / "checkpoint"
        return cls(
            manifest,
            stages,
            PromptTokenizers(manifest.family, checkpoint, manifest.max_text_tokens),
            load_schedule(checkpoint / "scheduler" / "scheduler_config.json"),
            backend=serving,
            device=device,
            warnings=[*warnings, *refused],
            memory=memory,
        )

    def stage(self, name: StageName, bucket: Bucket) -> Stage:
        """The stage that serves `bucket`."""
        return self._stages[name, self.manifest.stage(name, bucket).bucket]

    def warm_up(self) -> None:
        """Run every bucket at every batch size once: kernels are chosen and memory claimed at first use.

        On a GPU, CUDA graphs of compiled stages are captured before that. Eager code may ask tensors for
        their values, as T5's does of its mask, which no capture survives.
        """
        if self._stream is not None and self.backend != Backend.EAGER:
            with self.on_stream():
                self.graphs = capture_stages(
                    list(self._stages.values()),
                    self.manifest.batch_sizes,
                    TorchGraphs(self._stream),
                    {
                        (row.stage, row.bucket, row.batch): row.peak_bytes
                        for row in self.manifest.latency
                        if row.backend == self.backend and row.peak_bytes
                    },
                )
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

    def unheard(self, prompt: str) -> list[str]:
        """What of a prompt its text encoders will not hear, in words for its author. Any thread may ask."""
        return self._tokenizers.unheard(prompt)

    def prepare(self, samples: Sequence[Sample]) -> BatchRun:
        """Encode the prompts and draw the noise of a batch.

        Raises:
            ValueError: no samples, too many, different or unknown buckets, a number of steps that the student
                was not trained for, or a seed out of range.
        """
        bucket = self._check(samples)
        start = time.perf_counter()
        with self.on_stream():
            cond = self._encode([sample.prompt for sample in samples], bucket)
            shape = self.manifest.stage("denoise", bucket).outputs[0].shape
            latents = seeded_latents([sample.seed for sample in samples], shape).to(self.device)
            run = BatchRun(list(samples), cond, latents, torch.zeros_like(latents), [0] * len(samples))
            self._finish()
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
        with run.timed("denoise"), self.on_stream():
            visited = [self.manifest.timesteps[run.samples[row].num_steps] for row in rows]
            done = [run.step_index[row] for row in rows]
            now, following, num_steps = torch.tensor(
                [
                    [steps[i] for steps, i in zip(visited, done, strict=True)],
                    [[*steps, CLEAN][i + 1] for steps, i in zip(visited, done, strict=True)],
                    [len(steps) for steps in visited],
                ]
            ).to(self.device)

            # most runs take their steps together, and need no copies of what stays the same
            chosen = rows if len(rows) < len(run.samples) else slice(None)
            latents = run.latents[chosen]
            inputs = {
                "latents": latents,
                "timestep": now,
                "num_steps": num_steps,
                **{name: tensor[chosen] for name, tensor in run.cond.items()},
            }
            denoise = self.stage("denoise", run.samples[0].bucket)
            (prediction,) = denoise(*(inputs[spec.name] for spec in denoise.spec.inputs))
            alpha, sigma = self._schedule.at(now, latents.ndim)
            x0, eps = to_x0_eps(prediction, latents, alpha, sigma, self._schedule.prediction_type)
            run.x0[chosen] = x0
            run.latents[chosen] = ddim_step(x0, eps, self._schedule, following)
            self._finish()
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
        with run.timed("decode"), self.on_stream():
            broken = (~latents.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
            if broken:
                raise NonFiniteError(f"latents of rows {broken} are not finite")
            (pixels,) = self.stage("decode", run.samples[0].bucket)(latents)
            pixels = pixels.cpu()
        return [row[None] if row.ndim == 3 else row for row in pixels.numpy()]

    def on_stream(self) -> AbstractContextManager[object]:
        """Everything inside runs on the pipeline's stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _finish(self) -> None:
        """Wait until the GPU is done: times are true then, and a job can be cancelled between steps."""
        if self._stream is not None:
            self._stream.synchronize()

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

    def _encode(self, prompts: Sequence[str], bucket: Bucket) -> dict[str, Tensor]:
        """What the denoiser is told, (B, ...) each; a distinct prompt that is not cached is encoded once."""
        told = [
            spec.name
            for spec in self.manifest.stage("denoise", bucket).inputs
            if spec.name not in SAMPLER_INPUTS
        ]
        known = {prompt: entry for prompt in prompts if (entry := self._prompts.get(prompt)) is not None}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            text = self.stage("text", bucket)
            tokens = self._tokenizers(new)
            outputs = text(*(tokens[spec.name] for spec in text.spec.inputs))
            names = [spec.name for spec in text.spec.outputs]
            made = {**tokens, **dict(zip(names, outputs, strict=True))}
            for row, prompt in enumerate(new):
                known[prompt] = tuple(made[name][row].to(self.device, copy=True) for name in told)
                self._prompts.put(prompt, known[prompt])
        columns = zip(*(known[prompt] for prompt in prompts), strict=True)
        return {name: torch.stack(column) for name, column in zip(told, columns, strict=True)}

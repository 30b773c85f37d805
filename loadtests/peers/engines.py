"""What the peers that batch draw with: a plain diffusers pipeline, or the engine that our own workers run."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from loadtests.peers.diffusers_lock import Student


class Draws(Protocol):
    """Several pictures at a time."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture of each prompt."""
        ...


class Eager:
    """The student as the peer behind a lock has it."""

    def __init__(self, directory: Path) -> None:
        self._student = Student(directory, num_threads=1)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture of each prompt."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.inference_mode():
            images: list[Image.Image] = self._student.pipeline(
                list(prompts), generator=generators, **self._student.arguments
            ).images
        return images


class Compiled:
    """A bundle in the engine that our own workers run."""

    def __init__(self, bundle: Path) -> None:
        from engines.runtime.pipeline import Pipeline

        self._pipeline = Pipeline.load(bundle, num_threads=1)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """A picture of each prompt."""
        from engines.runtime.pipeline import Sample

        manifest = self._pipeline.manifest
        run = self._pipeline.prepare(
            [
                Sample(
                    prompt=prompt,
                    seed=seed,
                    num_steps=manifest.default_num_steps,
                    bucket=manifest.buckets[0],
                )
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        )
        while not run.finished:
            self._pipeline.step(run)
        return [Image.fromarray(pixels[0]) for pixels in self._pipeline.decode(run)]


def read_arguments(behind: str) -> argparse.Namespace:
    """The command line of a peer that batches: `directory`, `port`, `workers` and `batch`."""
    parser = argparse.ArgumentParser(description=f"the same student behind {behind}")
    parser.add_argument("directory", type=Path, help="a student, or a bundle")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (2)")
    parser.add_argument("--batch", type=int, default=8, help="most pictures drawn at once (8)")
    return parser.parse_args()


def load_engine(directory: Path) -> Draws:
    """Of a student, a diffusers pipeline on one thread; of a bundle, our `Pipeline`."""
    return Compiled(directory) if (directory / "manifest.json").exists() else Eager(directory)

"""What paints and measures one row of a gate's table at one seed."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.captions import read_captions
from engines.domains import default_domain, load_domain
from engines.families.spec import family_of
from engines.families.student import read_student
from engines.gate.domain import Domain, FileDomain, Judge, PromptSet
from engines.gate.features import PIXELS, ClipScore, Features, make_features
from engines.gate.frechet import Reference
from engines.gate.measurement import Measurement, Row
from engines.gate.painter import Painter

REFERENCE_SEED = 10_000
NUM_AXES = 64
MAX_CAPTIONS = 100_000
PROTOCOL = 2
"""Of measuring: raised when the same student would get other numbers."""
NUM_EXAMPLE_SEEDS = 50
"""How often an example is drawn before it is offered to anybody."""
COPIES = 4
"""How often a prompt is drawn, each time from other noise, to see how much the pictures differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """What to measure.

    Attributes:
        student, teacher: diffusers directories.
        domain: what pictures are of, see `engines.domains`; by default the demo's of the teacher's kind.
        judge: safetensors of the domain's judge; None with `prompts`.
        prompts: a file of prompts, for models of no domain; then the teacher's own pictures of most guided
            steps are what the Fréchet distance compares with.
        features: with `prompts`, the space of the Fréchet distance, see `features.make_features`.
        clip, hps: with `prompts`, directories of a CLIP and of HPSv2 in its format, to score pictures with.
        out: where report.json, report.md and contact_sheet.png go, and of clips contact_sheet.webp.
        seeds: how many times, each with its own prompts and noise.
        num_prompts: per seed, of all kinds together.
        num_reference: real renders, or the teacher's pictures, that the Fréchet distance compares with.
        steps, teacher_steps: step counts to measure.
        guidance_scale: of the guided teacher.
        batch: pictures sampled together.
        autocast: run the networks in bfloat16.
        num_processes: that measure side by side, each with its own copy of the networks.
        num_threads: of torch in each of them; None leaves torch's choice.
        device: of the networks.
    """

    student: Path
    teacher: Path
    domain: str | None = None
    judge: Path | None = None
    prompts: Path | None = None
    features: str = PIXELS
    clip: Path | None = None
    hps: Path | None = None
    out: Path
    seeds: int = 4
    num_prompts: int = 1000
    num_reference: int = 4000
    steps: tuple[int, ...] = (4, 2, 1)
    teacher_steps: tuple[int, ...] = (50, 8, 4, 2)
    guidance_scale: float
    batch: int = 250
    autocast: bool = False
    num_processes: int = 1
    num_threads: int | None = 1
    device: str = "cpu"

    @property
    def num_repeated(self) -> int:
        """Prompts of a seed that are drawn `COPIES` times."""
        return max(2, self.num_prompts // 25)


def read_accuracy(images: Tensor, prompts: PromptSet, judge: Judge) -> dict[str, float]:
    """Percent of (N, ...) uint8 pictures that show all that was asked, per kind of prompt and over "all"."""
    right = [asked.shown_by(seen) for asked, seen in zip(prompts.asked, judge.read(images), strict=True)]
    accuracy = {"all": 100.0 * sum(right) / len(right)}
    for group in dict.fromkeys(prompts.groups):
        hits = [hit for hit, kind in zip(right, prompts.groups, strict=True) if kind == group]
        accuracy[group] = 100.0 * sum(hits) / len(hits)
    return accuracy


def pairwise_distance(features: Tensor, copies: int) -> float:
    """Mean distance between two pictures of one prompt.

    Args:
        features: (N copies, D), those of a prompt in a row.
    """
    groups = features.double().unflatten(0, (-1, copies))
    distances = torch.linalg.vector_norm(groups[:, :, None] - groups[:, None], dim=-1)
    return float(distances.sum((1, 2)).mean() / (copies * (copies - 1)))


def paired_distance(features: Tensor, other: Tensor) -> float:
    """How far pictures are from others of the same prompts and noise.

    Args:
        features, other: (N, D).
    Returns:
        Percent of the mean distance between the others of different prompts: 0 is the same pictures, 100 is
        pictures that have nothing to do with them.
    """
    features, other = features.double(), other.double()
    apart = torch.linalg.vector_norm(features - other, dim=1).mean()
    return float(100.0 * apart / torch.linalg.vector_norm(other - other.roll(1, 0), dim=1).mean())


def noise_seeds(seed: int, num: int, *, start: int = 0) -> list[int]:
    """Seeds of a prompt set's noise, the same for every row of the table; below 2**32, see `noise`."""
    return [seed * 100_000 + start + index for index in range(num)]


class Evaluator:
    """The networks that draw and read pictures; each is loaded when it is first needed.

    Raises:
        CheckpointError: student or judge cannot be used.
    """

    def __init__(self, config: GateConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self._painters: dict[str, Painter] = {}
        self._prompts: PromptSet | None = None

    @cached_property
    def rendered(self) -> Domain | None:
        """The domain whose pictures can be rendered and read; None with a file of prompts."""
        if self.config.prompts:
            return None
        return load_domain(self.config.domain or default_domain(family_of(self.config.teacher).kind))

    @cached_property
    def domain(self) -> Domain | FileDomain:
        """Where prompts come from."""
        if self.rendered is not None:
            return self.rendered
        assert self.config.prompts is not None
        return FileDomain(tuple(read_captions(self.config.prompts, MAX_CAPTIONS)))

    @cached_property
    def judge(self) -> Judge | None:
        """Reads the domain's pictures."""
        if self.rendered is None:
            return None
        assert self.config.judge is not None
        return self.rendered.load_judge(self.config.judge)

    @cached_property
    def features(self) -> Features:
        """The space that distances are taken in."""
        if self.judge is not None:
            return self.judge.features
        return make_features(
            self.config.features, self._encode, batch=self.config.batch, device=self.config.device
        )

    @cached_property
    def scorers(self) -> dict[str, ClipScore]:
        """What pictures and prompts are scored with, by name."""
        directories = {"clip": self.config.clip, "hps": self.config.hps}
        return {
            name: ClipScore(directory, device=self.config.device)
            for name, directory in directories.items()
            if directory is not None
        }

    def painter(self, source: Literal["teacher", "student"]) -> Painter:
        """The networks of teacher or student.

        Raises:
            CheckpointError: they cannot be used.
        """
        if source not in self._painters:
            config, student = self.config, read_student(self.config.student)
            self._painters[source] = Painter(
                config.teacher if source == "teacher" else config.student,
                max_tokens=student.max_text_tokens,
                bucket=student.bucket,
                batch=config.batch,
                autocast=torch.bfloat16 if config.autocast else None,
                device=config.device,
            )
        return self._painters[source]

    def fit_reference(self, on_batch: Callable[[int], None] | None = None) -> Reference:
        """The features that all rows are compared with: of real renders, or of the teacher's pictures.

        The teacher's take hours for a large one; they are kept in `out/reference` as they are made.

        Args:
            on_batch: told how many pictures there are so far.
        """
        prompts = self.domain.prompts(REFERENCE_SEED, self.config.num_reference)
        if self.rendered is not None:
            return Reference.fit(self.features(self.rendered.render(prompts)), NUM_AXES)
        row = Row("", "", "teacher", max(self.config.teacher_steps), self.config.guidance_scale)
        folder = self.config.out / "reference" / reference_identity(self.config)
        parts = []
        for start in range(0, len(prompts.captions), self.config.batch):
            path = folder / f"{start:06d}.safetensors"
            if not path.is_file():
                rows = prompts.take(range(start, min(start + self.config.batch, len(prompts.captions))))
                seeds = noise_seeds(REFERENCE_SEED, len(rows.captions), start=start)
                features = self.features(self._sample(row, rows.captions, seeds))
                folder.mkdir(parents=True, exist_ok=True)
                save_file({"features": features.contiguous()}, path.with_suffix(".partial"))
                path.with_suffix(".partial").replace(path)
            parts.append(load_file(path)["features"])
            if on_batch is not None:
                on_batch(sum(map(len, parts)))
        return Reference.fit(torch.cat(parts), NUM_AXES)

    def paint(self, row: Row, prompts: PromptSet) -> Tensor:
        """Make a row's pictures, (N, H, W, 3) uint8, or clips, (N, F, H, W, 3)."""
        if row.source in ("real", "vae"):
            assert self.rendered is not None
            pictures = self.rendered.render(prompts)
            return pictures if row.source == "real" else self._through_vae(pictures)
        return self._sample(row, prompts.captions, noise_seeds(prompts.seed, len(prompts.captions)))

    def paint_again(self, row: Row, prompts: PromptSet) -> Tensor:
        """Make several pictures of every prompt, `COPIES` of each in a row, from other noise than `paint`."""
        if row.source in ("real", "vae"):
            assert self.rendered is not None
            pictures = self.rendered.render_again(prompts, COPIES)
            return pictures if row.source == "real" else self._through_vae(pictures)
        captions = [caption for caption in prompts.captions for _ in range(COPIES)]
        return self._sample(row, captions, noise_seeds(prompts.seed, len(captions), start=50_000))

    def measure(self, seed: int, row: Row, reference: Reference) -> Measurement:
        """Make a row's pictures of one seed, and read them back."""
        config = self.config
        if self._prompts is None or self._prompts.seed != seed:
            self._prompts = self.domain.prompts(seed, config.num_prompts)
        prompts = self._prompts
        pictures = self.paint(row, prompts)
        accuracy = {} if self.judge is None else read_accuracy(pictures, prompts, self.judge)
        scores = {
            name: float(score(pictures, prompts.captions).mean()) for name, score in self.scorers.items()
        }
        frechet = reference.distance(self.features(pictures))
        spread_out = range(0, config.num_prompts, max(1, config.num_prompts // config.num_repeated))
        repeated = self.paint_again(row, prompts.take(spread_out[: config.num_repeated]))
        diversity = pairwise_distance(self.features(repeated), COPIES)
        return Measurement(accuracy, frechet, diversity, scores)

    def read_example(self, prompt: str, num_steps: int) -> float | None:
        """Share of `NUM_EXAMPLE_SEEDS` pictures in which the judge reads all that a prompt says.

        None where nobody can tell: prompts from a file have no judge, and a domain may not know the words.
        """
        asked_by = getattr(self.rendered, "asked_by", None)
        asked = None if asked_by is None else asked_by(prompt)
        if asked is None or self.judge is None:
            return None
        row = Row("", "", "student", num_steps)
        pictures = self._sample(row, [prompt] * NUM_EXAMPLE_SEEDS, range(NUM_EXAMPLE_SEEDS))
        right = sum(bool(asked.shown_by(seen)) for seen in self.judge.read(pictures))
        return right / NUM_EXAMPLE_SEEDS

    def paint_timed(self, row: Row, prompts: PromptSet) -> tuple[Tensor, float]:
        """Make a teacher's or student's pictures; also say how many seconds one took, prompts to pixels."""
        self.paint(replace(row, num_steps=1), prompts)  # warm up
        start = time.perf_counter()
        pictures = self.paint(row, prompts)
        return pictures, (time.perf_counter() - start) / len(pictures)

    def num_parameters(self, source: Literal["teacher", "student"]) -> int:
        """Of the network that is evaluated in every step."""
        return num_parameters(self.painter(source).denoiser.network)

    def _sample(self, row: Row, captions: list[str], seeds: Sequence[int]) -> Tensor:
        assert row.source in ("teacher", "student")
        with self._attention():
            return self.painter(row.source)(
                captions, seeds, num_steps=row.num_steps, guidance_scale=row.guidance_scale
            )

    def _through_vae(self, pictures: Tensor) -> Tensor:
        with self._attention():
            return self.painter("student").codec.round_trip(pictures, self.config.batch)

    def _encode(self, pictures: Tensor) -> Tensor:
        return self.painter("student").codec.encode(pictures)

    def _attention(self) -> AbstractContextManager[None]:
        # plain matrix products beat the fused attention kernels on the CPU at the demo's few tokens
        plain = self.rendered is not None and self.config.domain is None and self.config.device == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def num_parameters(network: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in network.parameters())


def reference_identity(config: GateConfig) -> str:
    """Digest of all that the features depend on which other models' pictures are compared with."""
    steps = max(config.teacher_steps, default=0)
    parts = [*measure_identity(config), *teacher_identity(config), steps, config.num_reference, config.batch]
    return digest(parts)


def measure_identity(config: GateConfig) -> list[object]:
    """What every number depends on, whoever made the pictures."""
    bucket = read_student(config.student).bucket.label
    same: list[object] = [PROTOCOL, config.autocast, bucket]
    if config.prompts is None:
        assert config.judge is not None
        named = [] if config.domain is None else [config.domain]
        return [*same, *named, hash_files([config.judge])]
    networks = (Path(config.features), config.clip, config.hps)
    hashes = [directory and hash_files(sorted(directory.glob("*.safetensors"))) for directory in networks]
    return [*same, hash_files([config.prompts]), config.features, *hashes]


def teacher_identity(config: GateConfig) -> list[object]:
    """What a teacher's pictures depend on."""
    return [hash_files(sorted(config.teacher.glob("*/*.safetensors"))), config.guidance_scale]


def digest(part: Sequence[object]) -> str:
    """Of anything that JSON can say."""
    return hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16]


def hash_files(files: Sequence[Path]) -> str:
    """Of their contents."""
    hashed = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashed.update(hashlib.file_digest(stream, "sha256").digest())
    return hashed.hexdigest()

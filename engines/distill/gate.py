"""The quality gate: a student's scenes against its teacher's and real renders, read by the demo's judge.

Every sampler draws the same prompts from the same noise. Accuracy is the share of pictures in which the
judge reads exactly the scene that was asked for; Fréchet distance compares the judge's features of all
pictures with real renders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.demo.judge import Judge
from engines.demo.scenes import Scene, render, sample_scenes
from engines.distill.frechet import Reference
from engines.distill.pictures import Painter
from engines.distill.report import GROUPS, contact_sheet, markdown, save_contact_sheet
from engines.distill.student import write_json
from engines.distill.verdict import Measurement, Row, make_report, record_verdict
from engines.errors import CheckpointError, ConfigError
from engines.families.student import read_student

REFERENCE_SEED = 10_000
SHEET_SEED = 20_000
NUM_AXES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """What to measure.

    Attributes:
        student, teacher: diffusers directories.
        judge: safetensors of `engines.demo.judge.Judge`.
        out: where report.json, report.md and contact_sheet.png go.
        seeds: how many times, each with its own prompts and noise.
        num_prompts: per seed: two fifths one object, two fifths two objects, a fifth with held-out pairs.
        num_reference: real renders that the Fréchet distance compares with.
        steps, teacher_steps: step counts to measure.
        guidance_scale: of the guided teacher.
        batch: pictures sampled together.
        autocast: run the networks in bfloat16.
        num_threads: of torch; None leaves torch's choice.
        device: of the networks.
    """

    student: Path
    teacher: Path
    judge: Path
    out: Path
    seeds: int = 4
    num_prompts: int = 1000
    num_reference: int = 4000
    steps: tuple[int, ...] = (4, 2, 1)
    teacher_steps: tuple[int, ...] = (50, 8, 4, 2)
    guidance_scale: float
    batch: int = 250
    autocast: bool = False
    num_threads: int | None = 1
    device: str = "cpu"


def make_rows(config: GateConfig) -> list[Row]:
    """All rows of the table, in its order."""
    rows = [Row("real", "real renders", "real"), Row("vae", "VAE of real renders", "vae")]
    for count in config.teacher_steps:
        name, scale = f"teacher, {_steps(count)}", config.guidance_scale
        rows.append(Row(f"teacher-{count}-cfg", f"{name}, CFG {scale:g}", "teacher", count, scale))
        rows.append(Row(f"teacher-{count}", f"{name}, no CFG", "teacher", count))
    rows += [Row(f"student-{count}", f"student, {_steps(count)}", "student", count) for count in config.steps]
    return rows


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The scenes of one seed, and which kind each is."""

    scenes: list[Scene]
    groups: list[str]
    seed: int

    def render(self) -> Tensor:
        """Real pictures of them, (N, H, W, 3) uint8."""
        return render(self.scenes, self.seed)


def make_prompts(seed: int, counts: dict[str, int]) -> PromptSet:
    """Draw scenes; held-out ones have a (shape, colour) pair that training never showed."""
    drawn = {
        "one_object": sample_scenes(counts["one_object"], seed, split="train", num_objects=1),
        "two_objects": sample_scenes(counts["two_objects"], seed, split="train", num_objects=2),
        "held_out": sample_scenes(counts["held_out"], seed, split="held_out"),
    }
    return PromptSet(
        scenes=[scene for scenes in drawn.values() for scene in scenes],
        groups=[group for group, scenes in drawn.items() for _ in scenes],
        seed=seed,
    )


def group_counts(num_prompts: int) -> dict[str, int]:
    held_out = num_prompts // 5
    one_object = (num_prompts - held_out) // 2
    return {
        "one_object": one_object,
        "two_objects": num_prompts - held_out - one_object,
        "held_out": held_out,
    }


def measure(images: Tensor, prompts: PromptSet, judge: Judge, reference: Reference) -> Measurement:
    """Read pictures (N, H, W, 3) uint8 back and compare them with what was asked and with real ones."""
    right = [
        said.key() == asked.key() for said, asked in zip(judge.read(images), prompts.scenes, strict=True)
    ]
    accuracy = {"all": 100.0 * sum(right) / len(right)}
    for group in GROUPS:
        hits = [hit for hit, kind in zip(right, prompts.groups, strict=True) if kind == group]
        accuracy[group] = 100.0 * sum(hits) / len(hits)
    return Measurement(accuracy, reference.distance(judge.features(images)))


def noise_seeds(seed: int, num: int) -> list[int]:
    """Seeds of a prompt set's noise, the same for every row of the table; below 2**32, see `noise`."""
    return [seed * 100_000 + index for index in range(num)]


class Measurements:
    """What was measured so far, kept in a file.

    A gate that was stopped goes on, and a teacher that was measured beside one student is not measured again
    beside the next.

    Args:
        path: of the file.
        identities: per source of rows, a digest of everything its measurements depend on.
    """

    def __init__(self, path: Path, identities: dict[str, str]) -> None:
        self.path = path
        self.identities = identities
        self._done: dict[str, Measurement] = {}
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return
        self._done = {key: Measurement(**values) for key, values in stored.items()}

    def _key(self, row: Row, seed: int) -> str:
        return f"{row.key}@{seed}#{self.identities[row.source]}"

    def get(self, row: Row, seed: int) -> Measurement | None:
        return self._done.get(self._key(row, seed))

    def add(self, row: Row, seed: int, measurement: Measurement) -> None:
        self._done[self._key(row, seed)] = measurement
        write_json(self.path, {key: asdict(one) for key, one in self._done.items()})

    def of(self, row: Row, num_seeds: int) -> list[Measurement]:
        return [self._done[self._key(row, seed)] for seed in range(num_seeds)]


class Gate:
    """Everything a gate works with.

    Raises:
        CheckpointError: student, teacher or judge cannot be used.
        ConfigError: too few prompts or renders to measure anything.
    """

    def __init__(self, config: GateConfig, console: Console) -> None:
        if config.num_prompts < 10 or config.num_reference < 10 or config.seeds < 1:
            raise ConfigError("gate: at least 1 seed, 10 prompts and 10 reference renders are needed")
        if not config.judge.is_file():
            raise CheckpointError(
                f"{config.judge}: no such file; the judge is made by python -m engines demo-teacher"
            )
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.console = console
        self.student = read_student(config.student)
        self.judge = Judge.load(config.judge)
        self.rows = make_rows(config)
        autocast = torch.bfloat16 if config.autocast else None
        self.painters = {
            name: Painter(
                directory,
                max_tokens=self.student.max_text_tokens,
                batch=config.batch,
                autocast=autocast,
                device=config.device,
            )
            for name, directory in (("teacher", config.teacher), ("student", config.student))
        }
        config.out.mkdir(parents=True, exist_ok=True)
        self.measurements = Measurements(config.out / "measurements.json", _identities(config))

    def run(self) -> dict[str, Any]:
        """Measure what is missing, write report and contact sheet, record the verdict in `student.json`.

        Returns:
            The content of report.json; its `passed` is the verdict.
        """
        config = self.config
        # plain matrix products beat the fused attention kernels on the CPU at these few tokens
        with sdpa_kernel(SDPBackend.MATH):
            self.measure_all()
            sheet = self.contact_sheet()
        save_contact_sheet(config.out / "contact_sheet.png", sheet)
        measured = [(row, self.measurements.of(row, config.seeds)) for row in self.rows]
        report = make_report(self.student, self.setup(), measured, max(config.teacher_steps, default=0))
        write_json(config.out / "report.json", report)
        (config.out / "report.md").write_text(markdown(report), encoding="utf-8")
        record_verdict(config.student, report)
        return report

    def setup(self) -> dict[str, Any]:
        """How it is measured, for the report."""
        config = self.config
        return {
            "seeds": list(range(config.seeds)),
            "counts": group_counts(config.num_prompts),
            "num_reference": config.num_reference,
            "num_axes": NUM_AXES,
            "guidance_scale": config.guidance_scale,
            "precision": "bfloat16 autocast" if config.autocast else "float32",
            "device": config.device,
            "torch": torch.__version__,
        }

    def measure_all(self) -> None:
        """Measure every row at every seed that was not measured before."""
        config, counts = self.config, group_counts(self.config.num_prompts)
        todo = [
            (seed, row)
            for seed in range(config.seeds)
            for row in self.rows
            if self.measurements.get(row, seed) is None
        ]
        if not todo:
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            task = progress.add_task("rendering", total=sum(row.cost for _, row in todo))
            real = make_prompts(REFERENCE_SEED, group_counts(config.num_reference))
            reference = Reference.fit(self.judge.features(real.render()), NUM_AXES)
            prompts: PromptSet | None = None
            for seed, row in todo:
                if prompts is None or prompts.seed != seed:
                    prompts = make_prompts(seed, counts)
                progress.update(task, description=f"seed {seed}: {row.label}")
                measurement = measure(self.paint(row, prompts), prompts, self.judge, reference)
                self.measurements.add(row, seed, measurement)
                progress.advance(task, row.cost)
                self.console.print(_line(seed, row, measurement), soft_wrap=True, highlight=False)

    def paint(self, row: Row, prompts: PromptSet) -> Tensor:
        """Make a row's pictures, (N, H, W, 3) uint8."""
        if row.source == "real":
            return prompts.render()
        if row.source == "vae":
            return self.painters["student"].codec.round_trip(prompts.render(), self.config.batch)
        return self.painters[row.source](
            [scene.caption() for scene in prompts.scenes],
            noise_seeds(prompts.seed, len(prompts.scenes)),
            num_steps=row.num_steps,
            guidance_scale=row.guidance_scale,
        )

    def contact_sheet(self) -> Image.Image:
        """Teacher and student beside each other, from the same prompts and noise."""
        most = max(self.config.teacher_steps, default=0)
        wanted = [f"teacher-{most}-cfg", "teacher-4-cfg", "teacher-4"]
        wanted += [f"student-{count}" for count in self.config.steps]
        by_key = {row.key: row for row in self.rows}
        shown = [by_key[key] for key in wanted if key in by_key]
        prompts = make_prompts(SHEET_SEED, {"one_object": 3, "two_objects": 3, "held_out": 2})
        titles = [_title(row) for row in shown]
        pictures = [self.paint(row, prompts) for row in shown]
        return contact_sheet(titles, pictures, [scene.caption() for scene in prompts.scenes])


def _title(row: Row) -> tuple[str, str]:
    name, _, guidance = row.label.partition(f", {_steps(row.num_steps)}")
    evaluations = f"{row.nfe} evaluation{'s' if row.nfe > 1 else ''}"
    return f"{name}, {_steps(row.num_steps)}", f"{evaluations}{guidance}"


def _line(seed: int, row: Row, measurement: Measurement) -> str:
    shares = "  ".join(f"{name} {measurement.accuracy[group]:.1f} %" for group, name in GROUPS.items())
    return f"seed {seed}  {row.label}: {shares}  Fréchet {measurement.frechet:.2f} %"


def _identities(config: GateConfig) -> dict[str, str]:
    """What has to be the same for measurements to be reused, per source of rows."""
    setting = [_hash([config.judge]), config.num_prompts, config.num_reference, config.autocast]
    teacher, student = _weights_hash(config.teacher), _weights_hash(config.student)
    parts: dict[str, list[object]] = {
        "real": setting,
        "vae": [*setting, _hash(sorted(config.student.glob("vae/*.safetensors")))],
        "teacher": [*setting, teacher, config.guidance_scale],
        "student": [*setting, student],
    }
    return {
        source: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for source, part in parts.items()
    }


def _weights_hash(directory: Path) -> str:
    return _hash(sorted(directory.glob("*/*.safetensors")))


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()

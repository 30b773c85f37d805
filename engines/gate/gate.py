"""The quality gate: a student's pictures against its teacher's and real ones, read by their domain's judge.

Every sampler draws the same prompts from the same noise. Accuracy is the share of pictures in which the
judge reads all that was asked for; Fréchet distance compares the judge's features of all pictures with real
renders; diversity is how far pictures of one prompt lie apart.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
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

from engines.bundle.platform import current_platform
from engines.errors import CheckpointError, ConfigError
from engines.families.checkpoint import read_json
from engines.families.spec import family_of
from engines.families.student import EXAMPLE_SHARE, STUDENT, read_student
from engines.files import write_json
from engines.gate.evaluator import (
    COPIES,
    NUM_AXES,
    NUM_EXAMPLE_SEEDS,
    Evaluator,
    GateConfig,
    digest,
    hash_files,
    measure_identity,
    paired_distance,
    reference_identity,
    teacher_identity,
)
from engines.gate.features import PIXELS, check_features
from engines.gate.measurement import Cost, Measurement, Row
from engines.gate.parallel import Unit, measure_units
from engines.gate.report import contact_sheet, markdown, save_animation, save_contact_sheet
from engines.gate.verdict import make_report, record_verdict

SHEET_SEED = 20_000
NUM_TIMED = 64


def make_rows(config: GateConfig) -> list[Row]:
    """All rows of the table, in its order."""
    renders = [Row("real", "real renders", "real"), Row("vae", "VAE of real renders", "vae")]
    rows = [] if config.prompts else renders
    for count in config.teacher_steps:
        name, scale = f"teacher, {_steps(count)}", config.guidance_scale
        rows.append(Row(f"teacher-{count}-cfg", f"{name}, CFG {scale:g}", "teacher", count, scale))
        rows.append(Row(f"teacher-{count}", f"{name}, no CFG", "teacher", count))
    rows += [Row(f"student-{count}", f"student, {_steps(count)}", "student", count) for count in config.steps]
    return rows


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


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
        known = {field.name for field in fields(Measurement)}
        # entries of other versions have other identities; they stay, as far as they can be read
        self._done = {
            key: Measurement(**values)
            for key, values in (stored.items() if isinstance(stored, dict) else ())
            if isinstance(values, dict) and {"accuracy", "frechet"} <= values.keys() <= known
        }

    def _key(self, row: Row, seed: int) -> str:
        return f"{row.key}@{seed}#{self.identities[row.source]}"

    def get(self, row: Row, seed: int) -> Measurement | None:
        return self._done.get(self._key(row, seed))

    def add(self, row: Row, seed: int, measurement: Measurement) -> None:
        self._done[self._key(row, seed)] = measurement
        write_json(self.path, {key: asdict(one) for key, one in self._done.items()})

    def of(self, row: Row, num_seeds: int) -> list[Measurement]:
        return [self._done[self._key(row, seed)] for seed in range(num_seeds)]


def check_config(config: GateConfig) -> None:
    """Refuse settings that measure nothing.

    Raises:
        CheckpointError: there is no judge.
        ConfigError: too few prompts, pictures or steps, or measures that do not go together.
    """
    if config.num_prompts < 10 or config.num_reference < 10 or config.seeds < 1:
        raise ConfigError("gate: at least 1 seed, 10 prompts and 10 reference pictures are needed")
    if config.prompts is not None:
        if config.domain is not None:
            raise ConfigError("gate: a domain draws its prompts itself; a file of prompts goes without one")
        check_features(config.features)
        if not config.teacher_steps:
            raise ConfigError("gate: teacher_steps: what else are pictures to be compared with?")
        return
    if config.clip or config.hps or config.features != PIXELS:
        raise ConfigError("gate: features, clip and hps go with a file of prompts; a domain has a judge")
    if config.judge is None or not config.judge.is_file():
        raise CheckpointError(
            f"{config.judge}: no such file; the demo's judge is made by python -m engines demo-teacher. "
            "Models that draw something else need --domain, or --prompts FILE"
        )


class Gate:
    """Everything a gate works with.

    Raises:
        CheckpointError: student, teacher or judge cannot be used.
        ConfigError: too few prompts or renders to measure anything.
    """

    def __init__(self, config: GateConfig, console: Console) -> None:
        check_config(config)
        self.config = config
        self.console = console
        self.student = read_student(config.student)
        family_of(config.teacher)
        self.evaluator = Evaluator(config)
        # refuse what cannot be read before hours of sampling
        self.evaluator.domain.counts(config.num_prompts)
        self.evaluator.features, self.evaluator.scorers  # noqa: B018
        self.rows = make_rows(config)
        config.out.mkdir(parents=True, exist_ok=True)
        self.measurements = Measurements(config.out / "measurements.json", identities(config))

    def run(self) -> dict[str, Any]:
        """Measure what is missing, write report and contact sheet, record the verdict in `student.json`.

        Returns:
            The content of report.json; its `passed` is the verdict.
        """
        config = self.config
        self.measure_all()
        costs = self.measure_costs()
        self.save_contact_sheets()
        measured = [(row, self.measurements.of(row, config.seeds)) for row in self.rows]
        report = make_report(self.student, self.setup(), measured, self.most_steps, costs)
        report["examples"] = self.measure_examples()
        write_json(config.out / "report.json", report)
        (config.out / "report.md").write_text(markdown(report), encoding="utf-8")
        record_verdict(config.student, report)
        return report

    def setup(self) -> dict[str, Any]:
        """How it is measured, for the report."""
        config = self.config
        return {
            "seeds": list(range(config.seeds)),
            "groups": dict(self.evaluator.domain.groups),
            "counts": self.evaluator.domain.counts(config.num_prompts),
            "num_reference": config.num_reference,
            "num_axes": NUM_AXES,
            "features": config.features if config.prompts else None,
            "reference_steps": self.most_steps if config.prompts else None,
            "scores": list(self.evaluator.scorers),
            "num_repeated": config.num_repeated,
            "copies": COPIES,
            "guidance_scale": config.guidance_scale,
            "precision": "bfloat16 autocast" if config.autocast else "float32",
            "device": config.device,
            "torch": torch.__version__,
            "timing": {
                "num_pictures": self.num_timed,
                "batch": min(config.batch, self.num_timed),
                "machine": self.machine,
            },
            "parameters": {
                "teacher": self.evaluator.num_parameters("teacher"),
                "student": self.evaluator.num_parameters("student"),
            },
        }

    @property
    def most_steps(self) -> int:
        """The teacher's step count that the student is held to."""
        return max(self.config.teacher_steps, default=0)

    @property
    def num_timed(self) -> int:
        return min(NUM_TIMED, self.config.num_prompts)

    @property
    def machine(self) -> str:
        """Where it is timed."""
        device = torch.device(self.config.device)
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
        threads = torch.get_num_threads()
        return f"{current_platform().cpu}, {threads} thread{'s' if threads > 1 else ''}"

    def measure_all(self) -> None:
        """Measure every row at every seed that was not measured before, the longest first."""
        todo = [
            (seed, row)
            for seed in range(self.config.seeds)
            for row in self.rows
            if self.measurements.get(row, seed) is None
        ]
        if not todo:
            return
        todo.sort(key=lambda unit: -unit[1].cost)
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
            reference = self.evaluator.fit_reference(
                lambda done: progress.update(
                    task, description=f"reference: {done} of {self.config.num_reference}"
                )
            )
            progress.update(task, description=f"0 of {len(todo)} measured")

            count = itertools.count(1)

            def on_done(unit: Unit, measurement: Measurement) -> None:
                seed, row = unit
                self.measurements.add(row, seed, measurement)
                finished = f"{next(count)} of {len(todo)} measured"
                progress.update(task, advance=row.cost, description=finished)
                self.console.print(_line(seed, row, measurement), soft_wrap=True, highlight=False)

            measure_units(todo, self.evaluator, reference, on_done)

    def measure_examples(self) -> list[dict[str, Any]]:
        """Read every example that the student came with, also those that an earlier gate took away."""
        described = read_json(self.config.student / STUDENT)
        earlier = (described.get("gate") or {}).get("examples", ())
        prompts = dict.fromkeys([*(one["prompt"] for one in earlier), *described.get("examples", ())])
        found = []
        for prompt in prompts:
            with self.console.status(f"reading {prompt}"):
                right = self.evaluator.read_example(prompt, self.student.default_num_steps)
            accepted = right is not None and right >= EXAMPLE_SHARE
            found.append({"prompt": prompt, "seeds": NUM_EXAMPLE_SEEDS, "right": right, "accepted": accepted})
        return found

    def measure_costs(self) -> dict[str, Cost]:
        """Time every sampler alone, and compare its pictures with the teacher's best from the same noise."""
        config, path = self.config, self.config.out / "costs.json"
        same = [self.machine, config.batch, config.num_threads, self.num_timed, self.most_steps]
        known = _read_costs(path)
        names = {row.key: f"{row.key}#{self._cost_identity(row, same)}" for row in self.rows}
        sampled = [row for row in self.rows if row.source in ("teacher", "student")]
        best = next((row for row in sampled if row.key == f"teacher-{self.most_steps}-cfg"), None)
        todo = [row for row in sampled if names[row.key] not in known]
        if best is not None and todo:
            prompts = self.evaluator.domain.prompts(SHEET_SEED, self.num_timed)
            theirs: Tensor | None = None
            for row in [best, *(row for row in todo if row is not best)]:
                with self.console.status(f"timing {row.label}"):
                    pictures, seconds = self.evaluator.paint_timed(row, prompts)
                    features = self.evaluator.features(pictures)
                theirs = features if theirs is None else theirs
                known[names[row.key]] = Cost(seconds, paired_distance(features, theirs))
                write_json(path, {name: asdict(cost) for name, cost in known.items()})
        return {row.key: known[names[row.key]] for row in sampled if names[row.key] in known}

    def _cost_identity(self, row: Row, same: list[object]) -> str:
        of = [self.measurements.identities[source] for source in ("teacher", row.source)]
        return digest([*of, *same])

    def save_contact_sheets(self) -> None:
        """Teacher and student beside each other, from the same prompts and noise; clips also move."""
        steps = self.student.default_num_steps
        wanted = [f"teacher-{self.most_steps}-cfg", f"teacher-{steps}-cfg", f"teacher-{steps}"]
        wanted += [f"student-{count}" for count in self.config.steps]
        by_key = {row.key: row for row in self.rows}
        shown = [by_key[key] for key in wanted if key in by_key]
        prompts = self.evaluator.domain.prompts(SHEET_SEED, 20)
        groups = dict.fromkeys(prompts.groups)
        rows = [prompts.groups.index(group) + i for group in groups for i in range(3)] or list(range(6))
        prompts = prompts.take(rows)
        pictures = [self.evaluator.paint(row, prompts) for row in shown]
        columns, captions, out = [_title(row) for row in shown], prompts.captions, self.config.out
        if self.student.kind != "video":
            save_contact_sheet(out / "contact_sheet.png", contact_sheet(columns, pictures, captions))
            return
        save_contact_sheet(out / "contact_sheet.png", contact_sheet(columns, pictures, captions, height=96))
        frames = [
            contact_sheet(columns, [clips[:, index] for clips in pictures], captions, height=112)
            for index in range(self.student.frames)
        ]
        save_animation(out / "contact_sheet.webp", frames, self.student.fps)


def _read_costs(path: Path) -> dict[str, Cost]:
    try:
        return {name: Cost(**values) for name, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, json.JSONDecodeError, TypeError, AttributeError):
        return {}


def _title(row: Row) -> tuple[str, str]:
    name, _, guidance = row.label.partition(f", {_steps(row.num_steps)}")
    evaluations = f"{row.nfe} evaluation{'s' if row.nfe > 1 else ''}"
    return f"{name}, {_steps(row.num_steps)}", f"{evaluations}{guidance}"


def _line(seed: int, row: Row, measurement: Measurement) -> str:
    numbers = [f"{group} {share:.1f} %" for group, share in measurement.accuracy.items()]
    numbers += [f"Fréchet {measurement.frechet:.2f} %"]
    numbers += [f"{name} {score:.2f}" for name, score in measurement.scores.items()]
    return f"seed {seed}  {row.label}: {'  '.join(numbers)}"


def identities(config: GateConfig) -> dict[str, str]:
    """What has to be the same for measurements to be reused, per source of rows."""
    measures = [*measure_identity(config), config.num_prompts, config.num_reference]
    if config.prompts is not None:  # all are compared with the teacher
        measures.append(reference_identity(config))
    student = read_student(config.student)
    weights = hash_files(sorted(config.student.glob("*/*.safetensors")))
    parts: dict[str, list[object]] = {
        "real": measures,
        "vae": [*measures, hash_files(sorted(config.student.glob("vae/*.safetensors")))],
        "teacher": [*measures, *teacher_identity(config)],
        "student": [*measures, weights, sorted(student.timesteps.items())],
    }
    return {source: digest(part) for source, part in parts.items()}

"""One distillation with one thing changed at a time: which of the choices pay, measured.

An ablation is a YAML file: a base config of `engines.distill.config`, variants that override some of its
keys, and how the students are measured. Every run is a distillation like any other, in a directory of its
own: a run that was stopped goes on, one that is finished is not repeated, and its student is measured by the
same code as in a gate. The table is written anew after every run.
"""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from rich.console import Console

from engines.distill.config import read_config
from engines.distill.cost import iterations_within
from engines.distill.trainer import distill
from engines.errors import CheckpointError, ConfigError
from engines.families.checkpoint import read_json
from engines.files import write_json
from engines.gate.evaluator import Evaluator, GateConfig
from engines.gate.frechet import Reference
from engines.gate.gate import Measurements, identities
from engines.gate.measurement import Row
from engines.gate.report import Spread
from engines.processes import start_child

Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Variant(BaseModel):
    """One row of the table.

    Attributes:
        name: of its runs' directories.
        label: what the table calls it.
        changes: keys of the base config and their other values, nested as there.
        seeds: of training, if not the ablation's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    label: str
    changes: dict[str, Any] = {}
    seeds: tuple[Seed, ...] = ()

    def overrides(self) -> list[str]:
        """The changes as `read_config` takes them: `section.key=value`."""
        return [f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
                for key, value in _flat(self.changes)]  # fmt: skip


class AblationConfig(BaseModel):
    """What to run and how to measure it. Paths are relative to the working directory.

    Attributes:
        title: of the table.
        base: the config that every variant starts from.
        out: runs, `ablation.json` and `ablation.md` go here.
        judge: as for a gate.
        budget: forward passes of one row that the training of every student may take, see `cost`: variants
            that do not name their iterations get as many as it pays for. By default the base config's.
        seeds: of training, for variants that name none.
        eval_seeds, num_prompts, num_reference: as for a gate.
        variants: the rows, the first of them what the others are compared with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    base: Path
    out: Path
    judge: Path
    budget: PositiveInt | None = None
    seeds: tuple[Seed, ...] = (0,)
    eval_seeds: PositiveInt = 4
    num_prompts: Annotated[int, Field(ge=10)] = 1000
    num_reference: Annotated[int, Field(ge=10)] = 4000
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [variant.name for variant in self.variants]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"variants: the name {doubled[0]} is given twice")
        return self

    def runs(self) -> list[Run]:
        """All runs, first seeds first: a table with every row is there as early as can be."""
        wanted = [
            (place, variant, seed)
            for variant in self.variants
            for place, seed in enumerate(variant.seeds or self.seeds)
        ]
        return [Run(variant, seed, self) for _, variant, seed in sorted(wanted, key=lambda run: run[0])]


@dataclass(frozen=True, slots=True)
class Run:
    """One variant with one training seed."""

    variant: Variant
    seed: int
    ablation: AblationConfig

    @property
    def name(self) -> str:
        return f"{self.variant.name}-{self.seed}"

    @property
    def out(self) -> Path:
        return self.ablation.out / self.name

    def overrides(self) -> list[str]:
        changes = [*self.variant.overrides(), f"seed={self.seed}", f"name={self.name}", f"out={self.out}"]
        budget = self.ablation.budget
        if budget is None or "iterations" in self.variant.changes:
            return changes
        affordable = iterations_within(read_config(self.ablation.base, changes), budget)
        return [*changes, f"iterations={affordable}"]


def read_ablation(path: Path) -> AblationConfig:
    """Read an ablation's YAML and check every variant against the base config.

    Raises:
        ConfigError: a file is missing or no YAML, or a key or value is not allowed.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = AblationConfig.model_validate(values)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {field}: {first['msg'].removeprefix('Value error, ')}") from None
    for variant in config.variants:
        read_config(config.base, variant.overrides())
    return config


def run_ablation(config: AblationConfig, console: Console, *, num_processes: int = 1) -> str:
    """Make and measure every student that is missing, several at once, each with one thread.

    Returns:
        The table in Markdown, also in `ablation.md`; `ablation.json` beside it holds every measurement.
    Raises:
        CheckpointError: teacher or judge cannot be used.
        TrainingError: a run failed; the others' results are kept.
    """
    if not config.judge.is_file():
        raise CheckpointError(f"{config.judge}: no such file; it is made by python -m engines demo-teacher")
    runs, results = config.runs(), {}
    config.out.mkdir(parents=True, exist_ok=True)
    reference = Evaluator(_gate_config(runs[0])).fit_reference()
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), initializer=start_child
    )
    started = time.monotonic()
    try:
        futures = {executor.submit(_run, pickle.dumps((run, reference))): run for run in runs}
        for done, future in enumerate(as_completed(futures), start=1):
            run = futures[future]
            results[run.name] = future.result()
            minutes = (time.monotonic() - started) / 60
            console.print(
                f"{done}/{len(runs)}  {minutes:.0f} min  {run.name}: {_short(results[run.name])}",
                soft_wrap=True,
                highlight=False,
            )
            _write(config, results)
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()  # each has its checkpoints
        raise
    finally:
        executor.shutdown(cancel_futures=True)
    return (config.out / "ablation.md").read_text(encoding="utf-8")


Result = dict[str, Any]
"""Of one run: `train_seconds`, and per row of the gate one measurement per seed."""


def _run(task: bytes) -> Result:
    run, reference = pickle.loads(task)  # noqa: S301  (our parent's)
    run.out.mkdir(parents=True, exist_ok=True)
    student = run.out / "student"
    with (run.out / "distill.log").open("a", encoding="utf-8") as log:
        if not (student / "student.json").is_file():
            distill(read_config(run.ablation.base, run.overrides()), Console(file=log, width=160))
        return _measure(run, reference)


def _measure(run: Run, reference: Reference) -> Result:
    config = _gate_config(run)
    evaluator = Evaluator(config)
    stored = Measurements(run.out / "measurements.json", identities(config))
    rows = [Row(f"student-{count}", f"{count} steps", "student", count) for count in config.steps]
    for seed in range(config.seeds):
        for row in rows:
            if stored.get(row, seed) is None:
                stored.add(row, seed, evaluator.measure(seed, row, reference))
    training = read_json(config.student / "student.json")["training"]
    return {
        "train_seconds": training["train_seconds"],
        "rows": {row.key: [asdict(one) for one in stored.of(row, config.seeds)] for row in rows},
    }


def _gate_config(run: Run) -> GateConfig:
    ablation = run.ablation
    base = read_config(ablation.base, run.overrides())
    return GateConfig(
        student=run.out / "student",
        teacher=base.teacher,
        judge=ablation.judge,
        out=run.out,
        seeds=ablation.eval_seeds,
        num_prompts=ablation.num_prompts,
        num_reference=ablation.num_reference,
        steps=tuple(sorted(base.num_steps, reverse=True)),
        teacher_steps=(),
        guidance_scale=base.objective.guidance_scale,
        autocast=base.on("cpu").autocast == "bfloat16",
    )


def _write(config: AblationConfig, results: Mapping[str, Result]) -> None:
    write_json(config.out / "ablation.json", {"title": config.title, "runs": dict(sorted(results.items()))})
    (config.out / "ablation.md").write_text(table(config, results), encoding="utf-8")


def table(config: AblationConfig, results: Mapping[str, Result]) -> str:
    """The ablation in Markdown. A cell is the mean over training seeds, with their standard deviation.

    Variants without a result are left out.
    """
    steps = tuple(sorted(read_config(config.base).num_steps, reverse=True))
    head = ["variant", "runs", "train s"]
    head += [f"{measure} %, {_steps(count)}" for measure in ("exact", "Fréchet") for count in steps]
    lines = [f"# {config.title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for variant in config.variants:
        seeds = variant.seeds or config.seeds
        runs = [results[name] for name in (f"{variant.name}-{seed}" for seed in seeds) if name in results]
        if not runs:
            continue
        seconds = sum(run["train_seconds"] for run in runs) / len(runs)
        cells = [variant.label, str(len(runs)), f"{seconds:.0f}"]
        for read in (_exact, _frechet):
            cells += [_cell([read(run, f"student-{count}") for run in runs]) for count in steps]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Each student: {config.eval_seeds} seeds of {config.num_prompts} prompts of every kind.",
        f"Fréchet distance to {config.num_reference} real renders. ± is the standard deviation over runs,",
        "which differ in their training seed.",
        "",
    ]
    return "\n".join(lines)


def _exact(run: Result, key: str) -> float | None:
    rows = run["rows"].get(key)
    return None if rows is None else sum(row["accuracy"]["all"] for row in rows) / len(rows)


def _frechet(run: Result, key: str) -> float | None:
    rows = run["rows"].get(key)
    return None if rows is None else sum(row["frechet"] for row in rows) / len(rows)


def _cell(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    spread = Spread.of(numbers)
    return f"{spread.mean:.1f}" if len(numbers) == 1 else f"{spread.mean:.1f} ± {spread.sd:.1f}"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _short(result: Result) -> str:
    parts = [
        f"{key.removeprefix('student-')}: {_exact(result, key):.1f} % / {_frechet(result, key):.2f}"
        for key in result["rows"]
    ]
    return "exact / Fréchet at " + ", ".join(parts)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted keys; mappings whose keys are numbers are values."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and all(isinstance(inner, str) for inner in value):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from engines.demo.judge import Judge
from engines.distill.cli import add_gate_parser
from engines.distill.frechet import Reference, frechet_distance
from engines.distill.gate import (
    SHEET_SEED,
    Gate,
    GateConfig,
    group_counts,
    make_prompts,
    make_rows,
    measure,
    noise_seeds,
)
from engines.distill.report import GROUPS, contact_sheet, markdown
from engines.distill.verdict import Measurement, Row, Summary, check, make_report, record_verdict
from engines.errors import CheckpointError, ConfigError
from engines.families.student import read_student
from engines.noise import seeded_latents
from tests.engines.tiny import make_tiny_checkpoint


def gaussian(num: int, dim: int, seed: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return mean + std * torch.randn(
        num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# Fréchet distance


def test_distance_of_known_gaussians() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    zero, three = torch.zeros(3, dtype=torch.float64), torch.full((3,), 3.0, dtype=torch.float64)
    assert frechet_distance(zero, eye, zero, eye) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(zero, eye, three, eye) == pytest.approx(27.0)
    assert frechet_distance(zero, eye, zero, 4 * eye) == pytest.approx(3.0)  # 3 axes of (2 - 1)^2


def test_distance_of_correlated_gaussians_matches_the_matrix_square_root() -> None:
    a, b = gaussian(500, 6, 1) @ gaussian(6, 6, 2), gaussian(500, 6, 3) @ gaussian(6, 6, 4)
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eig(cov_a @ cov_b)
    root = (vectors @ torch.diag(values.sqrt()) @ torch.linalg.inv(vectors)).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * root).trace()
    assert frechet_distance(a.mean(0), cov_a, b.mean(0), cov_b) == pytest.approx(float(expected), rel=1e-6)


def test_same_distribution_is_near_zero_and_a_constant_picture_is_a_hundred_percent() -> None:
    reference = Reference.fit(gaussian(4000, 16, 0), num_axes=16)
    assert reference.distance(gaussian(4000, 16, 1)) < 1.0
    constant = reference.centre.expand(50, -1) + 1e-6 * gaussian(50, 16, 2)
    assert reference.distance(constant) == pytest.approx(100.0, abs=0.1)


def test_distance_grows_with_the_shift_and_counts_missing_variance() -> None:
    reference = Reference.fit(gaussian(4000, 16, 0), num_axes=8)
    shifts = [reference.distance(gaussian(2000, 16, 1, mean=mean)) for mean in (0.0, 0.3, 1.0)]
    assert shifts == sorted(shifts)
    assert reference.distance(gaussian(2000, 16, 1, std=0.5)) > 5.0


def test_one_picture_is_no_distribution() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        Reference.fit(torch.zeros(1, 4))


# Prompts


def test_prompts_of_a_seed_are_the_three_kinds() -> None:
    counts = group_counts(1000)
    assert counts == {"one_object": 400, "two_objects": 400, "held_out": 200}
    prompts = make_prompts(3, group_counts(50))
    assert sum(group_counts(53).values()) == 53
    for scene, group in zip(prompts.scenes, prompts.groups, strict=True):
        assert scene.is_held_out() == (group == "held_out")
        if group != "held_out":
            assert scene.num_objects == (1 if group == "one_object" else 2)
    assert (
        prompts.scenes == make_prompts(3, group_counts(50)).scenes != make_prompts(4, group_counts(50)).scenes
    )


def test_noise_differs_between_seeds_and_pictures() -> None:
    seeds = [*noise_seeds(0, 50), *noise_seeds(1, 50), *noise_seeds(SHEET_SEED, 50)]
    assert len({row.numpy().tobytes() for row in seeded_latents(seeds, (1, 2, 2))}) == 150


# Measurement


class PerfectJudge(Judge):
    """Reads what it is told, and has one feature: brightness."""

    def __init__(self, said: list[Any]) -> None:
        super().__init__()
        self.said = said

    def read(self, images: Tensor, *, batch: int = 250) -> list[Any]:
        return self.said[: len(images)]

    def features(self, images: Tensor, *, batch: int = 250) -> Tensor:
        return images.float().mean(dim=(1, 2)) + torch.arange(len(images))[:, None] % 7


def test_accuracy_is_counted_per_kind_of_prompt() -> None:
    prompts = make_prompts(0, {"one_object": 4, "two_objects": 4, "held_out": 2})
    said = list(prompts.scenes)
    said[0], said[4], said[5] = said[1], said[6], said[6]
    images = torch.randint(
        0, 256, (10, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    judge = PerfectJudge(said)
    reference = Reference.fit(judge.features(images))
    measurement = measure(images, prompts, judge, reference)
    assert measurement.accuracy == {"all": 70.0, "one_object": 75.0, "two_objects": 50.0, "held_out": 100.0}
    assert measurement.frechet == pytest.approx(0.0, abs=1e-6)


# Verdict


def summaries(**points: tuple[float, float, float]) -> dict[str, Summary]:
    """Rows by key (`_` for `-`): one-object accuracy, accuracy over all, Fréchet distance."""
    out = {}
    for name, (one, overall, frechet) in points.items():
        row = Row(name.replace("_", "-"), name, "teacher", 4)
        accuracy = {"one_object": one, "two_objects": overall, "held_out": overall, "all": overall}
        out[row.key] = Summary.of(row, [Measurement(accuracy, frechet)] * 2)
    return out


GOOD = {
    "teacher_50_cfg": (95.0, 70.0, 2.0),
    "teacher_4": (80.0, 50.0, 9.0),
    "teacher_2_cfg": (81.0, 51.0, 8.0),
    "student_4": (93.5, 65.0, 3.0),
}


def test_good_student_passes_every_criterion() -> None:
    criteria = check(summaries(**GOOD), 4, 50)
    assert len(criteria) == 5
    assert all(criterion.passed for criterion in criteria)
    assert "93.5 against 95.0" in criteria[0].text


@pytest.mark.parametrize(
    ("student", "failing"),
    [
        ((92.9, 65.0, 3.0), ["one-object"]),
        ((95.0, 50.5, 3.0), ["right more often than teacher_2_cfg"]),
        ((95.0, 65.0, 8.5), ["closer to real renders than teacher_2_cfg"]),
        (
            (95.0, 40.0, 9.5),
            ["often than teacher_4:", "than teacher_4:", "than teacher_2_cfg", "than teacher_2_cfg"],
        ),
    ],
)
def test_student_fails_what_it_does_not_reach(
    student: tuple[float, float, float], failing: list[str]
) -> None:
    failed = [
        criterion.text
        for criterion in check(summaries(**{**GOOD, "student_4": student}), 4, 50)
        if not criterion.passed
    ]
    assert len(failed) == len(failing)
    assert all(part in text for part, text in zip(failing, failed, strict=True))


def test_rows_that_were_not_measured_fail() -> None:
    rows = summaries(**GOOD)
    del rows["teacher-4"]
    (criterion,) = check(rows, 4, 50)
    assert not criterion.passed
    assert "teacher-4" in criterion.text


# Report


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("gate")
    Judge().save(base / "judge.safetensors")
    return {
        "student": make_tiny_checkpoint(base / "student"),
        "teacher": make_tiny_checkpoint(base / "teacher", student=False),
        "judge": base / "judge.safetensors",
    }


def test_report_names_means_spreads_and_verdict(directories: dict[str, Path]) -> None:
    config = gate_config(
        directories, Path(), steps=(4, 2, 1), teacher_steps=(50, 8, 4, 2), guidance_scale=2.5
    )
    rows = make_rows(config)
    assert [row.nfe for row in rows] == [0, 0, 100, 50, 16, 8, 8, 4, 4, 2, 4, 2, 1]
    measured = []
    for index, row in enumerate(rows):
        accuracy = dict.fromkeys([*GROUPS, "all"], 90.0)
        measured.append(
            (
                row,
                [
                    Measurement(accuracy, 1.0 + index),
                    Measurement({**accuracy, "one_object": 92.0}, 3.0 + index),
                ],
            )
        )
    setup = {"seeds": [0, 1], "counts": group_counts(10), "num_axes": 64, "num_reference": 20}
    report = make_report(read_student(directories["student"]), setup, measured, 50)
    table = markdown(report)
    assert "NOT PASSED" in table
    assert "| teacher, 50 steps, CFG 2.5 | 100 | 91.0 ± 1.4 | 90.0 ± 0.0 | 90.0 ± 0.0 | 4.0 ± 1.4 |" in table
    assert "| **student, 4 steps** | **4** | **91.0 ± 1.4** |" in table
    assert "| real renders | - |" in table
    json.dumps(report, allow_nan=False)


def test_contact_sheet_shows_every_picture_enlarged() -> None:
    columns = [("teacher, 50 steps", "100 evaluations"), ("student, 4 steps", "4 evaluations")]
    colours = torch.tensor(
        [[[200, 30, 30], [30, 200, 30], [30, 30, 200]], [[9, 99, 199], [199, 99, 9], [99, 9, 199]]]
    )
    pictures = [rows.to(torch.uint8)[:, None, None, :].expand(3, 64, 64, 3) for rows in colours]
    sheet = np.asarray(contact_sheet(columns, pictures, ["a red cube", "a green cone", "a blue torus"]))
    for rows in colours:
        for colour in rows.numpy():
            assert (sheet == colour).all(axis=-1).sum() >= 192 * 192
    assert sheet.shape[1] > 2 * 192


# The command


def gate_config(directories: dict[str, Path], out: Path, **changes: Any) -> GateConfig:
    settings: dict[str, Any] = {
        **directories,
        "out": out,
        "seeds": 1,
        "num_prompts": 10,
        "num_reference": 12,
        "steps": (4,),
        "teacher_steps": (4, 2),
        "guidance_scale": 2.0,
    }
    return GateConfig(**(settings | changes))


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def test_gate_measures_reports_and_records(directories: dict[str, Path], tmp_path: Path) -> None:
    config = gate_config(directories, tmp_path, seeds=2)
    report = Gate(config, quiet()).run()
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert [row["key"] for row in report["rows"]] == [
        "real", "vae", "teacher-4-cfg", "teacher-4", "teacher-2-cfg", "teacher-2", "student-4",
    ]  # fmt: skip
    assert all(len(row["seeds"]) == 2 for row in report["rows"])
    assert (tmp_path / "report.md").read_text().startswith("# Gate of ")
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 4 * 192
    gate = read_student(directories["student"]).gate
    assert gate is not None
    assert gate["passed"] == report["passed"]


def test_stopped_gate_measures_only_what_is_missing(directories: dict[str, Path], tmp_path: Path) -> None:
    whole = Gate(gate_config(directories, tmp_path / "whole"), quiet()).run()

    class Stopping(Gate):
        painted = 0

        def paint(self, row: Row, prompts: Any) -> Tensor:
            if self.painted == 3:
                raise KeyboardInterrupt
            self.painted += 1
            return super().paint(row, prompts)

    config = gate_config(directories, tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        Stopping(config, quiet()).run()
    gate = Gate(config, quiet())
    assert [row.key for row in gate.rows if gate.measurements.get(row, 0) is not None] == [
        "real",
        "vae",
        "teacher-4-cfg",
    ]
    assert gate.run()["rows"] == whole["rows"]


def test_another_student_is_measured_anew_but_its_teacher_is_not(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    gate = Gate(gate_config(directories, tmp_path), quiet())
    row_of = {row.source: row for row in gate.rows}
    for row in row_of.values():
        gate.measurements.add(row, 0, Measurement(dict.fromkeys([*GROUPS, "all"], 1.0), 1.0))
    other = make_tiny_checkpoint(tmp_path / "other", seed=5)
    again = Gate(gate_config(directories, tmp_path), quiet()).measurements
    assert all(again.get(row, 0) is not None for row in row_of.values())
    changed = Gate(gate_config({**directories, "student": other}, tmp_path), quiet()).measurements
    assert changed.get(row_of["student"], 0) is None
    assert changed.get(row_of["teacher"], 0) is not None


def test_same_noise_starts_every_sampler(directories: dict[str, Path], tmp_path: Path) -> None:
    gate = Gate(gate_config(directories, tmp_path, batch=3), quiet())
    prompts = make_prompts(0, group_counts(10))
    whole = Gate(gate_config(directories, tmp_path, batch=10), quiet()).paint(gate.rows[-1], prompts)
    parts = gate.paint(gate.rows[-1], prompts)
    assert parts.shape == (10, 64, 64, 3)
    assert (whole.int() - parts.int()).abs().max().item() <= 1


def test_too_few_prompts_and_a_missing_judge_are_refused(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="10 prompts"):
        Gate(gate_config(directories, tmp_path, num_prompts=5), quiet())
    with pytest.raises(CheckpointError, match="demo-teacher"):
        Gate(gate_config({**directories, "judge": tmp_path / "none"}, tmp_path), quiet())


def test_command_exits_with_the_verdict(directories: dict[str, Path], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_gate_parser(parser.add_subparsers())
    paths = {"teacher": directories["teacher"], "judge": directories["judge"], "out": tmp_path}
    counts = {"seeds": 1, "prompts": 10, "reference": 12, "steps": 4, "teacher-steps": 2, "guidance-scale": 2}
    options = [f"--{name}={value}" for name, value in {**paths, **counts}.items()]
    args = parser.parse_args(["gate", str(directories["student"]), *options])
    assert args.run(args) == 1  # random weights draw nothing, and the teacher's rows are missing
    with pytest.raises(SystemExit):
        parser.parse_args(["gate", "x", "--steps", "4,0"])


def test_verdict_survives_in_student_json(directories: dict[str, Path], tmp_path: Path) -> None:
    student = make_tiny_checkpoint(tmp_path / "student")
    spread = {"mean": 1.23456, "sd": 0.0}
    row = {"key": "student-4", "nfe": 4, "accuracy": {"all": spread}, "frechet": spread}
    record_verdict(student, {"passed": True, "criteria": [], "setup": {}, "rows": [row]})
    gate = read_student(student).gate
    assert gate is not None
    assert gate["passed"] is True
    assert gate["rows"] == [{"key": "student-4", "nfe": 4, "accuracy": {"all": 1.23}, "frechet": 1.235}]

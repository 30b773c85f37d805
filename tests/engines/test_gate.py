"""The gate: its prompts and pictures, what it measures, its report and its command."""

import argparse
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from engines.demo.domain import SCENES, complete, image_counts
from engines.demo.judge import Judge
from engines.demo.video.domain import CLIPS
from engines.distill.early_stop import PROMPT_SEED
from engines.errors import CheckpointError, ConfigError
from engines.families.pixart import load_transformer
from engines.families.student import read_student
from engines.gate.cli import add_gate_parser
from engines.gate.evaluator import COPIES, REFERENCE_SEED, Evaluator, GateConfig, noise_seeds, read_accuracy
from engines.gate.gate import SHEET_SEED, Gate, Measurements, identities, make_rows
from engines.gate.measurement import Cost, Measurement, Row
from engines.gate.report import contact_sheet, markdown
from engines.gate.verdict import make_report
from engines.noise import seeded_latents
from tests.engines.tiny import make_tiny_checkpoint

GROUPS = SCENES.groups
DOMAINS = {"image": SCENES, "video": CLIPS}


# Prompts


def test_prompts_of_a_seed_are_the_three_kinds() -> None:
    demo = SCENES
    assert demo.counts(1000) == {"one_object": 400, "two_objects": 400, "held_out": 200}
    assert sum(demo.counts(53).values()) == 53
    prompts = demo.prompts(3, 50)
    for scene, asked, group in zip(prompts.scenes, prompts.asked, prompts.groups, strict=True):
        assert asked.is_held_out() == scene.is_held_out() == (group == "held_out")
        assert asked.shown_by(scene)
        if group != "held_out":
            assert scene.num_objects == (1 if group == "one_object" else 2)
    assert prompts == demo.prompts(3, 50) != demo.prompts(4, 50)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_prompts_leave_as_much_unsaid_as_the_demo_wants(kind: str) -> None:
    for share, least, most in ((0.0, 0.0, 0.0), (0.75, 0.4, 0.8)):
        prompts = replace(DOMAINS[kind], partial_share=share).prompts(0, 400)
        assert prompts.captions == [asked.caption() for asked in prompts.asked]
        partial = sum(asked != scene for asked, scene in zip(prompts.asked, prompts.scenes, strict=True))
        assert least <= partial / 400 <= most


@pytest.mark.parametrize("kind", ["image", "video"])
def test_what_a_prompt_leaves_unsaid_differs_between_real_pictures_of_it(kind: str) -> None:
    demo = replace(DOMAINS[kind], partial_share=0.75)
    prompts = demo.prompts(1, 60).take(range(0, 60, 3))
    filled = set()
    for row, asked in enumerate(prompts.asked):
        for donor in demo.draw_like(asked, 3, row):
            scene = complete(asked, donor)
            assert asked.shown_by(scene)
            assert None not in scene.key()
            filled.add(scene)
    assert len(filled) > 1.5 * len(prompts.asked)
    pictures = demo.render_again(prompts.take([0, 1]), 3)
    assert len(pictures) == 6
    assert not torch.equal(pictures[0], pictures[1])


def test_noise_differs_between_seeds_and_pictures() -> None:
    seeds = [*noise_seeds(0, 50), *noise_seeds(1, 50), *noise_seeds(SHEET_SEED, 50)]
    assert len({row.numpy().tobytes() for row in seeded_latents(seeds, (1, 2, 2))}) == 150


# Measurement


class PerfectJudge(Judge):
    """Reads what it is told."""

    def __init__(self, said: list[Any]) -> None:
        super().__init__()
        self.said = said

    def read(self, images: Tensor, *, batch: int = 250) -> list[Any]:
        return self.said[: len(images)]


def test_accuracy_is_counted_per_kind_of_prompt() -> None:
    prompts = SCENES.prompts(0, 10)
    said = list(prompts.scenes)
    said[0], said[4], said[5] = said[1], said[6], said[6]
    images = torch.randint(
        0, 256, (10, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    accuracy = read_accuracy(images, prompts, PerfectJudge(said))
    assert accuracy == {"all": 70.0, "one_object": 75.0, "two_objects": 50.0, "held_out": 100.0}


class Painted(Evaluator):
    """Has no networks: keeps what it is asked to sample, and makes grey pictures."""

    def __init__(self, config: GateConfig) -> None:
        super().__init__(config)
        self.asked: list[tuple[str, int, float]] = []
        self.seeds: list[list[int]] = []
        self.captions: list[list[str]] = []

    def painter(self, source: Any) -> Any:
        def paint(captions: list[str], seeds: list[int], *, num_steps: int, guidance_scale: float) -> Tensor:
            self.asked.append((source, num_steps, guidance_scale))
            self.captions.append(captions)
            self.seeds.append(seeds)
            return torch.full((len(captions), 8, 8, 3), 128, dtype=torch.uint8)

        return paint


def test_every_row_samples_as_it_says_from_the_same_noise(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    config = gate_config(directories, tmp_path, steps=(4, 1), teacher_steps=(8, 2), guidance_scale=2.5)
    evaluator, prompts = Painted(config), SCENES.prompts(3, 10)
    rows = [row for row in make_rows(config) if row.source in ("teacher", "student")]
    for row in rows:
        assert evaluator.paint(row, prompts).shape == (10, 8, 8, 3)
    assert evaluator.asked == [
        ("teacher", 8, 2.5), ("teacher", 8, 1.0), ("teacher", 2, 2.5), ("teacher", 2, 1.0),
        ("student", 4, 1.0), ("student", 1, 1.0),
    ]  # fmt: skip
    assert evaluator.captions == [prompts.captions] * len(rows)
    assert evaluator.seeds == [noise_seeds(3, 10)] * len(rows)


def test_copies_of_a_prompt_start_from_noise_that_nothing_else_started_from(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    config = gate_config(directories, tmp_path)
    evaluator, prompts, row = Painted(config), SCENES.prompts(3, 10), make_rows(config)[-1]
    evaluator.paint(row, prompts)
    evaluator.paint_again(row, prompts)
    assert evaluator.captions[1] == [caption for caption in prompts.captions for _ in range(COPIES)]
    assert len({*evaluator.seeds[0], *evaluator.seeds[1]}) == 10 + 10 * COPIES
    assert max(evaluator.seeds[1]) < min(noise_seeds(4, 10))


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_teacher_and_student_are_drawn_by_their_own_networks(
    source: Any, directories: dict[str, Path], tmp_path: Path
) -> None:
    other = make_tiny_checkpoint(tmp_path / "student", seed=5)
    evaluator = Evaluator(gate_config({**directories, "student": other}, tmp_path))
    network = evaluator.painter(source).denoiser.network
    expected = load_transformer(other if source == "student" else directories["teacher"]).state_dict()
    assert network.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


def test_judged_prompts_are_not_those_that_pictures_are_compared_with_or_students_chosen_by() -> None:
    seeds = [*range(100), REFERENCE_SEED, SHEET_SEED, PROMPT_SEED]
    assert len(set(seeds)) == len(seeds)


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
                    Measurement(accuracy, 1.0 + index, 2.0 + index),
                    Measurement({**accuracy, "one_object": 92.0}, 3.0 + index, 2.0 + index),
                ],
            )
        )
    setup = {
        "seeds": [0, 1],
        "groups": GROUPS,
        "counts": image_counts(10),
        "num_axes": 64,
        "num_reference": 20,
        "features": None,
        "scores": [],
        "num_repeated": 2,
        "copies": 4,
        "timing": {"num_pictures": 10, "batch": 10, "machine": "an abacus"},
        "parameters": {"teacher": 1_500_000, "student": 1_500_010},
    }
    costs = {"student-4": Cost(0.01234, 56.7)}
    report = make_report(read_student(directories["student"]), setup, measured, 50, costs)
    table = markdown(report)
    assert "NOT PASSED" in table
    accuracies = "91.0 ± 1.4 | 90.0 ± 0.0 | 90.0 ± 0.0"
    assert f"| teacher, 50 steps, CFG 2.5 | 100 | {accuracies} | 4.0 ± 1.4 | 200.0 ± 0.0 | - | - |" in table
    assert "| **student, 4 steps** | **4** | **91.0 ± 1.4** |" in table
    assert "| **57** | **0.0123** |" in table
    assert "| real renders | - |" in table
    assert "- student, 4 steps: exact over all prompts, points +0.00 ± 0.00; Fréchet" in table
    assert "an abacus" in table
    assert "teacher 1.5 M" in table
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


def test_labels_of_small_pictures_stand_apart() -> None:
    columns, picture = (
        [("teacher, 50 steps", "100 evaluations, CFG 2")] * 2,
        torch.zeros(1, 8, 8, 3, dtype=torch.uint8),
    )
    sheet = np.asarray(contact_sheet(columns, [picture] * 2, ["a red ball"], height=32))
    middle = sheet.shape[1] // 2
    assert (sheet[:, middle - 3 : middle + 3] == 255).all()
    assert (sheet[-76:, : middle - 3] < 128).any()


def test_contact_sheet_of_clips_shows_their_first_middle_and_last_frame() -> None:
    clip = torch.zeros(1, 5, 32, 32, 3, dtype=torch.uint8)
    for frame in range(5):
        clip[:, frame] = torch.tensor([40 * frame, 255 - 40 * frame, 9], dtype=torch.uint8)
    sheet = np.asarray(contact_sheet([("student", "4 evaluations")], [clip], ["a red ball"], height=96))
    for frame, shown in enumerate([True, False, True, False, True]):
        colour = np.array([40 * frame, 255 - 40 * frame, 9])
        num_pixels = (sheet == colour).all(axis=-1).sum()  # where frames meet, colours blend
        assert (num_pixels > 90 * 90) if shown else (num_pixels == 0)


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
    assert all((row["cost"] is None) == (row["key"] in ("real", "vae")) for row in report["rows"])
    by_key = {row["key"]: row for row in report["rows"]}
    assert by_key["teacher-4-cfg"]["cost"]["paired"] == 0.0
    assert by_key["real"]["diversity"]["mean"] == pytest.approx(100.0)
    assert report["setup"]["parameters"]["student"] > report["setup"]["parameters"]["teacher"] > 0
    assert (tmp_path / "report.md").read_text().startswith("# Gate of ")
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width > 4 * 192
    gate = read_student(directories["student"]).gate
    assert gate is not None
    assert gate["passed"] == report["passed"]


class StopsAfter(Measurements):
    """Somebody presses Ctrl-C when so many are done."""

    def __init__(self, num: int, measurements: Measurements) -> None:
        super().__init__(measurements.path, measurements.identities)
        self.left = num

    def add(self, row: Row, seed: int, measurement: Measurement) -> None:
        super().add(row, seed, measurement)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_stopped_gate_measures_only_what_is_missing(directories: dict[str, Path], tmp_path: Path) -> None:
    whole = Gate(gate_config(directories, tmp_path / "whole"), quiet()).run()

    gate = Gate(gate_config(directories, tmp_path / "parts"), quiet())
    gate.measurements = StopsAfter(3, gate.measurements)
    with pytest.raises(KeyboardInterrupt):
        gate.run()
    gate = Gate(gate.config, quiet())
    assert [row.key for row in gate.rows if gate.measurements.get(row, 0) is not None] == [
        "teacher-4-cfg",
        "teacher-4",
        "teacher-2-cfg",
    ]
    assert [row["seeds"] for row in gate.run()["rows"]] == [row["seeds"] for row in whole["rows"]]


def test_measurements_of_earlier_versions_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    row, old = Row("real", "real renders", "real"), {"accuracy": {"all": 1.0}, "frechet": 2.0}
    stored = {"real@0#then": old, "real@0#later": {**old, "unheard_of": 1}, "odd": 3}
    path.write_text(json.dumps(stored))
    measurements = Measurements(path, {"real": "now"})
    assert measurements.get(row, 0) is None
    assert Measurements(path, {"real": "then"}).get(row, 0) == Measurement({"all": 1.0}, 2.0)
    measurements.add(row, 0, Measurement({"all": 5.0}, 6.0, 7.0))
    assert Measurements(path, {"real": "then"}).get(row, 0) is not None
    for text in ("[]", "no json", "7"):
        path.write_text(text)
        assert Measurements(path, {"real": "now"}).get(row, 0) is None


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


def test_other_timesteps_or_guidance_are_measured_anew(directories: dict[str, Path], tmp_path: Path) -> None:
    config = gate_config(directories, tmp_path)
    before = identities(config)
    guided = identities(replace(config, guidance_scale=3.0))
    assert {source for source in before if guided[source] != before[source]} == {"teacher"}
    student = tmp_path / "student"
    shutil.copytree(directories["student"], student)
    description = json.loads((student / "student.json").read_text())
    description["timesteps"]["4"] = [999, 856, 665, 399]
    (student / "student.json").write_text(json.dumps(description))
    visited = identities(replace(config, student=student))
    assert {source for source in before if visited[source] != before[source]} == {"student"}


def test_same_noise_starts_every_sampler(directories: dict[str, Path], tmp_path: Path) -> None:
    row = make_rows(gate_config(directories, tmp_path))[-1]
    prompts = SCENES.prompts(0, 10)
    whole, parts = (
        Evaluator(gate_config(directories, tmp_path, batch=batch)).paint(row, prompts) for batch in (10, 3)
    )
    assert parts.shape == (10, 64, 64, 3)
    assert (whole.int() - parts.int()).abs().max().item() <= 1


def test_too_few_prompts_and_a_missing_judge_are_refused(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="10 prompts"):
        Gate(gate_config(directories, tmp_path, num_prompts=5), quiet())
    with pytest.raises(CheckpointError, match="demo-teacher"):
        Gate(gate_config({**directories, "judge": tmp_path / "none"}, tmp_path), quiet())


@pytest.mark.slow
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

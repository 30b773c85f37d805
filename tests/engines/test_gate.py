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
from engines.gate.evaluator import (
    COPIES,
    REFERENCE_SEED,
    Evaluator,
    GateConfig,
    noise_seeds,
    paired_distance,
    pairwise_distance,
    read_accuracy,
)
from engines.gate.frechet import Reference, frechet_distance
from engines.gate.gate import SHEET_SEED, Gate, Measurements, identities, make_rows
from engines.gate.measurement import Cost, Difference, Measurement, Row, Summary, difference
from engines.gate.report import contact_sheet, markdown
from engines.gate.verdict import check, make_report, record_verdict
from engines.noise import seeded_latents
from tests.engines.tiny import make_tiny_checkpoint

GROUPS = SCENES.groups
DOMAINS = {"image": SCENES, "video": CLIPS}


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


def test_diversity_is_the_mean_distance_of_pictures_of_one_prompt() -> None:
    features = torch.tensor([[0.0], [3.0], [3.0], [100.0], [100.0], [100.0]])
    assert pairwise_distance(features, 3) == pytest.approx((3 + 3 + 0) / 3 / 2)


def test_paired_distance_is_none_for_the_same_and_a_hundred_for_strangers() -> None:
    features, others = gaussian(500, 32, 0), gaussian(500, 32, 1)
    assert paired_distance(features, features) == 0.0
    assert paired_distance(features, others) == pytest.approx(100.0, abs=2.0)
    assert paired_distance(features + 0.1 * others, features) < 15.0


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


# Verdict


def summaries(**points: tuple[float, float, float]) -> dict[str, Summary]:
    """Rows by key (`_` for `-`): one-object accuracy, accuracy over all, Fréchet distance."""
    out = {}
    for name, (one, overall, frechet) in points.items():
        row = Row(name.replace("_", "-"), name, "teacher", 4)
        accuracy = {"one_object": one, "two_objects": overall, "held_out": overall, "all": overall}
        out[row.key] = Summary.of(row, [Measurement(accuracy, frechet)] * 2)
    return out


KIND = ("one_object", "one object")
GOOD = {
    "teacher_50_cfg": (95.0, 70.0, 2.5),
    "teacher_4_cfg": (94.0, 67.0, 3.5),
    "teacher_4": (80.0, 50.0, 9.0),
    "teacher_2_cfg": (81.0, 51.0, 8.0),
    "student_4": (93.5, 69.0, 3.0),
}


def test_good_student_passes_every_criterion() -> None:
    criteria = check(summaries(**GOOD), 4, 50, KIND)
    assert len(criteria) == 10
    assert all(criterion.passed for criterion in criteria)
    assert "93.5 against 95.0" in criteria[0].text


@pytest.mark.parametrize(
    ("student", "failing"),
    [
        ((92.9, 69.0, 3.0), ["(one object) to teacher_50_cfg"]),
        ((93.5, 67.9, 3.0), ["(all prompts) to teacher_50_cfg"]),
        ((93.5, 69.0, 3.6), ["farther from real renders than teacher_50_cfg"]),
        (
            (91.9, 64.9, 4.6),
            [
                "(one object) to teacher_50_cfg", "(all prompts) to teacher_50_cfg", "than teacher_50_cfg",
                "(one object) to teacher_4_cfg", "(all prompts) to teacher_4_cfg", "than teacher_4_cfg",
            ],
        ),
    ],
)  # fmt: skip
def test_student_fails_what_it_does_not_reach(
    student: tuple[float, float, float], failing: list[str]
) -> None:
    failed = [
        criterion.text
        for criterion in check(summaries(**{**GOOD, "student_4": student}), 4, 50, KIND)
        if not criterion.passed
    ]
    assert len(failed) == len(failing)
    assert all(part in text for part, text in zip(failing, failed, strict=True))


@pytest.mark.parametrize("rival", ["teacher_4", "teacher_2_cfg"])
def test_student_that_is_only_as_good_as_its_teacher_at_equal_cost_fails(rival: str) -> None:
    rows = {**GOOD, rival: (80.0, 69.0, 3.0)}
    failed = [criterion.text for criterion in check(summaries(**rows), 4, 50, KIND) if not criterion.passed]
    assert len(failed) == 2
    assert f"more often than {rival}: 69.0 against 69.0" in failed[0]
    assert f"than {rival}: Fréchet distance 3.00 against 3.00" in failed[1]


def test_odd_number_of_steps_has_only_the_unguided_rival() -> None:
    rows = {"teacher_50_cfg": GOOD["teacher_50_cfg"], "teacher_1": GOOD["teacher_4"]}
    rows["teacher_1_cfg"] = GOOD["teacher_4_cfg"]
    criteria = check(summaries(**rows, student_1=GOOD["student_4"]), 1, 50, KIND)
    assert [criterion.passed for criterion in criteria] == [True] * 8


def measured_as(key: str, *one_object: float) -> Summary:
    """A row by its accuracy at each seed; the other numbers are those of a good student."""
    rows = [Measurement({"one_object": one, "all": 69.0}, 3.0) for one in one_object]
    return Summary.of(Row(key, key, "teacher", 4), rows)


@pytest.mark.parametrize(
    ("ours", "passes"),
    [
        ([94.0, 94.0, 94.0, 94.0], True),  # one point less, at every seed
        ([91.0, 96.0, 92.0, 97.0], False),  # one point less on average, or three, or none
        ([94.5], False),  # of one seed nothing follows
    ],
)
def test_student_is_as_good_as_its_teacher_only_if_that_is_no_luck(ours: list[float], passes: bool) -> None:
    rows = summaries(**GOOD)
    for key, values in (("student-4", ours), ("teacher-50-cfg", [95.0] * len(ours))):
        rows[key] = measured_as(key, *values)
    for key in ("teacher-4-cfg", "teacher-4", "teacher-2-cfg"):
        rows[key] = Summary.of(rows[key].row, rows[key].measurements[:1] * len(ours))
    first = check(rows, 4, 50, KIND)[0]
    assert "(one object) to teacher-50-cfg" in first.text
    assert first.passed == passes


def test_interval_is_that_of_students_t() -> None:
    found = Difference.of([3.0, 4.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0])
    reach = 2.353 * np.std([2, 3, 1, 2], ddof=1) / 2
    assert (found.lowest, found.highest) == pytest.approx((2.0 - reach, 2.0 + reach))
    assert str(found) == f"+2.00 (90 % interval {2 - reach:+.2f} to {2 + reach:+.2f})"
    assert (Difference.of([1.0], [0.0]).lowest, Difference.of([1.0], [0.0]).highest) == (-np.inf, np.inf)


def test_difference_is_what_the_row_has_more_and_how_sure_that_is() -> None:
    def measured(values: list[tuple[float, float, float]]) -> list[Measurement]:
        return [Measurement({"all": one}, two, scores={"clip": three}) for one, two, three in values]

    ours = measured([(80.0, 5.0, 31.0), (82.0, 6.0, 31.5), (84.0, 4.0, 32.0)])
    theirs = measured([(85.0, 2.0, 30.0), (86.0, 2.0, 30.0), (87.0, 2.0, 30.0)])
    row = Row("student-4", "student, 4 steps", "student", 4)
    found = difference(row, ours, "teacher-50-cfg", theirs)
    for name, each in (("accuracy", [-5, -4, -3]), ("frechet", [3, 4, 2]), ("clip", [1, 1.5, 2])):
        error = np.std(each, ddof=1) / np.sqrt(3)
        assert found[name] == pytest.approx({"mean": np.mean(each), "standard_error": error})
    assert difference(row, ours[:1], "x", theirs[:1])["frechet"] == {"mean": 3.0, "standard_error": None}


def test_rows_that_were_not_measured_fail() -> None:
    rows = summaries(**GOOD)
    del rows["teacher-4"]
    (criterion,) = check(rows, 4, 50, KIND)
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


def test_verdict_survives_in_student_json(directories: dict[str, Path], tmp_path: Path) -> None:
    student = make_tiny_checkpoint(tmp_path / "student")
    spread = {"mean": 1.23456, "sd": 0.0}
    row = {"key": "student-4", "nfe": 4, "accuracy": {"all": spread}, "frechet": spread}
    row |= {"diversity": spread, "cost": {"seconds": 0.123456, "paired": 1.0}, "scores": {}}
    record_verdict(student, {"passed": True, "criteria": [], "setup": {}, "rows": [row]})
    gate = read_student(student).gate
    assert gate is not None
    assert gate["passed"] is True
    assert gate["rows"] == [
        {
            "key": "student-4",
            "nfe": 4,
            "accuracy": {"all": 1.23},
            "frechet": 1.235,
            "scores": {},
            "diversity": 1.2,
            "seconds": 0.1235,
        }
    ]

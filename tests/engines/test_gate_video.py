"""The gate of a student that draws videos."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageSequence
from rich.console import Console

from engines.demo.video.domain import CLIPS, video_counts
from engines.demo.video.judge import VideoJudge
from engines.demo.video.scenes import Scene, sample_scenes
from engines.families.student import read_student
from engines.gate.evaluator import GateConfig
from engines.gate.gate import Gate
from tests.engines.tiny import make_tiny_cogvideox


def test_prompts_of_videos_are_of_two_kinds() -> None:
    assert video_counts(1000) == {"seen": 800, "held_out": 200}
    prompts = CLIPS.prompts(0, 50)
    for scene, asked, group in zip(prompts.scenes, prompts.asked, prompts.groups, strict=True):
        assert asked.is_held_out() == scene.is_held_out() == (group == "held_out")
        assert asked.shown_by(scene)


def test_words_of_a_caption_are_what_it_asks_for() -> None:
    scenes = sample_scenes(40, 0)
    scenes += [scene.partly_said(np.random.default_rng(row)) for row, scene in enumerate(scenes)]
    assert [CLIPS.asked_by(scene.caption()) for scene in scenes] == scenes
    assert CLIPS.asked_by("a golden orb rolling to the left") == Scene("ball", "yellow", "left")
    for unknown in ("a red zebra", "red", ""):
        assert CLIPS.asked_by(unknown) is None


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    base = tmp_path_factory.mktemp("gate")
    VideoJudge().save(base / "judge.safetensors")
    config = GateConfig(
        student=make_tiny_cogvideox(base / "student"),
        teacher=make_tiny_cogvideox(base / "teacher", student=False),
        judge=base / "judge.safetensors",
        out=base / "report",
        seeds=1,
        num_prompts=10,
        num_reference=12,
        steps=(4,),
        teacher_steps=(4, 2),
        guidance_scale=2.0,
    )
    return Gate(config, Console(file=io.StringIO(), force_terminal=False))


def test_videos_are_measured_read_and_shown_as_filmstrips(gate: Gate) -> None:
    report = gate.run()
    assert list(report["setup"]["groups"]) == ["seen", "held_out"]
    keys = ["real", "vae", "teacher-4-cfg", "teacher-4", "teacher-2-cfg", "teacher-2", "student-4"]
    assert [row["key"] for row in report["rows"]] == keys
    assert len(report["criteria"]) == 7
    assert "accuracy (seen pairs)" in report["criteria"][0]["text"]
    table = (gate.config.out / "report.md").read_text()
    assert "| exact %, seen pairs | exact %, held-out pairs |" in table
    with Image.open(gate.config.out / "contact_sheet.png") as sheet:
        assert sheet.width > 4 * 3 * 96
        assert sheet.height > 6 * 96
    with Image.open(gate.config.out / "contact_sheet.webp") as moving:
        assert (moving.format, getattr(moving, "n_frames", 1)) == ("WEBP", 9)
        frames = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(moving)]
    assert all(np.abs(a - b).max() > 20 for a, b in itertools.pairwise(frames))
    assert read_student(gate.config.student).gate_passed == report["passed"]

"""Sheets of samples during training: what is on them, and that training does not notice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from engines.distill.checkpoint import latest_checkpoint
from engines.distill.samples import filmstrips, lay_out
from engines.distill.studio import averaged
from engines.distill.trainer import Trainer, distill
from engines.gate.painter import Painter
from tests.engines.distilling import PROMPTS, config_of, quiet, trainer_of
from tests.engines.tiny import make_tiny_cogvideox

SAMPLES = {"every": 3, "prompts": 2, "seeds": 1, "teacher_steps": 2}


def state(out: Path) -> dict[str, Tensor]:
    newest = latest_checkpoint(out / "checkpoints")
    assert newest is not None
    return load_file(newest / "state.safetensors")


def check_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": {"rank": 4, "alpha": 8}, "gradient_checkpointing": True},
    ],
    ids=["copies", "adapters"],
)
def test_training_does_not_notice_that_samples_are_drawn(
    changes: dict[str, object], teacher: Path, tmp_path: Path
) -> None:
    plain = config_of(teacher, tmp_path / "plain", samples={"every": 0}, **changes)
    drawing = config_of(teacher, tmp_path / "drawing", samples=SAMPLES, tensorboard=True, **changes)
    for config in (plain, drawing):
        distill(config, quiet())
    check_equal(state(plain.out), state(drawing.out))
    assert not (plain.out / "samples").exists()
    names = sorted(path.name for path in (drawing.out / "samples").iterdir())
    assert names == ["00000003.png", "00000006.png"]
    events = EventAccumulator(str(drawing.out / "tensorboard"), size_guidance={"images": 0}).Reload()
    shown = events.Images("samples")
    assert [event.step for event in shown] == [3, 6]
    with Image.open(drawing.out / "samples" / names[0]) as sheet:
        assert (shown[0].width, shown[0].height) == sheet.size


def test_a_resumed_run_draws_the_same_sheets(teacher: Path, tmp_path: Path) -> None:
    whole = config_of(teacher, tmp_path / "whole", samples=SAMPLES)
    distill(whole, quiet())
    halted = config_of(teacher, tmp_path / "halted", samples=SAMPLES)
    trainer = trainer_of(halted)
    stop_after(trainer, 3)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(quiet())
    assert not (halted.out / "samples" / "00000003.png").exists()
    distill(halted, quiet())
    check_equal(state(whole.out), state(halted.out))
    for path in (whole.out / "samples").iterdir():
        with Image.open(path) as one, Image.open(halted.out / "samples" / path.name) as other:
            assert one.tobytes() == other.tobytes()


def stop_after(trainer: Trainer, iteration: int) -> None:
    """Have a signal come in the middle of an iteration."""
    step = trainer.step

    def stepped() -> None:
        step()
        if trainer.state.iteration + 1 == iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.step = stepped  # type: ignore[method-assign]


def test_pictures_are_those_of_the_written_student(teacher: Path, tmp_path: Path) -> None:
    config = config_of(teacher, tmp_path / "out", autocast="none", ema_decay=0.5)
    trainer = trainer_of(config)
    trainer.train(quiet())
    distill(config, quiet())
    painter = Painter(config.out / "student")
    cond = trainer.bank.rows(torch.arange(3))
    for count in (4, 1):
        drawn = trainer.studio.student(cond, [5, 6, 7], count)
        written = painter(PROMPTS, [5, 6, 7], num_steps=count)
        assert drawn.shape == written.shape == (3, 64, 64, 3)
        assert (drawn.int() - written.int()).abs().max() <= 3  # written in half precision
    theirs = Painter(teacher)(PROMPTS, [5, 6, 7], num_steps=3, guidance_scale=2.0)
    assert (trainer.studio.teacher(cond, [5, 6, 7], 3, 2.0).int() - theirs.int()).abs().max() <= 1


def test_drawing_leaves_the_random_state_alone(teacher: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(teacher, tmp_path / "out", samples=SAMPLES))
    before = torch.get_rng_state()
    trainer.sheets.draw()
    assert torch.equal(before, torch.get_rng_state())


def test_weights_come_back_when_drawing_fails(teacher: Path, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(teacher, tmp_path / "out"))
    trainer.step()
    learned = {key: value.detach().clone() for key, value in trainer.state.parameters["student"].items()}
    average = {key: value.clone() for key, value in trainer.state.average.items()}

    def fail() -> None:
        with averaged(trainer.state):
            check_equal(dict(trainer.state.parameters["student"]), average)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    check_equal(dict(trainer.state.parameters["student"]), learned)
    check_equal(trainer.state.average, average)


def test_videos_are_drawn_as_strips(tmp_path: Path) -> None:
    teacher = make_tiny_cogvideox(tmp_path / "teacher", student=False)
    config = config_of(
        teacher,
        tmp_path / "out",
        iterations=1,
        batch_size=2,
        num_steps={2: 1.0},
        default_num_steps=2,
        samples={"every": 1, "prompts": 1, "seeds": 1, "teacher_steps": 1},
    )
    distill(config, quiet())
    with Image.open(config.out / "samples" / "00000001.png") as sheet:
        assert sheet.width > sheet.height


# Layout


def test_a_strip_has_frames_at_equal_distances() -> None:
    videos = torch.arange(9, dtype=torch.uint8).view(1, 9, 1, 1, 1).expand(2, 9, 4, 5, 3)
    strips = filmstrips(videos)
    assert strips.shape == (2, 4, 20, 3)
    assert strips[0, 0, ::5, 0].tolist() == [0, 3, 5, 8]
    assert filmstrips(videos[:, :1]).shape == (2, 4, 5, 3)


def test_pictures_stand_in_rows_under_the_teachers() -> None:
    red, blue = (torch.zeros(4, 8, 8, 3, dtype=torch.uint8) for _ in range(2))
    red[..., 0], blue[..., 2] = 255, 255
    sheet = lay_out({"teacher": red, "student": blue}, ["a prompt", "a very long prompt " * 20], 2)
    column = [sheet.getpixel((250, y)) for y in range(sheet.height)]
    assert column.index((255, 0, 0)) < column.index((0, 0, 255))
    row = [sheet.getpixel((x, 100)) for x in range(sheet.width)]
    assert row.count((255, 0, 0)) == 4 * 192

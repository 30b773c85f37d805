"""What a student draws while it learns: fixed prompts and noise, under the teacher's pictures of the same."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engines.distill.config import DistillConfig
from engines.distill.disk import room_for
from engines.distill.prompts import PromptBank
from engines.distill.studio import Studio
from engines.gate.report import save_contact_sheet

NUM_FRAMES = 4
"""Of a video that are shown."""
IMAGE_HEIGHT, VIDEO_HEIGHT = 192, 96
MARGIN, GAP, LABEL_WIDTH, LINE_HEIGHT, CAPTION_LINES = 16, 6, 130, 18, 3
FONT_SIZE, CHARACTER_WIDTH = 13, 7


class SampleSheets:
    """The same prompts from the same noise again and again: a row per step count, the teacher's first.

    Args:
        bank: of its prompts, those at equal distances are drawn.
    """

    def __init__(self, studio: Studio, bank: PromptBank, config: DistillConfig) -> None:
        settings = config.samples
        count = min(settings.prompts, len(bank.prompts))
        chosen = torch.arange(count) * len(bank.prompts) // count
        self.num_seeds = settings.seeds
        self.captions = [bank.captions[row] for row in chosen.tolist()] if bank.captions else [""] * count
        self._studio = studio
        self._cond = bank.rows(chosen.repeat_interleave(settings.seeds))
        self._seeds = list(range(settings.seeds)) * count
        self._counts = sorted(config.num_steps, reverse=True)
        self._teacher_steps, self._guidance_scale = settings.teacher_steps, config.objective.guidance_scale
        self._teacher: Tensor | None = None

    def draw(self) -> Image.Image:
        """Draw them all with the student as it is; every process of the run has to ask."""
        if self._teacher is None:
            self._teacher = self._studio.teacher(
                self._cond, self._seeds, self._teacher_steps, self._guidance_scale
            )
        rows = {f"teacher\n{_steps(self._teacher_steps)}\nguidance {self._guidance_scale:g}": self._teacher}
        for count in self._counts:
            rows[f"student\n{_steps(count)}"] = self._studio.student(self._cond, self._seeds, count)
        return lay_out(rows, self.captions, self.num_seeds)


def lay_out(rows: dict[str, Tensor], captions: Sequence[str], num_seeds: int) -> Image.Image:
    """Put pictures on a sheet.

    Args:
        rows: by label, (P S, H, W, 3) images or (P S, F, H, W, 3) videos, uint8, those of a prompt in a row.
        captions: P prompts, each under its pictures.
        num_seeds: S.
    """
    strips = {label: filmstrips(drawn) if drawn.ndim == 5 else drawn for label, drawn in rows.items()}
    first, first_strip = next(iter(rows.values())), next(iter(strips.values()))
    height = IMAGE_HEIGHT if first.ndim == 4 else VIDEO_HEIGHT
    width = round(height * first_strip.shape[2] / first_strip.shape[1])
    font = ImageFont.load_default(FONT_SIZE)
    columns = len(first_strip)
    size = (
        2 * MARGIN + LABEL_WIDTH + columns * (width + GAP),
        2 * MARGIN + len(rows) * (height + GAP) + CAPTION_LINES * LINE_HEIGHT,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(strips.items()):
        top = MARGIN + row * (height + GAP)
        draw.text((MARGIN, top), label, "#111111", font)
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture.contiguous().numpy())
            tile = tile.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(tile, (MARGIN + LABEL_WIDTH + column * (width + GAP), top))
    for index, caption in enumerate(captions):
        left = MARGIN + LABEL_WIDTH + index * num_seeds * (width + GAP)
        lines = textwrap.wrap(caption, max(8, num_seeds * (width + GAP) // CHARACTER_WIDTH))[:CAPTION_LINES]
        draw.text((left, size[1] - MARGIN - CAPTION_LINES * LINE_HEIGHT), "\n".join(lines), "#333333", font)
    return sheet


def filmstrips(videos: Tensor) -> Tensor:
    """(N, F, H, W, 3) to (N, H, n W, 3): n frames at equal distances, first and last among them."""
    count = min(NUM_FRAMES, videos.shape[1])
    shown = videos[:, torch.linspace(0, videos.shape[1] - 1, count).round().long()]
    return shown.permute(0, 2, 1, 3, 4).flatten(2, 3)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def save_sheet(path: Path, sheet: Image.Image) -> None:
    """Write a sheet where there may be no room for it."""
    with room_for(path, 3 * sheet.width * sheet.height, "The last checkpoint stays"):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_contact_sheet(path, sheet)

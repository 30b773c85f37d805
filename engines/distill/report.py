"""What a gate leaves behind for people: a table in Markdown and a contact sheet."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GROUPS = {"one_object": "one object", "two_objects": "two objects", "held_out": "held-out pairs"}
"""Kinds of prompts, and what the table calls them."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.sd:.1f}"


def markdown(report: Mapping[str, Any]) -> str:
    """Render `report.json` as Markdown: verdict, criteria, table and how it was measured."""
    verdict = "passed" if report["passed"] else "NOT PASSED"
    criteria = [f"- [{'x' if item['passed'] else ' '}] {item['text']}" for item in report["criteria"]]
    exact = " | ".join(f"exact %, {name}" for name in GROUPS.values())
    table = [
        f"| sampler | NFE | {exact} | Fréchet distance % |",
        "|---|---|" + "---|" * len(GROUPS) + "---|",
        *(_table_row(row, bold=row["key"] == report["highlight"]) for row in report["rows"]),
    ]
    setup = report["setup"]
    num_prompts = sum(setup["counts"].values())
    counts = ", ".join(f"{setup['counts'][group]} {name}" for group, name in GROUPS.items())
    notes = [
        f"Mean ± sd over {len(setup['seeds'])} seeds of {num_prompts} prompts ({counts}).",
        "Each seed has its own prompts and noise, the same for every row.",
        "Exact: the judge reads every captioned attribute as asked.",
        f"Fréchet distance: in the judge's features, {setup['num_axes']} principal axes, in % of the real",
        f"renders' variance, n = {num_prompts} against {setup['num_reference']} renders of other scenes.",
        "NFE: transformer evaluations per picture, two per guided step.",
    ]
    return "\n".join([f"# Gate of {report['name']}: {verdict}", "", *criteria, "", *table, "", *notes, ""])


def _table_row(row: Mapping[str, Any], *, bold: bool) -> str:
    spreads = [row["accuracy"][group] for group in GROUPS] + [row["frechet"]]
    cells = [row["label"], str(row["nfe"] or "-"), *(str(Spread(**spread)) for spread in spreads)]
    return "| " + " | ".join(f"**{cell}**" if bold else cell for cell in cells) + " |"


def contact_sheet(
    columns: Sequence[tuple[str, str]], pictures: Sequence[Tensor], prompts: Sequence[str], *, scale: int = 3
) -> Image.Image:
    """Lay out the same prompts and noise across samplers: a column per sampler, a row per prompt.

    Args:
        columns: title and subtitle under each column.
        pictures: per column (R, H, W, 3) uint8.
        prompts: R captions, each under its row.
        scale: enlargement of the pictures.
    """
    num_rows, height, width, _ = pictures[0].shape
    cell_h, cell_w, gap, margin = height * scale, width * scale, 8, 20
    title_font, prompt_font = ImageFont.load_default(17), ImageFont.load_default(14)
    row_h, foot_h = cell_h + 28, 56
    sheet = Image.new(
        "RGB",
        (2 * margin + len(columns) * (cell_w + gap) - gap, 2 * margin + num_rows * row_h + foot_h),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, (title, subtitle) in enumerate(columns):
        left = margin + column * (cell_w + gap)
        for row in range(num_rows):
            tile = Image.fromarray(pictures[column][row].contiguous().numpy())
            sheet.paste(tile.resize((cell_w, cell_h), Image.Resampling.LANCZOS), (left, margin + row * row_h))
        middle, foot = left + cell_w / 2, margin + num_rows * row_h + 8
        draw.text((middle, foot), title, "#111111", title_font, anchor="ma")
        draw.text((middle, foot + 22), subtitle, "#666666", prompt_font, anchor="ma")
    for row, prompt in enumerate(prompts):
        top = margin + row * row_h + cell_h + 4
        draw.text((margin, top), prompt, "#333333", prompt_font)
    return sheet


def save_contact_sheet(path: Path, sheet: Image.Image) -> None:
    partial = path.with_suffix(".partial")
    sheet.save(partial, "PNG", optimize=True)
    partial.replace(path)

"""What a gate leaves behind for people: a table in Markdown and a contact sheet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engines.files import replacing

SCORES = {"clip": "CLIP score", "hps": "HPSv2"}
"""Scores of how pictures fit their prompts, and what the table calls them."""


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
    setup, groups = report["setup"], report["setup"]["groups"]
    head = ["sampler", "NFE", *(f"exact %, {name}" for name in groups.values())]
    head += [
        "Fréchet distance %",
        *(SCORES[name] for name in setup["scores"]),
        "diversity %",
        "same noise %",
        "s per picture",
    ]
    rows = [
        _table_row(row, groups, setup["scores"], bold=row["key"] == report["highlight"])
        for row in report["rows"]
    ]
    table = [_line(head), "|" + "---|" * len(head), *rows]
    sections = [f"# Gate of {report['name']}: {verdict}", *criteria, "", *table]
    if report["differences"]:
        sections += ["", *_differences(report)]
    if report.get("examples"):
        sections += ["", *_examples(report["examples"])]
    return "\n".join([sections[0], "", *sections[1:], "", *_notes(setup), ""])


def _examples(examples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each example, in how many pictures of it the judge read all it says, and whether it is offered."""
    lines = ["Examples, each at the default steps:", ""]
    for one in examples:
        right = "nobody can read it" if one["right"] is None else f"{one['right']:.0%} of {one['seeds']}"
        lines.append(f"- [{'x' if one['accepted'] else ' '}] {one['prompt']}: {right}")
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table_row(
    row: Mapping[str, Any], groups: Mapping[str, str], scores: Sequence[str], *, bold: bool
) -> str:
    spreads = [Spread(**row["accuracy"][group]) for group in groups] + [Spread(**row["frechet"])]
    cells = [row["label"], str(row["nfe"] or "-"), *map(str, spreads)]
    cells += [f"{row['scores'][name]['mean']:.2f} ± {row['scores'][name]['sd']:.2f}" for name in scores]
    cells.append("-" if row["diversity"] is None else str(Spread(**row["diversity"])))
    cost = row["cost"]
    cells += ["-", "-"] if cost is None else [f"{cost['paired']:.0f}", f"{cost['seconds']:.3g}"]
    return _line([f"**{cell}**" if bold else cell for cell in cells])


def _differences(report: Mapping[str, Any]) -> list[str]:
    labels = {row["key"]: row["label"] for row in report["rows"]}
    against = labels[report["differences"][0]["against"]]
    names = {"accuracy": "exact over all prompts, points", "frechet": "Fréchet distance, points", **SCORES}
    lines = [
        f"Difference to {against}, over the same prompts and noise, mean ± standard error over seeds:",
        "",
    ]
    for one in report["differences"]:
        values = [f"{name} {_signed(one[key])}" for key, name in names.items() if key in one]
        lines.append(f"- {one['label']}: {'; '.join(values)}")
    return lines


def _signed(value: Mapping[str, Any]) -> str:
    error = value["standard_error"]
    return f"{value['mean']:+.2f}" + ("" if error is None else f" ± {error:.2f}")


def _notes(setup: Mapping[str, Any]) -> list[str]:
    num_prompts = sum(setup["counts"].values())
    if setup["features"] is not None:
        return _notes_of_own(setup, num_prompts) + _notes_of_cost(setup)
    counts = ", ".join(f"{setup['counts'][group]} {name}" for group, name in setup["groups"].items())
    notes = [
        f"Mean ± sd over {len(setup['seeds'])} seeds of {num_prompts} prompts ({counts}).",
        "Each seed has its own prompts and noise, the same for every row.",
        "Exact: the judge reads every attribute that the caption says.",
        f"Fréchet distance: in the judge's features, {setup['num_axes']} principal axes, in % of the real",
        f"renders' variance, n = {num_prompts} against {setup['num_reference']} renders of other scenes.",
        f"Diversity: mean distance of {setup['copies']} pictures of one prompt in the judge's features, in %",
        f"of that of real renders, {setup['num_repeated']} prompts a seed.",
    ]
    return notes + _notes_of_cost(setup)


def _notes_of_own(setup: Mapping[str, Any], num_prompts: int) -> list[str]:
    guidance = f"{setup['reference_steps']} steps, CFG {setup['guidance_scale']:g}"
    notes = [
        f"Mean ± sd over {len(setup['seeds'])} seeds of {num_prompts} prompts.",
        "Each seed has its own prompts and noise, the same for every row.",
        f"Fréchet distance: in the features {setup['features']}, {setup['num_axes']} principal axes, in % of",
        f"the variance of {setup['num_reference']} pictures of the teacher ({guidance}),",
        f"n = {num_prompts}.",
        "It depends on n and on the features: only rows of one table compare, and the teacher's row of as",
        "many steps says what sampling alone causes. It rewards likeness to the teacher, not quality.",
        f"Diversity: mean distance of {setup['copies']} pictures of one prompt in these features, in % of",
        f"that of the teacher, {setup['num_repeated']} prompts a seed.",
    ]
    if setup["scores"]:
        notes.append("Scores: 100 times the cosine of picture and prompt, mean over all prompts.")
    return notes


def _notes_of_cost(setup: Mapping[str, Any]) -> list[str]:
    notes = ["NFE: network evaluations per picture, two per guided step."]
    if "timing" in setup:
        timing, parameters = setup["timing"], setup["parameters"]
        sizes = ", ".join(f"{name} {_millions(count)}" for name, count in parameters.items())
        notes += [
            "Same noise: mean distance to the teacher's pictures of most guided steps from the same noise,",
            f"in % of that between its pictures of different prompts, n = {timing['num_pictures']}.",
            f"Seconds: prompts to pixels, batches of {timing['batch']}, one process, {timing['machine']}.",
            f"Parameters of the network: {sizes}.",
        ]
    return notes


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} M"


def contact_sheet(
    columns: Sequence[tuple[str, str]],
    pictures: Sequence[Tensor],
    prompts: Sequence[str],
    *,
    height: int = 192,
) -> Image.Image:
    """Lay out the same prompts and noise across samplers: a column per sampler, a row per prompt.

    Args:
        columns: title and subtitle under each column.
        pictures: per column (R, H, W, 3) images or (R, F, H, W, 3) clips, uint8; of a clip its first, middle
            and last frame are shown.
        prompts: R captions, each under its row.
        height: of a picture on the sheet, in pixels; more where what stands under it is wider.
    """
    pictures = [_filmstrips(column) if column.ndim == 5 else column for column in pictures]
    num_rows = len(pictures[0])
    aspect = pictures[0].shape[2] / pictures[0].shape[1]
    gap, margin = 8, 20
    title_font, prompt_font = ImageFont.load_default(17), ImageFont.load_default(14)
    widest = max(
        max(title_font.getlength(title), prompt_font.getlength(subtitle)) for title, subtitle in columns
    )
    cell_w = max(round(height * aspect), math.ceil(widest))
    cell_h = round(cell_w / aspect)
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


def _filmstrips(clips: Tensor) -> Tensor:
    """(R, F, H, W, 3) to (R, H, 3 W, 3): first, middle and last frame beside each other."""
    shown = clips[:, [0, clips.shape[1] // 2, -1]]
    return shown.permute(0, 2, 1, 3, 4).flatten(2, 3)


def save_animation(path: Path, frames: Sequence[Image.Image], fps: int) -> None:
    """Write frames as a WebP that plays for ever; the last one stays for half a second."""
    durations_ms = [round(1000 / fps)] * len(frames)
    durations_ms[-1] += 500
    with replacing(path) as partial:
        frames[0].save(
            partial,
            "WEBP",
            save_all=True,
            append_images=list(frames[1:]),
            duration=durations_ms,
            loop=0,
            quality=80,
            method=6,
        )


def save_contact_sheet(path: Path, sheet: Image.Image) -> None:
    with replacing(path) as partial:
        sheet.save(partial, "PNG", optimize=True)

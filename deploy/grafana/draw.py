"""The dashboard's panels, drawn without Grafana: `python deploy/grafana/draw.py URL MINUTES OUT.png`.

Each query of `tdm.json` is sent to the Prometheus at URL, and what it gave over the last MINUTES is drawn.
Panels without data say so. Needs the extra `distill` (matplotlib).
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DASHBOARD = Path(__file__).with_name("tdm.json")
NUM_STEPS = 120
WIDTH = 24
NUM_COLOURS = 128
MAX_NAMES = 8
"""In a legend: more of them cover the lines."""
SCALES = {
    "percentunit": (100.0, "%"),
    "bytes": (1 / 2**20, "MiB"),
    "s": (1.0, "s"),
    "reqps": (1.0, "/s"),
    "ops": (1.0, "/s"),
}
Lines = dict[str, tuple[list[float], list[float]]]


def filled(query: str, step_s: float) -> str:
    """A query with Grafana's variables filled in, for all models and points so many seconds apart."""
    return query.replace("$__rate_interval", f"{max(15, round(4 * step_s))}s").replace("$class", ".*")


def ask(url: str, query: str, minutes: float) -> list[dict[str, Any]]:
    """Series of a query over the last minutes."""
    now = time.time()
    step_s = minutes * 60 / NUM_STEPS
    asked = {"query": filled(query, step_s), "start": now - minutes * 60, "end": now, "step": step_s}
    with urlopen(f"{url}/api/v1/query_range?{urlencode(asked)}", timeout=60) as answer:  # noqa: S310
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


def legend(template: str, labels: dict[str, str]) -> str:
    """A series's name, as Grafana would make it."""
    if template == "__auto":
        return ""
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), template).strip()


def lines_of(panel: dict[str, Any], url: str, minutes: float) -> Lines:
    """Every line of a panel: legend -> minutes before now, and values."""
    now = time.time()
    lines: Lines = {}
    for target in panel["targets"]:
        for series in ask(url, target["expr"], minutes):
            points = [(float(at), float(value)) for at, value in series["values"]]
            points = [(at, value) for at, value in points if not math.isnan(value)]
            if points:
                name = legend(target["legendFormat"], series["metric"])
                lines[name] = ([(at - now) / 60 for at, _ in points], [value for _, value in points])
    return lines


def scale_of(unit: str, lines: Lines) -> tuple[float, str]:
    """What values are multiplied with, and the unit that they have then."""
    largest = max((abs(value) for _, values in lines.values() for value in values), default=0.0)
    if unit == "s" and 0 < largest < 1:
        return 1000.0, "ms"
    return SCALES.get(unit, (1.0, ""))


def draw(axes: Axes, panel: dict[str, Any], lines: Lines) -> None:
    """One panel."""
    scale, unit = scale_of(panel["fieldConfig"]["defaults"]["unit"], lines)
    axes.set_title(panel["title"] + (f" ({unit})" if unit else ""), fontsize=8, loc="left")
    axes.tick_params(labelsize=6)
    if not lines:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="gray", fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
    elif panel["type"] == "stat":
        last = next(iter(lines.values()))[1][-1] * scale
        axes.text(0.5, 0.5, f"{last:.4g} {unit}", transform=axes.transAxes, ha="center", fontsize=18)
        axes.set_xticks([])
        axes.set_yticks([])
    elif panel["type"] == "heatmap":
        draw_heatmap(axes, lines)
    else:
        stacking = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"]
        draw_lines(axes, lines, scale, is_stacked=stacking == "normal")


def draw_lines(axes: Axes, lines: Lines, scale: float, *, is_stacked: bool) -> None:
    """A line for each series, above each other if they are stacked; the largest are named."""
    by_size = sorted(lines, key=lambda name: -max(lines[name][1]))
    named = set(by_size[:MAX_NAMES])
    below: dict[float, float] = {}
    for name, (at, values) in sorted(lines.items()):
        ats = [round(one, 3) for one in at]
        base = [below.get(one, 0.0) if is_stacked else 0.0 for one in ats]
        top = [low + scale * value for low, value in zip(base, values, strict=True)]
        marker = "." if len(ats) == 1 else None
        (line,) = axes.plot(ats, top, marker=marker, linewidth=1, label=name if name in named else None)
        if is_stacked:
            axes.fill_between(ats, base, top, alpha=0.3, color=line.get_color())
            below |= dict(zip(ats, top, strict=True))
    axes.margins(x=0)
    columns = 1 if len(lines) < 4 else 2
    more = len(lines) - len(named)
    rows = math.ceil(len(named) / columns) + (more > 0)
    axes.set_ylim(0, (1.1 + 0.1 * rows) * axes.get_ylim()[1])  # the legend's place
    if any(lines):
        axes.legend(
            title=f"the largest; {more} more" if more else None,
            title_fontsize=5.5,
            fontsize=5.5,
            loc="upper left",
            ncols=columns,
            framealpha=0.6,
            handlelength=1,
        )


def draw_heatmap(axes: Axes, lines: Lines) -> None:
    """How much fell between two edges of a histogram: the series are sums up to each edge."""
    edges = sorted(lines, key=float)
    ats = sorted({round(at, 3) for name in edges for at in lines[name][0]})
    sums = {
        name: dict(zip((round(at, 3) for at in lines[name][0]), lines[name][1], strict=True))
        for name in edges
    }
    up_to = [[sums[name].get(at, 0.0) for at in ats] for name in edges]
    between = [up_to[0], *([high - low for low, high in zip(*two, strict=True)] for two in pairwise(up_to))]
    axes.pcolormesh(ats, range(len(edges)), between, cmap="Oranges", shading="nearest")
    axes.set_yticks(range(len(edges)), edges)


def main(url: str, minutes: float, out: Path) -> None:
    """Draw all panels where Grafana would put them."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    lines_of_panels = sorted({panel["gridPos"]["y"] for panel in panels if panel["type"] != "row"})
    figure = Figure(figsize=(16, 2.3 * len(lines_of_panels)), dpi=80, layout="constrained")
    grid = figure.add_gridspec(len(lines_of_panels), WIDTH)
    title = ""
    for panel in panels:
        if panel["type"] == "row":
            title = panel["title"]
            continue
        at = panel["gridPos"]
        axes = figure.add_subplot(grid[lines_of_panels.index(at["y"]), at["x"] : at["x"] + at["w"]])
        draw(axes, panel, lines_of(panel, url, minutes))
        if axes.get_xticks().size:
            axes.set_xlim(-minutes, 0)
        axes.set_ylabel(title, fontsize=9, fontweight="bold")
        title = ""  # it stands at its first panel
    figure.supxlabel("minutes before now", fontsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    drawn.quantize(NUM_COLOURS).save(out, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), float(sys.argv[2]), Path(sys.argv[3]))

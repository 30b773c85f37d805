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
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DASHBOARD = Path(__file__).with_name("tdm.json")
NUM_STEPS = 120
COLUMNS = 4
SCALES = {"percentunit": (100.0, "%"), "bytes": (1 / 2**20, "MiB"), "s": (1.0, "s")}
Lines = dict[str, tuple[list[float], list[float]]]


def ask(url: str, query: str, minutes: float) -> list[dict[str, Any]]:
    """Series of a query over the last minutes."""
    now = time.time()
    step = minutes * 60 / NUM_STEPS
    filled = query.replace("$__rate_interval", f"{max(15, round(4 * step))}s").replace("$class", ".*")
    asked = {"query": filled, "start": now - minutes * 60, "end": now, "step": step}
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


def draw(axes: Axes, panel: dict[str, Any], lines: Lines) -> None:
    """One panel."""
    defaults = panel["fieldConfig"]["defaults"]
    scale, unit = SCALES.get(defaults["unit"], (1.0, {"reqps": "/s", "ops": "/s"}.get(defaults["unit"], "")))
    axes.set_title(panel["title"] + (f" ({unit})" if unit else ""), fontsize=8, loc="left")
    axes.tick_params(labelsize=6)
    if not lines:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="gray", fontsize=8)
        return
    if panel["type"] == "stat":
        last = next(iter(lines.values()))[1][-1] * scale
        axes.text(0.5, 0.5, f"{last:.4g} {unit}", transform=axes.transAxes, ha="center", fontsize=18)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    stacked = defaults["custom"].get("stacking", {}).get("mode") == "normal"
    below: dict[float, float] = {}
    for name, (at, values) in lines.items():
        ats = [round(one, 3) for one in at]
        base = [below.get(one, 0.0) if stacked else 0.0 for one in ats]
        top = [low + scale * value for low, value in zip(base, values, strict=True)]
        (line,) = axes.plot(ats, top, linewidth=1, label=name)
        if stacked:
            axes.fill_between(ats, base, top, alpha=0.3, color=line.get_color())
            below |= dict(zip(ats, top, strict=True))
    axes.set_ylim(bottom=0)
    if any(lines):
        axes.legend(fontsize=5, loc="upper left", ncols=2 if len(lines) > 6 else 1, framealpha=0.5)


def main(url: str, minutes: float, out: Path) -> None:
    """Draw all panels, a row of the dashboard after the other."""
    mpl.use("Agg")
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    rows: list[tuple[str, list[dict[str, Any]]]] = []
    for panel in panels:
        if panel["type"] == "row":
            rows.append((panel["title"], []))
        else:
            rows[-1][1].append(panel)
    lines_of_row = [(title, row[start : start + COLUMNS], start) for title, row in rows
                    for start in range(0, len(row), COLUMNS)]  # fmt: skip
    figure = Figure(figsize=(16, 2.1 * len(lines_of_row)), layout="constrained")
    grid = figure.subplots(len(lines_of_row), COLUMNS, squeeze=False)
    for axes_of_line, (title, line, start) in zip(grid, lines_of_row, strict=True):
        for place, axes in enumerate(axes_of_line):
            if place >= len(line):
                axes.axis("off")
                continue
            draw(axes, line[place], lines_of(line[place], url, minutes))
        if not start:
            axes_of_line[0].set_ylabel(title, fontsize=9, fontweight="bold")
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"), float(sys.argv[2]), Path(sys.argv[3]))

"""The GPU benchmark's result for people: tables and a chart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

NAMES = {
    "aotinductor": "ours, compiled",
    "eager": "ours, eager",
    "diffusers": "diffusers",
    "diffusers-compiled": "diffusers, torch.compile",
}
COLOURS = {
    "aotinductor": "#2f9e6e",
    "eager": "#3b6fb6",
    "diffusers": "#b0b7c3",
    "diffusers-compiled": "#d08a2e",
}


def where(result: Mapping[str, Any]) -> str:
    """The machine and what was measured, in a line."""
    hardware = result["hardware"]
    machine = hardware["gpu"] or f"{hardware['cpu']} (CPU)"
    size = (
        "SHRUNK models, a check and no measure of the published sizes" if result["toy"] else "published sizes"
    )
    return f"{machine}, torch {result['versions']['torch']}, {result['precision']}; {size}, random weights"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table per model: a line per backend and batch size."""
    return [_table(entry) for entry in result["models"].values()]


def _table(entry: Mapping[str, Any]) -> Table:
    unit = entry["unit"]
    table = Table(
        "backend",
        "batch",
        "ms",
        f"{unit}/s",
        "TFLOP/s",
        "of matmul",
        "peak GB",
        "text / denoise / decode ms",
        title=f"{entry['title']}, {entry['bucket']}, {entry['num_steps']} steps",
        title_justify="left",
    )
    for backend, cells in entry["backends"].items():
        for batch, cell in sorted(cells.items(), key=lambda pair: int(pair[0])):
            table.add_row(NAMES[backend], batch, *_columns(cell))
    for backend, reason in entry["failed"].items():
        table.add_row(NAMES[backend], "", f"failed: {reason.strip().splitlines()[-1][:80]}")
    return table


def _columns(cell: Mapping[str, Any]) -> list[str]:
    if "error" in cell:
        return [cell["error"][:60]]
    stages = cell["stages_ms"]
    peak = cell["peak_bytes"]
    return [
        f"{cell['ms']:.4g}",
        f"{cell['per_second']:.4g}",
        f"{cell['tflop_per_s']:.3g}",
        f"{cell['share_of_matmul']:.1%}",
        "" if peak is None else f"{peak / 1e9:.2f}",
        " / ".join(f"{stages[name]:.4g}" for name in ("text", "denoise", "decode") if name in stages),
    ]


def chart(result: Mapping[str, Any], path: Path) -> None:
    """Samples per second by batch size, a panel per model, as a PNG."""
    from matplotlib.figure import Figure

    entries = list(result["models"].values())
    figure = Figure(figsize=(max(9.0, 4.2 * len(entries)), 3.8), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(entries), squeeze=False)[0]
    labels: dict[str, Any] = {}
    for panel, entry in zip(panels, entries, strict=True):
        batches = {int(batch) for cells in entry["backends"].values() for batch in cells}
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(batches), labels=map(str, sorted(batches)))
        for backend, cells in entry["backends"].items():
            points = sorted(
                (int(batch), cell["per_second"]) for batch, cell in cells.items() if "error" not in cell
            )
            if points:
                (drawn,) = panel.plot(*zip(*points, strict=True), marker="o", color=COLOURS[backend])
                labels[NAMES[backend]] = drawn
        ceiling = result["matmul"]["tflop_per_s"] * 1e12 / entry["flops"]["sample"]
        if not result["toy"]:
            labels["at the speed of a matrix product"] = panel.axhline(
                ceiling, color="#555555", linestyle="--"
            )
        panel.set_title(f"{entry['title']}\n{entry['bucket']}, {entry['num_steps']} steps", fontsize=9)
        panel.set_xlabel("batch")
        panel.set_ylabel(f"{entry['unit']} per second")
        panel.set_ylim(bottom=0)
    figure.suptitle(where(result), fontsize=9)
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower center", ncols=len(labels) or 1, fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

"""The result for people: tables in Markdown and a bar chart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.distill.stopwatch import PARTS, shares

NAMES = {
    "naive": "naive: three fp32 networks",
    "separate": "ours: three networks",
    "lora": "ours: adapters on one network",
}
COLOURS = {"naive": "#b0b7c3", "separate": "#3b6fb6", "lora": "#2f9e6e"}
GPU_CLOCK = "CUDA events"
CPU_CLOCK = "CPU time of one thread"

PARTS_AND_FLOPS = (
    "Parts are shares of the time; student and fake score are forward and backward passes. TFLOP leave out "
    "what gradient checkpointing computes again."
)
SAME_BATCH = (
    "The same batch for all, each in a process of its own; in brackets what stays between iterations: "
    "weights, gradients, the optimizers' moments, the average. The libraries' own memory is not counted."
)
LARGEST_BATCH = "Largest batch that fits, halved from the config's until it did, and its peak in GiB."


def markdown(result: Mapping[str, Any]) -> str:
    """All tables of a result."""
    hardware, backbones = result["hardware"], result["backbones"]
    where = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, one thread"
    torch = result["versions"]["torch"]
    sections = [
        f"# One iteration of TDM on {where}",
        f"torch {torch}; {_kind(result)}. Weights and prompts are random. {_clock(result)}",
        "## Time",
        _table(
            [
                "backbone",
                "parameters",
                "batch",
                f"s per iteration ({'GPU' if not result['toy'] else 'CPU'})",
                *(f"{part.replace('_', ' ')}" for part in PARTS),
                "TFLOP per iteration",
                "TFLOP/s",
                "projected",
            ],
            (_time_row(entry, result["toy"]) for entry in backbones.values()),
        ),
        PARTS_AND_FLOPS,
        "## Peak memory",
        _memory_tables(backbones, result["toy"]),
        "## Full size, counted",
        "Counted on networks without memory, not measured; per iteration of the shipped config.",
        _table(
            ["backbone", "parameters", "trained", "batch", "forward, one row", "iteration", "computed again"],
            (_counted_row(entry) for entry in backbones.values()),
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _kind(result: Mapping[str, Any]) -> str:
    if result["toy"]:
        return "**shrunk networks of the same classes, a check and no measure of the full sizes**"
    return "networks of the published sizes"


def _clock(result: Mapping[str, Any]) -> str:
    loads = [entry["load_before"] for entry in result["backbones"].values()]
    shared = f"; load average {min(loads):g} to {max(loads):g} before each backbone" if loads else ""
    return f"Time is {CPU_CLOCK if result['toy'] else GPU_CLOCK}{shared}."


def _time_row(entry: Mapping[str, Any], toy: bool) -> list[str]:
    run = entry["iteration"]
    title = _title(entry, toy)
    if not run["fits"]:
        return [title, "", str(run["batch_size"]), "does not fit", *[""] * (len(PARTS) + 3)]
    parts = shares(run["parts"])
    seconds = run["seconds"]
    spread = f"{seconds['median']:.3g} (of {seconds['count']}: {seconds['min']:.3g} to {seconds['max']:.3g})"
    projected = entry["projected"]
    return [
        title,
        f"{run['parameters_m']:,.0f} M",
        _batch(run["batch_size"], entry["config_batch_size"]),
        spread,
        *(f"{parts[part]:.0%}" for part in PARTS),
        f"{entry['tflop_per_iteration']:,.4g}",
        f"{entry['tflop_per_s']:.3g}",
        "" if projected is None else f"{projected['hours']:.2f} h for {_source(projected)}",
    ]


def _title(entry: Mapping[str, Any], toy: bool) -> str:
    title = f"{entry['title']} {entry['iteration']['bucket']}"
    return f"{title}, shrunk" if toy else title


def _source(projected: Mapping[str, Any]) -> str:
    return f"{projected['source']} {projected['iterations']:,} iterations"


def _batch(measured: int, configured: int) -> str:
    return str(measured) if measured == configured else f"{measured} (of {configured})"


def _memory_tables(backbones: Mapping[str, Any], toy: bool) -> str:
    used = [name for name in NAMES if any(name in _largest(entry) for entry in backbones.values())]
    same = _table(
        ["backbone", "batch", *(f"{NAMES[name]}, GiB" for name in used)],
        (
            [_title(entry, toy), str(entry["common_batch_size"]), *(_peak(entry, name) for name in used)]
            for entry in backbones.values()
        ),
    )
    largest = _table(
        ["backbone", *(NAMES[name] for name in used)],
        ([_title(entry, toy), *(_limit(entry, name) for name in used)] for entry in backbones.values()),
    )
    same = f"{SAME_BATCH}\n\n{same}"
    if all(_fits_the_config(entry) for entry in backbones.values()):
        return same
    return f"{same}\n\n{LARGEST_BATCH}\n\n{largest}"


def _fits_the_config(entry: Mapping[str, Any]) -> bool:
    return all(run["fits"] for run in entry["memory"])


def at_common_batch(entry: Mapping[str, Any], variant: str) -> Mapping[str, Any] | None:
    """The variant's run at the batch that all variants with any fitting batch have; None if it has none."""
    for run in entry["memory"]:
        if (run["variant"], run["batch_size"]) == (variant, entry["common_batch_size"]) and run["fits"]:
            found: Mapping[str, Any] = run
            return found
    return None


def _peak(entry: Mapping[str, Any], variant: str) -> str:
    run = at_common_batch(entry, variant)
    if run is not None:
        return f"{run['memory']['peak_gib']:.3g} ({run['memory']['kept_gib']:.3g})"
    return "does not fit" if variant in _largest(entry) else ""


def _largest(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of each variant the run with the largest batch that fits, else its smallest that does not."""
    found: dict[str, Mapping[str, Any]] = {}
    for run in entry["memory"]:
        best = found.get(run["variant"])
        if best is None or (run["fits"], run["batch_size"]) > (best["fits"], best["batch_size"]):
            found[run["variant"]] = run
    return found


def _limit(entry: Mapping[str, Any], variant: str) -> str:
    run = _largest(entry).get(variant)
    if run is None:
        return ""
    if not run["fits"]:
        return "not even 1"
    batch = _batch(run["batch_size"], entry["config_batch_size"])
    return f"{batch}: {run['memory']['peak_gib']:.3g}"


def _counted_row(entry: Mapping[str, Any]) -> list[str]:
    counted = entry["full_size"]
    return [
        f"{entry['title']} {counted['bucket']}",
        f"{counted['parameters_m']:,.1f} M",
        f"{counted['trained_m']:,.1f} M",
        str(counted["batch_size"]),
        f"{counted['forward_tflop']:.4g} TFLOP",
        f"{counted['iteration_tflop']:,.0f} TFLOP",
        f"{counted['recomputed_tflop']:,.0f} TFLOP",
    ]


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_chart(result: Mapping[str, Any], path: Path) -> None:
    """Bars of peak memory at the same batch, the variants of a backbone side by side."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    entries = list(result["backbones"].values())
    used = [name for name in NAMES if any(name in _largest(entry) for entry in entries)]
    figure = Figure(figsize=(max(6.4, 1.6 + 1.7 * len(entries)), 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(used)
    tallest = 0.0
    missing: list[float] = []
    for column, entry in enumerate(entries):
        for index, name in enumerate(used):
            x = column + (index - (len(used) - 1) / 2) * width
            run = at_common_batch(entry, name)
            if run is None:
                missing.append(x)
                continue
            kept, peak = run["memory"]["kept_gib"], run["memory"]["peak_gib"]
            axes.bar(x, peak, width * 0.92, color=COLOURS[name], alpha=0.5)
            axes.bar(x, min(kept, peak), width * 0.92, color=COLOURS[name])
            axes.annotate(
                f"{peak:.3g}", (x, peak), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
            tallest = max(tallest, peak)
    for x in missing:
        axes.annotate("does not\nfit", (x, 0), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(
        range(len(entries)),
        [
            f"{entry['title']}\n{entry['iteration']['bucket']}\nbatch {entry['common_batch_size']}"
            for entry in entries
        ],
    )
    axes.tick_params(axis="x", labelsize=8, length=0)
    axes.set_ylim(0, tallest * 1.12 or 1.0)
    axes.set_ylabel("peak memory of one iteration, GiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.grid(visible=True, alpha=0.25)
    axes.set_axisbelow(True)
    hardware = result["hardware"]
    where = ", ".join(gpu.split(",")[0] for gpu in hardware["gpus"]) or f"{hardware['cpu']} (CPU)"
    sizes = "shrunk networks of the same classes" if result["toy"] else "published sizes"
    axes.set_title(f"One iteration of TDM, same batch for all\n{where}, {sizes}", fontsize=10, loc="left")
    handles = [Patch(color=COLOURS[name], label=NAMES[name]) for name in used]
    handles += [
        Patch(color="#555555", label="stays between iterations"),
        Patch(color="#555555", alpha=0.5, label="only while one runs"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

"""Bundles and measurements as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from rich.table import Table

from engines.bundle.bucket import Bucket
from engines.bundle.latency import LatencyRow
from engines.bundle.manifest import GateVerdict, Manifest, ParityRow

if TYPE_CHECKING:
    from engines.compile.bench import BenchRow


def summary_table(manifest: Manifest) -> Table:
    """What a bundle is."""
    rows = {
        "name": f"{manifest.name} ({manifest.kind}, {manifest.family})",
        "version": manifest.version,
        "created": manifest.created,
        "steps": f"{', '.join(map(str, manifest.num_steps))} (default {manifest.default_num_steps})",
        "buckets": ", ".join(bucket.label for bucket in manifest.buckets),
        "batches": ", ".join(map(str, manifest.batch_sizes)),
        "threads": str(manifest.num_threads),
        "text tokens": str(manifest.max_text_tokens),
        "gate": manifest.gate.summary,
        "backend": manifest.backend + (f" ({manifest.eager_only})" if manifest.eager_only else ""),
        "built on": f"{manifest.platform.cpu}, {manifest.platform.machine}, {manifest.platform.os}",
        "built for": _device(manifest),
        "torch": manifest.platform.torch,
        "size": _megabytes(sum(entry.size_bytes for entry in manifest.files.values())),
    }
    table = Table(title="bundle", show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def gate_table(gate: GateVerdict) -> Table:
    """What its student had to reach, and whether it did."""
    table = Table("", "criterion", title=f"gate: {gate.summary}", title_justify="left")
    for criterion in gate.criteria:
        table.add_row("passed" if criterion.passed else "FAILED", criterion.text)
    return table


def engines_table(manifest: Manifest) -> Table:
    """Its compiled packages and plans, and where they were run and compared with eager."""
    columns = (
        "stage",
        "bucket",
        "backend",
        "batches",
        "compute",
        "fused attention",
        "size",
        "file",
        "verified on",
    )
    table = Table(*columns, title="engines", title_justify="left")
    dtypes = {(spec.name, spec.bucket): spec.compute_dtype for spec in manifest.stages}
    for engine in manifest.engines:
        table.add_row(
            engine.stage,
            _label(engine.bucket),
            engine.backend,
            f"{engine.min_batch}-{engine.max_batch}",
            dtypes[engine.stage, engine.bucket],
            "" if engine.fused_attention is None else f"{engine.fused_attention} layers",
            _megabytes(manifest.files[engine.path].size_bytes),
            PurePosixPath(engine.path).name,
            engine.verified_on or "nowhere",
        )
    return table


def latency_table(rows: Sequence[LatencyRow]) -> Table:
    """Milliseconds per call: a line per stage and backend, a column per batch size."""
    return _by_batch(
        "median ms per call",
        [
            (f"{row.stage} {_label(row.bucket)} {row.backend}{suffix}", row.batch, f"{ms:.2f}")
            for row in rows
            for suffix, ms in (("", row.ms), (", graph", row.graph_ms))
            if ms is not None
        ],
    )


def parity_table(rows: Sequence[ParityRow]) -> Table:
    """Agreement with eager."""
    columns = ("stage", "bucket", "batch", "backend", "cosine", "max abs")
    table = Table(*columns, title="parity with eager", title_justify="left")
    for row in rows:
        table.add_row(
            row.stage,
            _label(row.bucket),
            str(row.batch),
            row.backend,
            f"{row.cosine:.6f}",
            f"{row.max_abs:.2g}",
        )
    return table


def bench_tables(rows: Sequence[BenchRow]) -> list[Table]:
    """Milliseconds, and pictures or videos per second."""
    names = [
        " ".join([row.what, row.bucket, *([f"{row.num_steps} steps"] if row.num_steps else []), row.backend])
        for row in rows
    ]
    milliseconds = [(name, row.batch, f"{row.ms:.2f}") for name, row in zip(names, rows, strict=True)]
    rates = [
        (name, row.batch, f"{row.per_second:.1f}")
        for name, row in zip(names, rows, strict=True)
        if row.num_steps
    ]
    whole = next((row.what for row in rows if row.num_steps), "images")
    return [_by_batch("median ms", milliseconds), _by_batch(f"{whole} per second", rates)]


def _by_batch(title: str, cells: Iterable[tuple[str, int, str]]) -> Table:
    grid: dict[str, dict[int, str]] = {}
    for name, batch, value in cells:
        grid.setdefault(name, {})[batch] = value
    batches = sorted({batch for line in grid.values() for batch in line})
    table = Table("", *(f"B{batch}" for batch in batches), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, line in sorted(grid.items()):
        table.add_row(name, *(line.get(batch, "") for batch in batches))
    return table


def _label(bucket: Bucket | None) -> str:
    return bucket.label if bucket else "any"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _device(manifest: Manifest) -> str:
    if manifest.device == "cpu":
        return "CPU"
    platform = manifest.platform
    return f"{platform.gpu}, CUDA {platform.cuda}, driver {platform.driver}"

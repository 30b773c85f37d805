"""How fast a bundle is here: stages and whole pictures, eager and compiled side by side in one run."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engines.bundle.bucket import Bucket
from engines.bundle.integrity import verify_files
from engines.bundle.manifest import Manifest
from engines.bundle.platform import available_cores, current_platform
from engines.bundle.stages import Backend, StageName
from engines.compile.measure import measure_stage, median_ms
from engines.runtime.pipeline import Pipeline, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One measured number: a stage, or `images` or `videos` for prompts to pixels."""

    what: StageName | str
    bucket: str
    num_steps: int | None
    batch: int
    backend: Backend
    ms: float
    per_second: float
    """Rows (for stages) or pictures finished per second at this batch size."""


def bench_bundle(directory: Path, *, num_threads: int | None = None, budget_s: float = 1.0) -> list[BenchRow]:
    """Time every stage, and whole batches at every number of steps, on each backend that runs here.

    Args:
        directory: the bundle.
        num_threads: of torch; by default what the bundle was compiled for.
        budget_s: time per number.

    Raises:
        BundleError: the bundle is damaged.
    """
    manifest = verify_files(directory)
    pipelines = [Pipeline.load(directory, num_threads=num_threads)]
    if pipelines[0].backend != Backend.EAGER:
        pipelines.append(Pipeline.load(directory, backend=Backend.EAGER, num_threads=num_threads))
    rows: list[BenchRow] = []
    for pipeline in pipelines:
        if pipeline.device.type != "cpu":
            pipeline.warm_up()  # which captures CUDA graphs
        for bucket in manifest.buckets:
            rows += _bench_stages(pipeline, bucket, budget_s)
            rows += _bench_whole(pipeline, bucket, budget_s)
    return rows


def _bench_stages(pipeline: Pipeline, bucket: Bucket, budget_s: float) -> list[BenchRow]:
    manifest = pipeline.manifest
    with pipeline.on_stream():
        measured = [
            row
            for name in ("text", "denoise", "decode")
            for row in measure_stage(
                manifest.stage(name, bucket),
                pipeline.stage(name, bucket),
                pipeline.backend,
                manifest.batch_sizes,
                budget_s,
            )
        ]
    return [
        BenchRow(
            what=row.stage,
            bucket=bucket.label,
            num_steps=None,
            batch=row.batch,
            backend=row.backend,
            ms=row.ms,
            per_second=round(row.batch / row.ms * 1e3, 1),
        )
        for row in measured
    ]


def _bench_whole(pipeline: Pipeline, bucket: Bucket, budget_s: float) -> list[BenchRow]:
    rows = []
    for num_steps in pipeline.manifest.num_steps:
        for batch in pipeline.manifest.batch_sizes:
            prompts = iter(range(1 << 30))

            def draw(batch: int = batch, num_steps: int = num_steps, fresh: Any = prompts) -> None:
                # a prompt never seen before each time, so that the text stage runs
                pipeline.run(
                    [
                        Sample(prompt=f"{next(fresh)}", seed=row, num_steps=num_steps, bucket=bucket)
                        for row in range(batch)
                    ]
                )

            ms = median_ms(draw, budget_s)
            rows.append(
                BenchRow(
                    what=f"{pipeline.manifest.kind}s",
                    bucket=bucket.label,
                    num_steps=num_steps,
                    batch=batch,
                    backend=pipeline.backend,
                    ms=round(ms, 3),
                    per_second=round(batch / ms * 1e3, 1),
                )
            )
    return rows


def write_result(path: Path, manifest: Manifest, rows: list[BenchRow], *, num_threads: int) -> None:
    """Write the numbers with everything needed to judge them: hardware, versions, commit."""
    result = {
        "bundle": {"name": manifest.name, "version": manifest.version},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "platform": current_platform(manifest.device).model_dump(),
        "cores": available_cores(),
        "num_threads": num_threads,
        "software": manifest.software,
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def current_commit() -> str:
    """The commit of this source, `-dirty` after it if there are changes; empty outside a repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()

"""Cost: how long a batch takes, from the latency table that was measured when its bundle was built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import cast

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import Manifest
from engines.bundle.stages import Backend


def batch_cost(
    manifest: Manifest, bucket: Bucket, num_steps: int, backends: Iterable[str]
) -> Callable[[int], float] | None:
    """Predicted ms of a batch by its number of samples.

    Args:
        manifest: of the bundle that runs it.
        bucket: of its samples, which the bundle may not have: a stored job outlives the bundle of its day.
        num_steps: denoiser calls.
        backends: the first of these that was measured is taken to run it.

    Returns:
        None if the table has no row for it.
    """
    if bucket not in manifest.buckets:
        return None
    for backend in backends:
        cost = partial(_predict_ms, manifest, bucket, num_steps, cast("Backend", backend))
        with suppress(ValueError):  # this backend was not measured
            cost(1)
            return cost
    return None


def _predict_ms(
    manifest: Manifest, bucket: Bucket, num_steps: int, backend: Backend, num_samples: int
) -> float:
    return manifest.predict_ms(bucket, num_steps, num_samples, backend)


def job_cost_ms(batch_ms: Callable[[int], float], num_samples: int, max_batch: int) -> float:
    """Predicted engine time of a job's samples in full batches: its part of what a saturated worker does.

    Args:
        batch_ms: as `batch_cost` returns it.
        num_samples: of the job.
        max_batch: samples that one worker runs at once.
    """
    return num_samples * batch_ms(max_batch) / max_batch

"""LeasedJob: a job on its way through one worker, and the rows of batches that it asks for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.bundle.bucket import Bucket
from server.job import Job, sample_seed
from server.queue.worker_queue import Lease
from server.tracing import NO_SPAN, Span
from server.worker.batch_policy import Row


@dataclass(slots=True, eq=False, kw_only=True)
class LeasedJob:
    """One leased job. The main thread owns it until all samples are drawn, then a finisher thread does.

    Attributes:
        job: as leased; as `start` returned it once it is started.
        started: its attempt has begun.
        ended: nothing more is to be drawn for it: failed, cancelled, or finished elsewhere.
        num_assigned: samples handed to a batch so far.
        pixels: (F, H, W, 3) uint8 per sample, None until drawn.
        timing_ms: by stage, as `Job.timing`.
        span: its attempt, in the trace of its request.
        stages: of the attempt, name with begin and end in unix ns; kept only for a span that is recorded.
        batch_id: the last batch that it had a sample in.
    """

    lease: Lease
    job: Job
    leased_ms: int
    started: bool = False
    ended: bool = False
    num_assigned: int = 0
    pixels: list[NDArray[np.uint8] | None] = field(default_factory=list)
    timing_ms: dict[str, float] = field(default_factory=dict)
    span: Span = NO_SPAN
    stages: list[tuple[str, int, int]] = field(default_factory=list)
    batch_id: str | None = None

    def __post_init__(self) -> None:
        self.pixels = [None] * self.job.request.num_samples

    def start(self, job: Job, now_ms: int) -> None:
        """Its attempt begins: `job` as it now runs."""
        self.job = job
        self.started = True
        self.timing_ms["queue"] = float(max(0, self.leased_ms - job.created_ms))
        self.timing_ms["batch_wait"] = float(max(0, now_ms - self.leased_ms))

    @property
    def log_ids(self) -> dict[str, str]:
        """What log lines about it carry."""
        batch = {} if self.batch_id is None else {"batch_id": self.batch_id}
        return {"job_id": self.job.id, **batch, **self.span.log_ids}

    @property
    def num_drawn(self) -> int:
        """Samples whose pixels are there."""
        return sum(pixels is not None for pixels in self.pixels)

    @property
    def drawn(self) -> bool:
        """Every sample's pixels are there."""
        return self.num_drawn == self.job.request.num_samples

    @property
    def alone(self) -> bool:
        """It was running when a worker died, so it shares no batch: it must not take seven others with it."""
        return self.job.attempt >= (2 if self.started else 1)

    def seed(self, index: int) -> int:
        """Seed of sample `index`."""
        return sample_seed(self.job.request.seed, index)

    @property
    def bucket(self) -> Bucket:
        """Of its samples."""
        return self.job.request.bucket

    @property
    def num_steps(self) -> int:
        """Denoiser calls per sample."""
        return self.job.request.num_steps

    @property
    def deadline_ms(self) -> int:
        """As of the job, unix ms."""
        return self.job.deadline_ms

    def rows(self) -> list[Row[LeasedJob]]:
        """The samples that no batch has had yet."""
        return [Row(self, index) for index in range(self.num_assigned, self.job.request.num_samples)]

"""The worker process that these tests run: the real one, over a pipeline that takes orders from files."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.runtime.pipeline import BatchRun, Pipeline, Sample
from server import logs
from server.queue.preflight import wait_until_usable
from server.settings import Settings, WorkerSettings
from server.supervisor.valkey import PR_SET_PDEATHSIG
from server.worker.process import load_pipeline, run_worker
from tests.failures.skew import skew_clock

LETHAL = "lethal"
"""A prompt with this word kills the process that draws it, after its first step."""
BATCHES = "batches.jsonl"
"""In a worker's folder: the prompts of each batch it began, one JSON list a line."""
BRAKE = "brake"
"""In a worker's folder: while this file exists, its engine waits before each step."""
DOOR = "door"
"""In a worker's folder: while this file exists, a worker that has loaded its bundle goes no further."""
LOADED = "loaded"
"""In a worker's folder: it has loaded its bundle."""


class ScriptedPipeline(Pipeline):
    """The real pipeline; notes each batch, waits while braked, and dies of lethal prompts."""

    _folder: Path | None = None

    def obey(self, folder: Path) -> None:
        """Take orders from the files in `folder` from now on."""
        self._folder = folder

    def warm_up(self) -> None:
        """As ever, for orders concern jobs; then wait at the door."""
        folder, self._folder = self._folder, None
        super().warm_up()
        self._folder = folder
        assert folder is not None, "nobody to obey"
        (folder / LOADED).touch()
        while (folder / DOOR).exists():
            time.sleep(0.005)  # the pace of the polling; the test sets no event of another process

    def prepare(self, samples: Sequence[Sample]) -> BatchRun:
        """Note the batch, then begin it."""
        if self._folder is not None:
            with (self._folder / BATCHES).open("a") as file:
                file.write(json.dumps([sample.prompt for sample in samples]) + "\n")
        return super().prepare(samples)

    def step(self, run: BatchRun) -> None:
        """Wait while braked; die if a prompt says so."""
        if self._folder is not None:
            while (self._folder / BRAKE).exists():
                time.sleep(0.005)  # the pace of the polling; the test sets no event of another process
            if any(run.step_index) and any(LETHAL in sample.prompt for sample in run.samples):
                os.kill(os.getpid(), signal.SIGKILL)
        super().step(run)


def run_scripted_worker(environment: Mapping[str, str], folder: Path, log: Path) -> None:
    """What `python -m server worker` does, with a `ScriptedPipeline`. The main function of a process.

    Args:
        environment: replaces this process's own.
        folder: where the pipeline finds its orders.
        log: takes what the process writes.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)  # die with the fork server
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    skew_clock(environment)
    settings = Settings()
    logs.configure(settings.log_level)
    wait_until_usable(settings.redis_url, patience_s=settings.redis_wait_s, report=logging.warning)

    def load(worker_settings: WorkerSettings) -> Pipeline:
        pipeline = load_pipeline(worker_settings, ScriptedPipeline)
        assert isinstance(pipeline, ScriptedPipeline)
        pipeline.obey(folder)
        return pipeline

    sys.exit(run_worker(settings.for_worker(), load=load))

"""AOTInductor packages of all stages of a bundle, several compiled side by side."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from engines.bundle.manifest import EngineFile
from engines.bundle.platform import Platform
from engines.bundle.stages import StageSpec
from engines.compile.aotinductor import CompileJob, compile_stage
from engines.compile.needed import NO_COMPILER, has_compiler
from engines.compile.progress import BuildProgress
from engines.compile.settings import BuildSettings
from engines.errors import CompileError
from engines.families.student import Student
from engines.processes import start_child

EAGER_SERVES = "the bundle is built without compiled code and eager serves it, slower"


def num_packages(settings: BuildSettings, num_stages: int) -> int:
    """How many packages there will be of so many stages, one of which is text."""
    return num_stages + (num_stages - 1) * len(settings.static_batches)


def packages_or_not(
    settings: BuildSettings,
    student: Student,
    specs: Sequence[StageSpec],
    platform: Platform,
    progress: BuildProgress,
) -> tuple[list[EngineFile], str | None]:
    """AOTInductor packages of every stage, or why there are none."""
    if not has_compiler():
        progress.warn(f"no C++ compiler (g++) on this machine: {EAGER_SERVES}; install g++ and build again")
        return [], NO_COMPILER
    # One package for all batch sizes. Measured on the demo at batches 1 and 8 on a CPU, packages for one size
    # were within 3 % of it in every stage, and each costs another compilation at first start. A GPU's kernels
    # for a known size are chosen for it.
    sizes = [(1, settings.batch_sizes[-1]), *((batch, batch) for batch in settings.static_batches)]
    jobs = [
        CompileJob(
            family=student.family,
            spec=spec,
            min_batch=min_batch,
            max_batch=max_batch,
            num_threads=settings.num_threads,
            bundle=settings.out.resolve(),
            platform=platform,
            device=settings.device,
        )
        for spec in specs
        # text is encoded once per prompt, in batches of whatever new prompts there are
        for min_batch, max_batch in dict.fromkeys(sizes if spec.bucket else sizes[:1])
    ]
    try:
        return _compile_all(jobs, settings, progress), None
    except CompileError as error:
        if not settings.allow_eager:
            raise
        reason = f"it did not compile: {error}"
        progress.warn(f"{reason}; {EAGER_SERVES}")
        return [], reason


def _compile_all(
    jobs: Sequence[CompileJob], settings: BuildSettings, progress: BuildProgress
) -> list[EngineFile]:
    """Compile `jobs` side by side; the result keeps their order.

    Raises:
        CompileError: one of them failed; the others are stopped.
    """
    with _scratch_folder(settings.out / ".build") as scratch:
        progress.doing(f"compiling {', '.join(job.label for job in jobs)}")
        executor = ProcessPoolExecutor(
            max_workers=min(settings.num_jobs, len(jobs)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_compiler_process,
            initargs=(str(scratch.resolve()),),
        )
        try:
            with _interrupted_afterwards():
                futures = {executor.submit(compile_stage, job): job for job in jobs}
            engines: dict[str, EngineFile] = {}
            for future in as_completed(futures):
                job = futures[future]
                engines[job.label] = future.result()
                progress.done(f"compiled {job.label}")
            return [engines[job.label] for job in jobs]
        except BrokenProcessPool:
            raise CompileError("a compiler process was killed; is there enough memory?") from None
        except BaseException:
            # after an error or Ctrl-C nobody waits for the other compilations, which take a minute
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block is done: a half started pool cannot be shut down."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return
    came: list[int] = []
    previous = {
        number: signal.signal(number, lambda came_now, _: came.append(came_now))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


@contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards, whatever happens."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir(parents=True)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _start_compiler_process(scratch: str) -> None:
    """Keep inductor's caches in a folder that is deleted afterwards; die with the parent."""
    tempfile.tempdir = scratch
    warnings.simplefilter("ignore")
    start_child()

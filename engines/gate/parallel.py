"""Rows of a gate's table measured one after another, or by several processes side by side."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache

from engines.errors import GateError
from engines.gate.evaluator import Evaluator
from engines.gate.frechet import Reference
from engines.gate.measurement import Measurement, Row
from engines.processes import start_child

Unit = tuple[int, Row]
"""A seed and a row: what is measured at once."""


def measure_units(
    units: Sequence[Unit],
    evaluator: Evaluator,
    reference: Reference,
    on_done: Callable[[Unit, Measurement], None],
) -> None:
    """Measure `units`, in this order, with as many processes as the evaluator's config says.

    One process measures here. More are started anew, and the next free one takes the next unit: numbers do
    not depend on how many there are, only the order of the answers does.

    Args:
        units: the longest first, so that no process is left with a long one at the end.
        evaluator: used here, or as the model of those that the processes make.
        reference: of the Fréchet distance.
        on_done: told of every measurement as it comes in, in this process.

    Raises:
        GateError: a process died.
        EngineError: whatever a process could not use; the others are stopped.
    """
    num_processes = min(evaluator.config.num_processes, len(units))
    if num_processes <= 1:
        for seed, row in units:
            on_done((seed, row), evaluator.measure(seed, row, reference))
        return
    before = set(multiprocessing.active_children())
    # tensors are sent as bytes: torch would otherwise share memory with a parent that may be gone
    task = pickle.dumps((evaluator.config, reference))
    executor = ProcessPoolExecutor(
        num_processes, multiprocessing.get_context("spawn"), initializer=start_child
    )
    try:
        futures = {executor.submit(_measure, task, unit): unit for unit in units}
        for future in as_completed(futures):
            on_done(futures[future], future.result())
    except BrokenProcessPool:
        raise GateError(
            "a measuring process was killed; is there enough memory for so many (--processes)? "
            "What was measured is kept, and the next gate goes on from there"
        ) from None
    except BaseException:
        # after an error or Ctrl-C nobody waits for the other measurements
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


@cache
def _unpack(task: bytes) -> tuple[Evaluator, Reference]:
    config, reference = pickle.loads(task)  # noqa: S301  (our parent's)
    return Evaluator(config), reference


def _measure(task: bytes, unit: Unit) -> Measurement:
    evaluator, reference = _unpack(task)
    return evaluator.measure(*unit, reference)

"""One contender's worker process: `python -m loadtests.queue.worker NAME URL EXECUTIONS`, until SIGTERM."""

import asyncio
import sys
from pathlib import Path

import uvloop

from loadtests.queue.contenders import contender
from loadtests.queue.task import Executions


def main(name: str, url: str, executions: str) -> None:
    """Serve, and count what is executed."""
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # whoever runs a loop gets the faster one
    with Executions(Path(executions)) as counter:
        contender(name).serve(url, counter.execute)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Child: one process of `python -m server up`, restarted when it dies, ended with SIGTERM, then SIGKILL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

from server.supervisor.valkey import die_with_parent

EXIT_USAGE = 2
"""A child that ends with this status was set up wrongly; starting it again would change nothing."""

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
HEALTHY_AFTER_S = 60.0
"""A life this long was no failure to start; nor one of ten times the longest backoff, if that is less."""


class Child:
    """One supervised process.

    It leads a process group of its own, so that Ctrl-C in a terminal reaches the supervisor alone, which then
    ends the children in order; and the kernel kills it when the supervisor dies, so that nothing is orphaned.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        pass_fds: Sequence[int] = (),
        report: Callable[[str], None],
        first_backoff_s: float = FIRST_BACKOFF_S,
        max_backoff_s: float = MAX_BACKOFF_S,
    ) -> None:
        """Nothing runs before `keep_running`.

        Args:
            name: for reports.
            command: arguments after the Python interpreter.
            env: the child's whole environment.
            pass_fds: file descriptors that it inherits.
            report: takes one line for the operator.
            first_backoff_s: until it is started again, doubled with each time that it lives for a short while
                only, up to `max_backoff_s`.
        """
        self.name = name
        self._command = command
        self._env = env
        self._pass_fds = pass_fds
        self._report = report
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._first_backoff_s = first_backoff_s
        self._max_backoff_s = max_backoff_s
        self.on_trial = False
        self.proven = False
        self.end = ""

    async def keep_running(self) -> None:
        """Run the process, again and again; returns after `stop`, or when starting it again is no use.

        While it is `on_trial`, its first end is its last; how it ended is in `end`. Once it is `proven`,
        because it has served, it is started again whatever its status: what keeps it from starting may pass.
        """
        backoff_s = self._first_backoff_s
        while True:
            started = time.monotonic()
            status = await self.run_once()
            if self._stopping.is_set():
                return
            self.end = f"{self.name} {describe_exit(status)}"
            if self.on_trial:
                self._report(self.end)
                return
            if status == EXIT_USAGE and not self.proven:
                self._report(f"{self.name} cannot run as it is set up (its message is above)")
                return
            if time.monotonic() - started > min(HEALTHY_AFTER_S, 10 * self._max_backoff_s):
                backoff_s = self._first_backoff_s
            self._report(f"{self.name} {describe_exit(status)}; starting it again in {backoff_s:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s)
                return
            backoff_s = min(2 * backoff_s, self._max_backoff_s)

    async def run_once(self) -> int:
        """Run the process to its end, then end what it leaves behind: its process group, its temporary files.

        Compiled code is unpacked into them, megabytes that a killed process cannot take away itself.

        Returns:
            Its exit status, negative for the signal that killed it.
        """
        prefix = f"tdm-{self.name.replace(' ', '-')}-"
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
            return await self._live({**self._env, "TMPDIR": folder})

    async def _live(self, env: Mapping[str, str]) -> int:
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self._command,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=self._pass_fds,
            process_group=0,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        try:
            return await process.wait()
        finally:
            self.send(signal.SIGKILL)

    @property
    def pid(self) -> int | None:
        """Process id of its present life."""
        return None if self._process is None else self._process.pid

    async def stop(self, grace_s: float) -> None:
        """End the process for good: SIGTERM, and SIGKILL after `grace_s`."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            self._report(f"{self.name} did not end within {grace_s:g} s; killed")
            self.send(signal.SIGKILL)
            await process.wait()

    def send(self, signal_number: signal.Signals) -> None:
        """Signal the whole process group, as far as any of it still runs."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal_number)


def describe_exit(status: int) -> str:
    """`ended with status 1` or `was killed by SIGKILL`."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"

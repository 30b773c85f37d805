"""Accounts: what has become of the jobs that a server has accepted, by asking it for each of them.

A job must have one final answer, and the same one whenever it is asked for. Notes are what k6 has written
while a scenario ran: lines `job ID STATUS KEY`, with `-` for what the client did not know.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from loadtests.process import ROOT

UNFINISHED = frozenset({"queued", "in_progress"})
MOST_ASKED = 20_000
"""Of more jobs than this, those are asked for whose end no client has seen, and the latest of the others."""
CONCURRENCY = 16
PAUSE_S = 0.2


@dataclass(slots=True)
class Notes:
    """What clients know of accepted jobs.

    Attributes:
        seen: job id -> final statuses that clients have seen.
        keys: idempotency key -> ids of the jobs it led to.
    """

    seen: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    keys: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    @classmethod
    def read(cls, file: Path) -> "Notes":
        """From what k6 has written; none if it has not."""
        notes = cls()
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        for job_id, status, key in re.findall(r"\bjob (\w+) ([\w-]+) ([\w.-]+)", text):
            notes.seen[job_id] |= {status} - {"-"} - UNFINISHED
            if key != "-":
                notes.keys[key].add(job_id)
        return notes

    def chosen(self) -> list[str]:
        """The jobs to ask for."""
        open_ones = [job_id for job_id, seen in self.seen.items() if not seen]
        others = [job_id for job_id, seen in self.seen.items() if seen]
        return open_ones + others[max(0, len(self.seen) - MOST_ASKED) :]


@dataclass(slots=True)
class Accounts:
    """What has become of accepted jobs.

    Attributes:
        accepted: how many clients know of.
        asked: how many of them were asked for.
        ends: how they have ended -> how many.
        problems: a line for each promise that is broken.
    """

    accepted: int = 0
    asked: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


async def settle(base_url: str, notes: Notes, patience_s: float) -> Accounts:
    """Ask for jobs until each has its final answer, and then once more.

    Args:
        base_url: of the server.
        notes: of the jobs.
        patience_s: a job that is not finished by then counts as one that never will be.
    """
    accounts = Accounts(accepted=len(notes.seen))
    for key, ids in notes.keys.items():
        if len(ids) > 1:
            accounts.problems.append(f"key {key} led to {len(ids)} jobs: {', '.join(sorted(ids))}")
    deadline_s = time.monotonic() + patience_s
    queue = iter(notes.chosen())

    async def ask(http: aiohttp.ClientSession) -> None:
        for job_id in queue:
            job, again = [await _final(http, job_id, deadline_s) for _ in range(2)]
            end = end_of(job)
            accounts.asked += 1
            accounts.ends[end] = accounts.ends.get(end, 0) + 1
            if end in ("lost", "unfinished"):
                accounts.problems.append(f"{job_id} is {end}")
            elif job != again:
                accounts.problems.append(f"{job_id} has two answers: {end}, then {end_of(again)}")
            elif not notes.seen[job_id] <= {job["status"]}:
                accounts.problems.append(f"{job_id} was {' and '.join(notes.seen[job_id])}, and is {end}")

    timeout = aiohttp.ClientTimeout(total=30.0)
    async with aiohttp.ClientSession(base_url, timeout=timeout) as http:
        await asyncio.gather(*(ask(http) for _ in range(CONCURRENCY)))
    return accounts


async def _final(http: aiohttp.ClientSession, job_id: str, deadline_s: float) -> dict[str, Any]:
    """The job once it is finished, or as it stands at the deadline; empty if nobody knows it."""
    path = f"/v1/{'videos' if job_id.startswith('vid_') else 'images'}/{job_id}"
    job: dict[str, Any] = {"status": "queued"}
    while True:
        try:
            async with http.get(path) as answer:
                if answer.status == 404:
                    return {}
                if answer.status == 200:
                    job = await answer.json()
                    if job["status"] not in UNFINISHED:
                        return job
        except (aiohttp.ClientError, TimeoutError):
            pass  # it is asked again
        if time.monotonic() > deadline_s:
            return job
        await asyncio.sleep(PAUSE_S)


def end_of(job: Mapping[str, Any]) -> str:
    """How a job has ended: its status, or `cancelled`, `lost`, `unfinished`."""
    if not job:
        return "lost"
    if job["status"] in UNFINISHED:
        return "unfinished"
    return "cancelled" if (job.get("error") or {}).get("code") == "cancelled" else str(job["status"])


def audit(notes: Notes) -> tuple[dict[str, Any] | None, list[str]]:
    """Have `python -m server audit` compare accepted ids, records and stored files.

    Returns:
        Its report, None if it could make none, and a line for everything that is wrong.
    """
    done = subprocess.run(
        [sys.executable, "-m", "server", "audit", "--accepted", "-", "--json"],
        check=False,
        cwd=ROOT,
        input="".join(f"{job_id}\n" for job_id in notes.chosen()),
        capture_output=True,
        text=True,
    )
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return None, [f"python -m server audit: {(done.stderr or done.stdout).strip()}"]
    mismatches = report["mismatches"]
    return report, [f"audit: {one['code']} {one['id']}: {one['text']}" for one in mismatches]

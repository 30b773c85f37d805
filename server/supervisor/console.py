"""Console: the commands with which an operator looks into a running system, `audit` and `dead`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from server.queue.census import Census
from server.queue.dead import DeadLetter, DeadLetters, Retried
from server.settings import Settings
from server.store import ResultStore
from server.supervisor.audit import Finding, Report, audit
from server.supervisor.valkey import EmbeddedValkey

EXIT_OK = 0
EXIT_FOUND = 1
"""What was asked for is not there, or an audit found mismatches."""

# Where the output is a file or a pipe there is no width to fit, and ids must stay whole.
PIPE_WIDTH = 200


def redis_url(settings: Settings) -> str:
    """URL of the Redis that the settings name, or of the embedded Valkey that runs in their data directory.

    Raises:
        ValueError: neither.
    """
    if settings.redis_url:
        return settings.redis_url
    valkey = EmbeddedValkey(settings.data_dir)
    if not valkey.alive():
        raise ValueError(
            f"TDM_REDIS_URL is empty, and no Valkey runs in {settings.data_dir.resolve()} (TDM_DATA_DIR)"
        )
    return valkey.url


def run_audit(settings: Settings, *, accepted: str | None, settled: bool, strict: bool, as_json: bool) -> int:
    """Compare accepted ids, job records and stored objects.

    Args:
        settings: which Redis, which store, how long results are kept.
        accepted: file with one job id a line, `-` for stdin; None takes what Redis knows.
        settled: nothing should be unfinished any more.
        strict: leftovers of killed workers count as mismatches.
        as_json: print a JSON object instead of tables.

    Returns:
        0 if all is well, 1 with mismatches.
    Raises:
        ValueError: no Redis, or the file is not text.
        OSError: the file or the store cannot be read.
        QueueError: Redis cannot be reached.
    """
    ids = None if accepted is None else _read_ids(accepted)
    census = Census(redis_url(settings))
    try:
        report = audit(
            census,
            ResultStore(settings.results_url),
            result_ttl_s=settings.result_ttl_s,
            clock=census.now_ms,
            accepted=ids,
            settled=settled,
        )
    finally:
        census.close()
    clean = not report.mismatches and not (strict and report.leftovers)
    if as_json:
        _print_json({"clean": clean, **asdict(report)})
    else:
        _print_report(report)
    return EXIT_OK if clean else EXIT_FOUND


class NotThereError(Exception):
    """What was asked for does not exist; the message is one line for the operator."""


def list_dead(letters: DeadLetters, *, as_json: bool) -> int:
    """Print every dead letter, oldest first."""
    found = letters.all()
    if as_json:
        _print_json([_letter_fields(letter) for letter in found])
        return EXIT_OK
    if not found:
        _console().print("no dead letters")
        return EXIT_OK
    table = Table("id", "model", "tenant", "attempts", "error", "when")
    for column in table.columns:
        column.overflow = "fold"
    for letter in found:
        about = (letter.model, letter.tenant, str(letter.attempts), letter.error.code)
        table.add_row(letter.job_id, *about, _when(letter.ended_ms))
    _console().print(table)
    return EXIT_OK


def show_dead(letters: DeadLetters, job_id: str, *, as_json: bool) -> int:
    """Print all that is known of one dead letter.

    Raises:
        NotThereError: there is none of that job.
    """
    fields = _letter_fields(_find(letters, job_id))
    if as_json:
        _print_json(fields)
        return EXIT_OK
    table = Table.grid(padding=(0, 2))
    for name, value in fields.items():
        table.add_row(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    for column in table.columns:
        column.overflow = "fold"
    _console().print(table)
    return EXIT_OK


def retry_dead(letters: DeadLetters, settings: Settings, job_ids: Sequence[str]) -> int:
    """Give dead letters a new life; prints old and new id, one pair a line.

    Args:
        letters: of the Redis.
        settings: the deadline of the new jobs and how long they are kept.
        job_ids: whose; none means all.

    Raises:
        NotThereError: there is none of that job (any longer), or Redis takes no new jobs.
    """
    for letter in _chosen(letters, job_ids):
        deadline_s = settings.deadline_s(letter.kind)
        retried, job = letters.retry(letter, deadline_s=deadline_s, result_ttl_s=settings.record_ttl_s)
        if retried is Retried.MEMORY:
            raise NotThereError(
                f"Redis is nearly full and takes no new jobs; {letter.job_id} stays where it is"
            )
        if retried is Retried.OK:
            sys.stdout.write(f"{letter.job_id} {job.id}\n")
        elif job_ids:
            raise NotThereError(f"no dead letter of job {letter.job_id} any longer")
    return EXIT_OK


def drop_dead(letters: DeadLetters, job_ids: Sequence[str]) -> int:
    """Forget dead letters; prints their jobs' ids, one a line.

    Args:
        letters: of the Redis.
        job_ids: whose; none means all.

    Raises:
        NotThereError: there is none of that job (any longer).
    """
    for letter in _chosen(letters, job_ids):
        if letters.drop(letter):
            sys.stdout.write(f"{letter.job_id}\n")
        elif job_ids:
            raise NotThereError(f"no dead letter of job {letter.job_id} any longer")
    return EXIT_OK


def _chosen(letters: DeadLetters, job_ids: Sequence[str]) -> list[DeadLetter]:
    return [_find(letters, job_id) for job_id in job_ids] if job_ids else letters.all()


def _find(letters: DeadLetters, job_id: str) -> DeadLetter:
    letter = letters.find(job_id)
    if letter is None:
        raise NotThereError(f"no dead letter of job {job_id}")
    return letter


def _letter_fields(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.job_id,
        "model": letter.model,
        "tenant": letter.tenant,
        "priority": str(letter.priority),
        "attempts": letter.attempts,
        "error": asdict(letter.error),
        "when": _when(letter.ended_ms),
        "worker": letter.worker,
        "request": json.loads(letter.request),
    }


def _when(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="seconds")


def _read_ids(name: str) -> list[str]:
    text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _print_report(report: Report) -> None:
    console = _console()
    table = Table("counted", "number", title="audit", title_justify="left")
    table.columns[1].justify = "right"
    for name, number in report.counts.items():
        table.add_row(name, str(number))
    console.print(table)
    for title, findings in (("mismatches", report.mismatches), ("leftovers", report.leftovers)):
        if findings:
            console.print(_findings_table(f"{len(findings)} {title}", findings))
    if not report.mismatches:
        console.print("no mismatch")


def _findings_table(title: str, findings: Iterable[Finding]) -> Table:
    table = Table("code", "id", "what", "object", title=title, title_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    for finding in findings:
        table.add_row(finding.code, finding.id, finding.text, finding.object)
    return table


def _print_json(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _console() -> Console:
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)

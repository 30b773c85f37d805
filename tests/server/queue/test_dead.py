"""Dead letters on real servers: a retry is a new job, made once; the failed job stays what it is."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from server.__main__ import main
from server.job import Job, JobStatus, Priority
from server.queue.dead import DeadLetter, DeadLetters, Retried
from server.queue.job_queue import JobQueue
from server.queue.records import dump_request, load_request
from server.queue.worker_queue import MAX_ATTEMPTS, WorkerQueue
from server.supervisor.valkey import EmbeddedValkey
from tests.server.conftest import MODEL, Clock, let_leases_lapse

NewJob = Callable[..., Job]
MakeWorker = Callable[..., WorkerQueue]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def letters(redis_url: str, clock: Clock):
    letters = DeadLetters(redis_url, clock=clock)
    yield letters
    letters.close()


@pytest.fixture
async def kill(queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis):
    """Make a job and have it kill its workers until it is given up."""

    async def run(**options) -> Job:
        job = new(**options)
        await queue.enqueue(job)
        for attempt in range(MAX_ATTEMPTS + 1):
            worker = make_worker(f"{job.id}-{attempt}")
            let_leases_lapse(client)
            leases = worker.reclaim(1, lease_ms=20_000) or worker.read(1)
            worker.start(leases)
        failed = await queue.get(job.id)
        assert failed is not None
        assert failed.error is not None
        assert failed.error.code == "poison"
        return failed

    return run


def retry(letters: DeadLetters, letter: DeadLetter, clock: Clock) -> tuple[Retried, Job]:
    return letters.retry(letter, deadline_s=60, result_ttl_s=3600)


async def test_letter_says_what_died_and_why(letters: DeadLetters, kill: Callable, clock: Clock) -> None:
    job = await kill(prompt="ein Würfel", tenant="t1", priority=Priority.HIGH)
    (letter,) = letters.all()
    assert letters.find(job.id) == letter
    assert (letter.job_id, letter.model, letter.kind) == (job.id, MODEL, "image")
    assert (letter.tenant, letter.priority, letter.attempts) == ("t1", Priority.HIGH, MAX_ATTEMPTS)
    assert (letter.error, letter.ended_ms, letter.worker) == (job.error, clock.now_ms, job.worker)
    assert load_request(letter.request) == job.request


async def test_letters_come_oldest_first_and_all_of_them(
    letters: DeadLetters, kill: Callable, clock: Clock
) -> None:
    ids = []
    for _ in range(3):
        clock.now_ms += 1
        ids.append((await kill()).id)
    assert [letter.job_id for letter in letters.all()] == ids


async def test_retry_is_a_new_job_and_the_failed_one_stays_failed(
    letters: DeadLetters, kill: Callable, queue: JobQueue, make_worker: MakeWorker, clock: Clock
) -> None:
    failed = await kill(tenant="t1", priority=Priority.LOW)
    clock.now_ms += 3_600_000  # long after the old deadline
    (letter,) = letters.all()
    retried, made = retry(letters, letter, clock)
    assert retried is Retried.OK
    assert made.id != failed.id
    assert await queue.get(made.id) == made
    assert (made.tenant, made.priority, made.request) == ("t1", Priority.LOW, failed.request)
    assert (made.status, made.attempt, made.deadline_ms) == (JobStatus.QUEUED, 0, clock.now_ms + 60_000)
    assert letters.all() == []
    worker = make_worker("healthy")
    (started,) = worker.start(worker.read(1))
    assert started.job is not None
    worker.complete(started.job, [], {})
    done, unchanged = await queue.get(made.id), await queue.get(failed.id)
    assert done is not None
    assert done.status is JobStatus.DONE
    assert unchanged == failed


async def test_job_that_is_retried_and_kills_again_leaves_a_letter_again(
    letters: DeadLetters, kill: Callable, make_worker: MakeWorker, client: redis.Redis, clock: Clock
) -> None:
    await kill()
    (letter,) = letters.all()
    _, made = retry(letters, letter, clock)
    for attempt in range(MAX_ATTEMPTS + 1):
        let_leases_lapse(client)
        worker = make_worker(f"again-{attempt}")
        worker.start(worker.reclaim(1, lease_ms=20_000) or worker.read(1))
    assert [letter.job_id for letter in letters.all()] == [made.id]


async def test_of_many_retries_and_drops_at_once_one_succeeds(
    letters: DeadLetters, kill: Callable, queue: JobQueue, clock: Clock
) -> None:
    await kill()
    (letter,) = letters.all()
    outcomes: list[bool] = []
    together = threading.Barrier(8)

    def one(drops: bool) -> None:
        together.wait()
        outcomes.append(letters.drop(letter) if drops else retry(letters, letter, clock)[0] is Retried.OK)

    threads = [threading.Thread(target=one, args=(i % 4 == 0,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]
    assert (await queue.stats(MODEL)).total_waiting <= 1


async def test_full_redis_keeps_the_letter_and_lets_it_be_dropped(
    letters: DeadLetters, kill: Callable, client: redis.Redis, clock: Clock
) -> None:
    await kill()
    (letter,) = letters.all()
    used = int(client.info("memory")["used_memory"])
    client.config_set("maxmemory", used + used // 10)
    assert retry(letters, letter, clock)[0] is Retried.MEMORY
    assert letters.all() == [letter]
    client.config_set("maxmemory", used // 2)
    assert letters.drop(letter)
    assert letters.all() == []


async def test_dropped_letter_leaves_the_job_failed(
    letters: DeadLetters, kill: Callable, queue: JobQueue, clock: Clock
) -> None:
    job = await kill()
    (letter,) = letters.all()
    assert letters.drop(letter)
    assert not letters.drop(letter)
    assert retry(letters, letter, clock)[0] is Retried.GONE
    assert await queue.get(job.id) == job


# the commands


@pytest.fixture
def command(redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("TDM_REDIS_URL", redis_url)

    def run(*args: str) -> tuple[int, str, str]:
        status = main(["dead", *args])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


async def test_commands_list_and_show(command: Command, kill: Callable, clock: Clock) -> None:
    assert command("list") == (0, "no dead letters\n", "")
    assert command("list", "--json") == (0, "[]\n", "")
    job = await kill(prompt="ein roter Würfel", tenant="t1")
    status, out, err = command("list")
    assert (status, err) == (0, "")
    assert all(text in out for text in (job.id, MODEL, "t1", "3", "poison", "2027-01-15T08:00:00"))
    status, out, _ = command("list", "--json")
    (letter,) = json.loads(out)
    assert (letter["id"], letter["request"], letter["error"]["code"]) == (
        job.id,
        json.loads(dump_request(job.request)),
        "poison",
    )
    status, out, _ = command("show", job.id)
    assert status == 0
    assert "ein roter Würfel" in out
    assert json.loads(command("show", job.id, "--json")[1]) == letter


async def test_command_retries_and_tells_the_new_id(
    command: Command, kill: Callable, queue: JobQueue
) -> None:
    first, second, third = [await kill() for _ in range(3)]
    status, out, err = command("retry", first.id)
    old, new_id = out.split()
    assert (status, old, err) == (0, first.id, "")
    made = await queue.get(new_id)
    assert made is not None
    assert made.status is JobStatus.QUEUED
    status, out, _ = command("retry", "--all")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == [second.id, third.id]
    assert command("list", "--json")[1] == "[]\n"


async def test_command_drops_one_or_all(command: Command, kill: Callable) -> None:
    first, second, third = [await kill() for _ in range(3)]
    assert command("drop", first.id) == (0, f"{first.id}\n", "")
    assert command("drop", "--all") == (0, f"{second.id}\n{third.id}\n", "")
    assert command("drop", "--all") == (0, "", "")


@pytest.mark.parametrize("verb", ["show", "retry", "drop"])
def test_unknown_id_is_one_line_and_exit_status_1(command: Command, new: NewJob, verb: str) -> None:
    job_id = new().id
    assert command(verb, job_id) == (1, "", f"error: no dead letter of job {job_id}\n")


@pytest.mark.parametrize("args", [("retry",), ("drop",), ("retry", "img_1", "--all"), ("show",), ()])
def test_command_without_its_arguments_is_refused(args: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["dead", *args])
    assert ended.value.code == 2


def test_redis_that_does_not_answer_is_one_line_and_exit_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TDM_REDIS_URL", f"unix://{tmp_path}/no.sock")
    assert main(["dead", "list"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_running_embedded_valkey_is_found_by_its_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TDM_DATA_DIR", str(tmp_path))
    assert main(["dead", "list"]) == 2
    assert f"no Valkey runs in {tmp_path}" in capsys.readouterr().err
    with EmbeddedValkey(tmp_path):
        assert main(["dead", "list"]) == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "valkey"]

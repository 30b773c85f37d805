"""A bundle swapped for another version under `up`, with real processes and clients that go on asking."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engines.bundle.integrity import content_version, hash_files
from engines.bundle.manifest import read_manifest, write_manifest
from tests.e2e.system import TIMEOUT_S, System, poll, running, still_running
from tests.shared import compile_bundle, make_tiny_checkpoint

NUM_CLIENTS = 4


@pytest.fixture(scope="module")
def newer(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another version of the bundle: the same student with other weights."""
    directory = tmp_path_factory.mktemp("newer")
    student = make_tiny_checkpoint(directory / "tiny", seed=1)
    newer = shutil.copytree(bundle, directory / "bundle")
    compile_bundle(student, newer)
    assert version_of(newer) != version_of(bundle)
    return newer


@pytest.fixture(scope="module")
def shared(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """For tests that leave the first version serving."""
    with running(System(tmp_path_factory.mktemp("swap"), bundle, metrics_port=0)) as system:
        yield system


def version_of(bundle: Path) -> str:
    return read_manifest(bundle).version


def altered(bundle: Path, copy: Path, **manifest: Any) -> Path:
    """A copy whose scheduler nobody knows, with hashes as if it had been built so."""
    shutil.copytree(bundle, copy)
    config = copy / "checkpoint/scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "unheard-of"}))
    files = hash_files(copy)
    before = read_manifest(copy)
    version = content_version(files, manifest.get("buckets", before.buckets))
    write_manifest(copy, before.model_copy(update={"files": files, "version": version, **manifest}))
    return copy


def start_command(data_dir: Path, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "server", "bundle", *map(str, args)],
        env={**os.environ, "TDM_DATA_DIR": str(data_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(data_dir: Path, *args: object) -> str:
    """What a command that works prints."""
    running_command = start_command(data_dir, *args)
    out, err = running_command.communicate(timeout=TIMEOUT_S)
    assert (running_command.returncode, err) == (0, "")
    return out


def refusal(data_dir: Path, *args: object) -> str:
    """What a command that cannot be done says."""
    running_command = start_command(data_dir, *args)
    _, err = running_command.communicate(timeout=TIMEOUT_S)
    assert running_command.returncode != 0
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err


def status(data_dir: Path) -> dict[str, Any]:
    (model,) = json.loads(command(data_dir, "status", "--json"))
    return dict(model)


def serves(data_dir: Path, version: str) -> bool:
    """It is the only one, and settled."""
    now = status(data_dir)
    return (now["state"], [row["version"] for row in now["versions"]]) == ("steady", [version])


def workers_of(system: System, bundle: Path) -> list[psutil.Process]:
    """Worker processes that were started with this bundle."""
    found = []
    for process in system.processes():
        try:
            if "worker" in process.cmdline() and process.environ().get("TDM_BUNDLES") == str(bundle):
                found.append(process)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def draw(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/images", json={"prompt": "a red cube", "response_format": "b64_json", **fields})


def picture(http: httpx.Client) -> tuple[str, str]:
    """A picture that one seed gives, and the version that drew it."""
    answer = draw(http, seed=7).json()
    return answer["data"][0]["b64_json"], answer["version"]


@contextmanager
def load(system: System) -> Iterator[list[httpx.Response]]:
    """Clients that ask for one picture after the other, each once; all they are answered."""
    answers: list[httpx.Response] = []
    enough = threading.Event()

    def ask() -> None:
        with system.client() as http:
            while not enough.is_set():
                answers.append(draw(http))

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(ask) for _ in range(NUM_CLIENTS)]
        try:
            yield answers
        finally:
            enough.set()
        for client in clients:
            client.result()


def test_swap_and_rollback_under_load_fail_no_request(shared: System, bundle: Path, newer: Path) -> None:
    old, new = version_of(bundle), version_of(newer)
    with shared.client() as http:
        before = picture(http)
        retiring = workers_of(shared, bundle)
        with load(shared) as answers:
            said = command(shared.data_dir, "swap", newer)
            swapped = len(answers)
            poll(lambda: len(answers) > swapped + 2 * NUM_CLIENTS)
            during = picture(http)
            poll(lambda: not still_running(retiring))  # they have left; the process ends a moment later
            others = workers_of(shared, bundle)
            command(shared.data_dir, "rollback")
            back = len(answers)
            poll(lambda: len(answers) > back + 2 * NUM_CLIENTS)
        after = picture(http)

    assert said.splitlines()[-1] == f"tiny: version {new} serves"
    assert {answer.status_code for answer in answers} == {200}
    versions = [answer.json()["version"] for answer in answers]
    assert versions[0] == versions[-1] == old
    # Each client may have had one request under way when the command returned.
    assert set(versions[swapped + NUM_CLIENTS : swapped + 2 * NUM_CLIENTS]) == {new}
    assert len(retiring) == 1
    assert others == []
    assert before[1] == old
    assert after == before  # the same version, the same seed: the same bytes
    assert during[1] == new
    assert during[0] != before[0]
    poll(lambda: not workers_of(shared, newer))


def test_version_on_trial_gets_its_share_and_is_promoted_or_taken_back(
    shared: System, bundle: Path, newer: Path
) -> None:
    old, new = version_of(bundle), version_of(newer)

    def shares(count: int) -> Counter[str]:
        """Versions that draw so many pictures, asked for by several clients at once."""
        with shared.client() as http, ThreadPoolExecutor(NUM_CLIENTS) as pool:
            answers = list(pool.map(lambda _: draw(http), range(count)))
        assert {answer.status_code for answer in answers} == {200}
        return Counter(answer.json()["version"] for answer in answers)

    command(shared.data_dir, "swap", newer, "--canary", 25)
    assert refusal(shared.data_dir, "swap", newer).startswith("error: a swap of tiny to version")
    drawn = shares(120)
    assert abs(drawn[new] - 30) <= 1
    rows = {row["version"]: row for row in status(shared.data_dir)["versions"]}
    assert (rows[old]["dealt"], rows[new]["dealt"]) == (90, 30)
    command(shared.data_dir, "canary", 60)
    assert abs(shares(50)[new] - 30) <= 1
    command(shared.data_dir, "rollback")
    assert shares(5) == {old: 5}
    poll(lambda: not workers_of(shared, newer))

    command(shared.data_dir, "swap", newer, "--canary", 1)
    command(shared.data_dir, "promote")
    assert shares(5) == {new: 5}
    poll(lambda: not workers_of(shared, bundle))
    command(shared.data_dir, "rollback")
    assert serves(shared.data_dir, old)


def test_version_that_does_not_get_ready_leaves_the_old_one_serving(
    shared: System, bundle: Path, tmp_path: Path
) -> None:
    broken = altered(bundle, tmp_path / "broken")
    workers = workers_of(shared, bundle)
    with load(shared) as answers:
        said = refusal(shared.data_dir, "swap", broken)
    assert said.startswith(f"error: version {version_of(broken)} cannot be served: ")
    assert {(answer.status_code, answer.json()["version"]) for answer in answers} == {
        (200, version_of(bundle))
    }
    poll(lambda: serves(shared.data_dir, version_of(bundle)))
    assert workers_of(shared, bundle) == workers
    assert status(shared.data_dir)["result"] in said


def test_what_cannot_be_swapped_in_is_refused_before_anything_starts(
    shared: System, bundle: Path, newer: Path, tmp_path: Path
) -> None:
    def said(*args: object, data_dir: Path = shared.data_dir) -> str:
        return refusal(data_dir, *args).removeprefix("error: ").strip()

    damaged = shutil.copytree(newer, tmp_path / "damaged")
    (damaged / "checkpoint/model_index.json").write_text("{}")
    other = altered(newer, tmp_path / "other", name="other")
    clips = altered(newer, tmp_path / "clips", kind="video", fps=8)
    copy = shutil.copytree(bundle, tmp_path / "copy")
    assert "model_index.json" in said("swap", damaged)
    assert "is not a bundle" in said("swap", tmp_path)
    assert "is of model 'other', which is not served here; served are: tiny" in said("swap", other)
    assert "draws videos, and tiny images" in said("swap", clips)
    assert f"is version {version_of(bundle)}, which tiny is served with already" in said("swap", copy)
    assert said("swap", newer, "--canary", 101) == "a share is 1 to 100 percent, not 101"
    assert said("swap", newer, "--canary", 0) == "a share is 1 to 100 percent, not 0"
    assert "no version on trial" in said("promote")
    assert "no version on trial" in said("canary", 5)
    assert "no model is called 'else'; served are: tiny" in said("rollback", "--model", "else")
    assert "no Valkey runs" in said("swap", newer, data_dir=tmp_path)
    assert serves(shared.data_dir, version_of(bundle))


def test_worker_killed_on_trial_ends_the_swap_and_a_killed_old_one_does_not(
    shared: System, bundle: Path, newer: Path
) -> None:
    def begin() -> tuple[subprocess.Popen[str], psutil.Process]:
        """A swap whose new worker stands still while it loads."""
        swap = start_command(shared.data_dir, "swap", newer)
        (loading,) = poll(lambda: workers_of(shared, newer))
        loading.suspend()
        return swap, loading

    swap, loading = begin()
    loading.kill()
    _, err = swap.communicate(timeout=TIMEOUT_S)
    assert swap.returncode == 1
    assert f"version {version_of(newer)} cannot be served: worker 1 was killed by SIGKILL" in err
    poll(lambda: serves(shared.data_dir, version_of(bundle)))

    with shared.client() as http:
        swap, loading = begin()
        job_ids = [draw(http, wait_s=0, n=2).json()["id"] for _ in range(4)]
        workers_of(shared, bundle)[0].kill()
        for job_id in job_ids:
            poll(lambda job_id=job_id: http.get(f"/v1/images/{job_id}").json()["status"] == "completed")  # type: ignore[misc]
        assert status(shared.data_dir)["state"] == "loading"
        loading.resume()
        _, err = swap.communicate(timeout=TIMEOUT_S)
        assert (swap.returncode, err) == (0, "")
        assert picture(http)[1] == version_of(newer)
    command(shared.data_dir, "rollback")
    assert serves(shared.data_dir, version_of(bundle))


def test_up_killed_in_the_middle_of_a_swap_goes_on_with_it(bundle: Path, newer: Path, tmp_path: Path) -> None:
    old, new = version_of(bundle), version_of(newer)
    settings = {"metrics_port": 0}
    with running(System(tmp_path, bundle, name="first", **settings)) as first:
        swap = start_command(tmp_path, "swap", newer)
        (loading,) = poll(lambda: workers_of(first, newer))
        loading.suspend()
        with first.client() as http:
            accepted = [draw(http, wait_s=0, seed=seed).json()["id"] for seed in range(3)]
        processes = first.processes()
        first.end(signal.SIGKILL)
        poll(lambda: not still_running(processes))
        swap.communicate(timeout=TIMEOUT_S)
        assert swap.returncode != 0  # with the supervisor went its Valkey

    with running(System(tmp_path, bundle, name="second", **settings)) as second:
        poll(lambda: serves(tmp_path, new))
        with second.client() as http:
            for job_id in accepted:
                poll(lambda job_id=job_id: http.get(f"/v1/images/{job_id}").json()["status"] == "completed")  # type: ignore[misc]
        assert second.end() == 0

    with running(System(tmp_path, bundle, name="third", **settings)) as third, third.client() as http:
        assert f"serving version {new} from {newer}, as swapped in" in third.log
        assert picture(http)[1] == new
        assert workers_of(third, bundle) == []
        command(tmp_path, "rollback")  # what it came from is remembered as well
        assert picture(http)[1] == old


def test_version_that_takes_too_long_is_given_up(bundle: Path, newer: Path, tmp_path: Path) -> None:
    with running(System(tmp_path, bundle, metrics_port=0, swap_timeout_s=0.1)) as system:
        said = refusal(tmp_path, "swap", newer)
        assert f"version {version_of(newer)} was not ready after 0.1 s (TDM_SWAP_TIMEOUT_S)" in said
        poll(lambda: not workers_of(system, newer))
        with system.client() as http:
            assert picture(http)[1] == version_of(bundle)

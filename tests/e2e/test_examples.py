"""The examples, each run as its first lines say, against the system that the other files use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image

from engines.__main__ import main
from engines.captions import read_captions
from engines.distill.config import read_config
from tests.e2e.system import System, poll
from tests.e2e.test_page import needs_browser, open_page
from tests.shared import make_tiny_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = EXAMPLES / "own_model"


def run(*command: str | Path, cwd: Path) -> str:
    """What a command says that must succeed."""
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def pixels_of(path: Path) -> bytes:
    """Of a PNG that must hold a picture."""
    with Image.open(path, formats=["PNG"]) as picture:
        assert picture.size == (64, 64)
        return picture.convert("RGB").tobytes()


def test_every_example_is_listed_and_says_how_to_run_it() -> None:
    listed = re.findall(r"\[`(.+?)`\]\((.+?)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*") if path.is_file()}
    assert {name for name, _ in listed} == {target for _, target in listed} == files - {"README.md"}
    for name in files:
        if not name.endswith((".md", ".txt")):
            head = (EXAMPLES / name).read_text(encoding="utf-8")[:1000]
            assert "make serve" in head


def test_client_draws_and_gets_one_picture_for_one_key(system: System, tmp_path: Path) -> None:
    said = run(sys.executable, EXAMPLES / "client.py", system.url, cwd=tmp_path)

    assert said.splitlines()[-1] == "picture.png, order.png"
    assert pixels_of(tmp_path / "picture.png") != pixels_of(tmp_path / "order.png")


def test_curl_submits_polls_downloads_and_cancels(system: System, http: httpx.Client, tmp_path: Path) -> None:
    said = run("bash", EXAMPLES / "client.sh", system.url, cwd=tmp_path)

    (drawn, status), (cancelled, ended) = re.findall(r"^(http\S+): (\w+)$", said, flags=re.MULTILINE)
    assert (status, http.get(drawn).json()["seed"]) == ("completed", 7)
    assert http.get(f"{drawn}/content").content == (tmp_path / "picture.png").read_bytes()
    assert pixels_of(tmp_path / "picture.png")
    job = http.get(cancelled).json()
    assert job["status"] == ended
    # the tiny model may have been faster than the change of mind
    assert ended == "completed" or (ended, job["error"]["code"]) == ("failed", "cancelled")


@needs_browser
def test_page_of_another_origin_draws(system: System, tmp_path: Path) -> None:
    with open_page(f"{(EXAMPLES / 'page.html').as_uri()}?server={system.url}", tmp_path) as page:
        page.find("form button").click()
        assert poll(lambda: page.find("#status").text.startswith("completed in "))
        assert page.find("#picture").get_property("naturalWidth") == 64
        assert not page.find("#cancel").is_enabled()

        page.find("form input").clear()
        page.find("form button").click()
        assert poll(lambda: page.find("#status").text.startswith("invalid_value"))


def test_own_prompts_are_read_and_measured_on_are_others() -> None:
    config = read_config(OWN / "distill.yaml")
    assert config.prompts == OWN.relative_to(EXAMPLES.parent) / "prompts.txt"
    learnt = read_captions(OWN / "prompts.txt", 1000)
    measured = read_captions(OWN / "gate_prompts.txt", 1000)
    assert len(learnt) > len(measured) >= 10  # the gate wants ten
    assert not set(learnt) & set(measured)


def test_own_teacher_is_distilled_and_its_student_gated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    teacher = make_tiny_checkpoint(tmp_path / "teacher", student=False)
    smaller = {"iterations": 2, "batch_size": 4, "num_threads": 1, "device": "cpu", "samples.every": 0}
    changed = {"teacher": teacher, "out": tmp_path / "own", **smaller}
    settings = [f"--set={name}={value}" for name, value in changed.items()]
    assert main(["distill", str(OWN / "distill.yaml"), *settings]) == 0

    student, prompts = tmp_path / "own" / "student", OWN / "gate_prompts.txt"
    fewer = ["--seeds=1", "--reference=12", "--steps=4", "--teacher-steps=4,2"]
    assert main(["gate", str(student), f"--prompts={prompts}", *fewer]) == 1  # two iterations teach nothing
    report = json.loads((student / "report" / "report.json").read_text(encoding="utf-8"))
    assert [row["key"] for row in report["rows"]][-1] == "student-4"

"""What runs the checks elsewhere: the hosted workflow, and the programs that tests need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / ".github/workflows/ci.yml"
WORKFLOW: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
(JOB,) = WORKFLOW["jobs"].values()


def test_workflow_is_one_that_github_reads() -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    command = [str(checker), "--builtin-schema", "vendor.github-workflows", str(FILE)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflow_runs_what_ci_runs_on_every_python_that_is_supported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = "\n".join(project["classifiers"])
    supported = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", named, flags=re.MULTILINE)
    assert supported
    assert set(supported) <= set(JOB["strategy"]["matrix"]["python"])
    assert JOB["steps"][-1] == {"run": "bash .ci/run"}


def test_actions_are_pinned_and_may_read_and_nothing_else() -> None:
    used = [step["uses"] for step in JOB["steps"] if "uses" in step]
    assert used
    assert [one for one in used if not re.fullmatch(r"[\w./-]+@(v\d+\.\d+\.\d+|[0-9a-f]{40})", one)] == []
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in JOB
    assert WORKFLOW["concurrency"]["group"]


PROGRAMS = ("chromium", "chromedriver", "redis-server", "promtool", "nginx")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with all programs that tests run, and an apt-get and an id that tell if they are called."""
    for name in (*PROGRAMS, "apt-get", "id"):
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\necho {name} was called\n")
        file.chmod(0o755)
    return tmp_path


def check(programs: Path) -> subprocess.CompletedProcess[str]:
    command = ["/bin/bash", str(ROOT / ".ci/system-packages"), "--check"]
    return subprocess.run(
        command, env={"PATH": str(programs)}, check=False, capture_output=True, text=True, timeout=60
    )


def test_programs_that_are_there_are_not_spoken_of(programs: Path) -> None:
    done = check(programs)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_programs_are_named_with_the_verb_that_installs_them_and_not_installed(
    programs: Path,
) -> None:
    for name in ("chromedriver", "promtool"):
        (programs / name).unlink()
    done = check(programs)
    assert (done.returncode, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert sorted(first.removeprefix("not installed: ").split()) == ["chromium-driver", "prometheus"]
    assert second.startswith("make system-packages installs them")


@pytest.mark.parametrize("verb", ["test", "storm"])
def test_no_verb_but_its_own_installs_system_packages(verb: str) -> None:
    # not those of the make that runs the tests
    inherited = ("MAKE", "MFLAGS", "MISSING")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}

    def planned(*arguments: str) -> list[str]:
        command = ["make", "--dry-run", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=60
        )
        return [line for line in done.stdout.splitlines() if "system-packages" in line]

    assert planned("system-packages") == ["bash .ci/system-packages"]
    (line,) = planned(verb)
    assert line.startswith("bash .ci/system-packages --check")
    assert planned(verb, "MISSING=skip") == [line.replace('""', '"skip"')]
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    called = re.findall(r"^make ([a-z-]+)", ci, flags=re.MULTILINE)
    assert called == ["system-packages", "dev", "lint", "test"]

"""uv is told what pip was told: files, and variables, which count more."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = """\
[global]
index-url = https://mirror.example/simple
extra-index-url =
    https://one.example/simple
    https://two.example/simple
cert = /certs/ours.pem
find-links = /wheels
[install]
find-links = /more-wheels
[freeze]
timeout = 7
"""


@pytest.fixture(scope="module")
def install() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci/install.py"))


@pytest.fixture
def listed(tmp_path: Path) -> str:
    """What pip says it was told, by a file and by variables."""
    file = tmp_path / "pip.conf"
    file.write_text(CONFIGURATION)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    told = {
        "PIP_CONFIG_FILE": str(file),
        "PIP_INDEX_URL": "https://nearer.example/it's",
        "PIP_NO_INDEX": "1",
        "PIP_DEFAULT_TIMEOUT": "180",
    }
    command = [sys.executable, "-m", "pip", "config", "list"]
    return subprocess.run(
        command, env=kept | told, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout


def test_uv_gets_the_indexes_and_links_that_pip_has(install: dict[str, Any], listed: str) -> None:
    options = list(install["uv_options"](install["pip_settings"](listed)))
    pairs = list(zip(options[:-1:2], options[1::2], strict=True))
    assert [pair for pair in pairs if pair[0] != "--constraint"] == [  # a machine's own file may have one
        ("--index-strategy", "unsafe-best-match"),
        ("--default-index", "https://nearer.example/it's"),
        ("--index", "https://one.example/simple"),
        ("--index", "https://two.example/simple"),
        ("--find-links", "/more-wheels"),
    ]
    assert options[-1] == "--no-index"


def test_uv_gets_the_certificate_and_patience_that_pip_has(
    install: dict[str, Any], listed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("UV_HTTP_TIMEOUT", "9")
    environment = install["uv_environment"](install["pip_settings"](listed))
    assert environment["SSL_CERT_FILE"] == "/certs/ours.pem"
    assert environment["UV_HTTP_TIMEOUT"] == "9"


def test_without_a_configuration_nothing_is_passed_on(install: dict[str, Any]) -> None:
    assert install["pip_settings"]("") == {}
    assert list(install["uv_options"]({})) == ["--index-strategy", "unsafe-best-match"]

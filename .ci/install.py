"""Install this project into the environment of this Python: `python .ci/install.py worker,embedded`.

uv takes a tenth of pip's time. It knows nothing of pip's configuration, so what pip was told (indexes, links,
constraints, certificates) is passed on. Where uv cannot do it, pip does.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

CONSTRAINTS = ["--constraint", "constraints.txt"]
PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-compile"]
OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
"""Pip's settings that take one or more words, and uv's options for each of them."""


def pip_settings(listed: str) -> dict[str, str]:
    """What `pip config list` printed, by name. Lines for `pip install` win over others, PIP_* over both."""
    found: dict[str, str] = {}
    lines = [line.partition("=") for line in listed.splitlines() if "=" in line]
    ranks = {"global": 0, "install": 1, ":env:": 2}
    for key, _, value in sorted(lines, key=lambda line: ranks.get(line[0].partition(".")[0], -1)):
        section, _, name = key.partition(".")
        if section in ranks:
            found[name] = str(ast.literal_eval(value))
    return found


def uv_options(settings: Mapping[str, str]) -> Iterator[str]:
    """The same as options of `uv pip install`; of several indexes it takes the best version, as pip does."""
    yield from ("--index-strategy", "unsafe-best-match")
    for name, option in OPTIONS.items():
        for word in settings.get(name, "").split():
            yield from (option, word)
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        yield "--no-index"


def uv_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """What uv reads from its environment only. What is set there already stays."""
    found = {
        "SSL_CERT_FILE": settings.get("cert"),
        "UV_HTTP_TIMEOUT": settings.get("default-timeout", settings.get("timeout")),
        "ALL_PROXY": settings.get("proxy"),
    }
    return {name: value for name, value in found.items() if value} | dict(os.environ)


def main(extras: str) -> int:
    """Install it with these extras, editable; the status of the command that did."""
    what = ["--editable", f".[{extras}]"]
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings = pip_settings(listed.stdout)
    uv = Path(sys.executable).with_name("uv")
    if subprocess.run([*PIP, *CONSTRAINTS, "uv"], check=False).returncode == 0:
        command = [str(uv), "pip", "install", "--quiet", "--python", sys.executable, *uv_options(settings)]
        done = subprocess.run([*command, *CONSTRAINTS, *what], env=uv_environment(settings), check=False)
        if done.returncode == 0:
            return 0
    sys.stderr.write("uv could not install it; pip tries\n")
    return subprocess.run([*PIP, *CONSTRAINTS, *what], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""An etcd and a Kubernetes API server with nothing behind them, in a folder, for as long as a block lasts."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml

from tests.ports import reserve_ports
from tests.test_kubernetes import Object

PATIENCE_S = 120.0
TOKEN = "trial"


class RefusedError(Exception):
    """kubectl's words, most of them the API server's."""


class ControlPlane:
    """Takes objects, and admits or refuses them as a cluster would; nothing is done about them.

    Args:
        binaries: folder of `etcd`, `kube-apiserver` and `kubectl`.
        folder: empty, for data, keys and logs.
    """

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries.resolve()
        self._folder = folder
        self._running = ExitStack()

    def __enter__(self) -> Self:
        etcd, peers, port = reserve_ports(3)
        (self._folder / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n", encoding="utf-8")
        key = self._folder / "accounts.key"
        make_key = ["openssl", "genpkey", "-algorithm", "RSA", "-out", str(key)]
        subprocess.run(make_key, check=True, capture_output=True)
        store = f"http://127.0.0.1:{etcd}"
        with ExitStack() as running:
            self._running = running
            self._start(
                "etcd",
                *("--data-dir", "data", "--listen-client-urls", store, "--advertise-client-urls", store),
                *("--listen-peer-urls", f"http://127.0.0.1:{peers}"),
            )
            self._start(
                "kube-apiserver",
                *("--etcd-servers", store, "--secure-port", str(port), "--cert-dir", "certificates"),
                *("--bind-address", "127.0.0.1", "--advertise-address", "127.0.0.1"),
                *("--token-auth-file", "tokens.csv", "--authorization-mode", "RBAC"),
                *("--service-account-issuer", "https://kubernetes.default.svc"),
                *("--service-account-key-file", str(key), "--service-account-signing-key-file", str(key)),
                *("--service-cluster-ip-range", "10.96.0.0/16"),
                # Each namespace's own account is made by a controller, which is not there.
                *("--disable-admission-plugins", "ServiceAccount"),
            )
            self._reach = (
                f"--server=https://127.0.0.1:{port}",
                "--insecure-skip-tls-verify",
                f"--token={TOKEN}",
            )
            self._wait("get", "--raw", "/readyz")
            self._wait("get", "namespace", "default")  # made by the server itself, a moment later
            self._running = running.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._running.close()

    @property
    def version(self) -> str:
        """What the API server calls itself."""
        answer = json.loads(self.kubectl("version", "--output=json"))
        return f"Kubernetes {answer['serverVersion']['gitVersion']}"

    def kubectl(self, *command: str | Path, given: str | None = None) -> str:
        """Standard output of a kubectl command.

        Raises:
            RefusedError: it failed.
        """
        cache = f"--cache-dir={self._folder / 'kubectl'}"
        done = subprocess.run(
            [self._binaries / "kubectl", "--kubeconfig=/dev/null", *self._reach, cache, *command],
            check=False,
            capture_output=True,
            text=True,
            input=given,
        )
        if done.returncode:
            raise RefusedError(done.stderr.strip())
        return done.stdout

    def apply(self, objects: list[Object], *options: str) -> str:
        """`kubectl apply`, strictly: unknown and doubled fields are refused, warnings are errors."""
        if not objects:
            return ""
        strict = ("--validate=strict", "--warnings-as-errors", *options)
        return self.kubectl("apply", *strict, "-f", "-", given=yaml.safe_dump_all(objects))

    def define(self, definitions: Path) -> None:
        """Take the CustomResourceDefinitions of a folder, and wait until their resources are served."""
        self.kubectl("apply", "--server-side", "-f", definitions)
        # kubectl fails, too, where a definition has no status yet.
        self._wait("wait", "--for=condition=Established", "--timeout=1s", "crd", "--all")

    def versions(self, objects: list[Object]) -> list[str]:
        """One line for each object: its name and the version that any change to it would raise."""
        line = '{range .items[*]}{.kind}/{.metadata.name} {.metadata.resourceVersion}{"\\n"}{end}'
        wanted = yaml.safe_dump_all(objects)
        return self.kubectl("get", "-f", "-", f"--output=jsonpath={line}", given=wanted).splitlines()

    def _start(self, name: str, *options: str) -> None:
        log = self._running.enter_context((self._folder / f"{name}.log").open("w"))
        process = subprocess.Popen(
            [self._binaries / name, *options], cwd=self._folder, stdout=log, stderr=subprocess.STDOUT
        )
        self._running.callback(process.wait)
        self._running.callback(process.kill)

    def _wait(self, *command: str) -> None:
        """Return once a command succeeds.

        Raises:
            TimeoutError: it never does.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.kubectl(*command)
            except RefusedError as error:
                if time.monotonic() > deadline:
                    log = (self._folder / "kube-apiserver.log").read_text(encoding="utf-8")[-2000:]
                    raise TimeoutError(f"{' '.join(command)}: {error}\n{log}") from error
                time.sleep(0.2)  # the pace of the polling
            else:
                return

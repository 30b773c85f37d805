"""A real S3 server for the tests: moto's, as a process of its own, found through the usual AWS_* names."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import s3fs

BUCKET = "results"
TIMEOUT_S = 560.0


def environment_of(port: int) -> dict[str, str]:
    """What a process needs to find the server, and nothing of the person's own AWS set-up."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }


@contextmanager
def running_s3(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server on a port of 127.0.0.1, with one empty bucket; all data is gone when it ends."""
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not _answers(port):
                assert server.poll() is None, f"ended with status {server.returncode}"
                assert time.monotonic() < deadline, "moto does not come up"
                time.sleep(0.05)  # the pace of the polling, not a synchronisation
            # It checks no signatures; the first request has it import what it needs.
            httpx.put(f"http://127.0.0.1:{port}/{BUCKET}", timeout=TIMEOUT_S).raise_for_status()
            yield server
        finally:
            server.kill()


def files_of(port: int) -> s3fs.S3FileSystem:
    """A file system of our own, to look behind the store."""
    return s3fs.S3FileSystem(
        key="test",
        secret="test",
        endpoint_url=f"http://127.0.0.1:{port}",
        use_listings_cache=False,
    )


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/moto-api/data.json", timeout=TIMEOUT_S).is_success
    except httpx.TransportError:
        return False

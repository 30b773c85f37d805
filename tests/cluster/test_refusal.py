"""`python -m tests.cluster` says where it cannot run, and why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.__main__ import MAKERS, pod_of
from tests.test_kubernetes import Object, of_kind, templates_of

ROOT = Path(__file__).resolve().parents[2]


def test_folder_without_the_servers_is_told_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "kubectl").touch()

    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster", "--bin", tmp_path],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} lacks etcd, kube-apiserver\n"


@pytest.mark.parametrize("overlay", ["cpu-demo", "ha-valkey", "distill"])
def test_pods_that_are_offered_mount_only_volumes_that_they_have(overlay: str) -> None:
    makers: list[Object] = [one for kind in MAKERS for one in of_kind(overlay, kind)]
    assert makers
    for maker in makers:
        for template in templates_of(maker):
            pod = pod_of(maker, template)
            assert pod["metadata"]["namespace"] == "tdm"
            volumes = {one["name"] for one in pod["spec"]["volumes"]}
            mounted = {
                mount["name"] for one in pod["spec"]["containers"] for mount in one.get("volumeMounts", ())
            }
            assert mounted <= volumes

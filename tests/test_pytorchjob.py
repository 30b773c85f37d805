"""What the PyTorchJob runs, with what Kubeflow's operator tells it, as two nodes without GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.ports import reserve_port
from tests.shared import make_tiny_checkpoint
from tests.test_kubernetes import ROOT, of_kind

TIMEOUT_S = 500.0


def told_by_the_operator(elastic: dict[str, Any], address: str) -> dict[str, str]:
    """Environment of each pod of a job that has an elastic policy and no master."""
    return {
        "PET_RDZV_ENDPOINT": address,
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
    }


@pytest.mark.slow
def test_nodes_find_each_other_and_distil_one_student(tmp_path: Path) -> None:
    from tests.engines.distilling import settings  # loads torch

    (job,) = of_kind("distill", "PyTorchJob")
    workers = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    _, per_node, *command = workers["template"]["spec"]["containers"][0]["command"]
    assert per_node == "--nproc-per-node=gpu"
    config = tmp_path / "config.yaml"
    teacher = make_tiny_checkpoint(tmp_path / "teacher", student=False)
    config.write_text(json.dumps(settings(teacher, tmp_path / "run", iterations=2)), encoding="utf-8")
    environment = {
        **os.environ,
        **told_by_the_operator(job["spec"]["elasticPolicy"], f"127.0.0.1:{reserve_port()}"),
        "OMP_NUM_THREADS": "1",
    }
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1")
    with ExitStack() as running:
        nodes = [
            running.enter_context(
                subprocess.Popen(
                    [*torchrun, *command[:-1], config],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for _ in range(workers["replicas"])
        ]
        for node in nodes:
            running.callback(node.kill)
        said = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(said)
    student = json.loads((tmp_path / "run/student/student.json").read_text(encoding="utf-8"))
    assert student["training"]["num_processes"] == len(nodes)

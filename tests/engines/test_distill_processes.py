"""Two real processes train one student: the same numbers as one, whatever they share and however they end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from engines.distill import draws
from engines.distill.checkpoint import latest_checkpoint
from engines.distill.config import read_config
from engines.distill.distributed import World
from engines.distill.latents import write_latents
from engines.distill.trainer import distill
from engines.errors import ConfigError
from engines.noise import seeded_latents
from tests.engines.distilling import PROMPTS, quiet, settings
from tests.engines.tiny import make_tiny_checkpoint
from tests.ports import reserve_port

pytestmark = pytest.mark.slow

NUM_PROCESSES = 2
VARIANTS: dict[str, dict[str, Any]] = {
    "copies": {},
    "shards": {
        "shard": True,
        "fake_pull": 0.01,
        "objective": {"random_landing": True},
        "samples": {"every": 2, "prompts": 3, "seeds": 1, "teacher_steps": 2},
        "early_stop": {"every": 2, "pictures": 11, "reference": 11, "teacher_steps": 2, "features": "vae"},
    },
    "adapters": {"lora": {"rank": 4, "alpha": 8}},
    "sharded base": {"lora": {"rank": 4, "alpha": 8}, "shard": True, "gradient_checkpointing": True},
    "consistency": {"method": "lcm", "latents": "latents.safetensors", "shard": True},
    "fisher": {"objective": {"divergence": "fisher"}, "shard": True},
    "everything": {
        "fake_updates": 2,
        "fake_pull": 0.01,
        "grid_jitter": 0.3,
        "gradient_checkpointing": True,
        "objective": {"random_landing": True, "guidance_tau": "later", "fake_anchor": 0.02, "diversity": 0.1},
    },
}
"""Settings that differ in what processes share and in which order they call their networks."""
STOPPED, BROKEN = "stopped", "broken"

_RUN_ALL = """
import json, os, signal, sys
from pathlib import Path
from engines.__main__ import main
from engines.distill.distributed import joined
from engines.distill.trainer import Trainer

step = Trainer.step

def step_and_be_told_to_stop(trainer):
    step(trainer)
    if trainer.state.iteration == 2 and trainer.world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)

with joined("cpu") as world:
    for path in map(Path, sys.argv[1:]):
        for attempt in range(1 + (path.stem == "stopped")):
            Trainer.step = step_and_be_told_to_stop if path.stem == "stopped" and attempt == 0 else step
            status = main(["distill", str(path)])
            path.with_name(f"{path.stem}-{attempt}-{world.rank}.status").write_text(str(status))
"""
"""The command line for one file of settings after another. One run is stopped, by a signal to one process
alone, and started again."""


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": root}


@contextlib.contextmanager
def launched(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`accelerate launch` with two processes that find no GPU, in a process group of their own."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_processes", str(NUM_PROCESSES), "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", str(reserve_port()), *arguments),
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def write_settings(directory: Path, teacher: Path, name: str, **changes: Any) -> Path:
    """Settings of a run below `directory` that compares well with others of its kind."""
    directory.mkdir(exist_ok=True)
    values = settings(teacher, directory / name, iterations=4, autocast="none", log_every=1)
    values |= {"prompts": str(teacher / "prompts.txt"), "num_steps": {4: 0.5, 2: 0.5}} | changes
    if "latents" in changes:
        values["latents"] = str(teacher / changes["latents"])
    file = directory / f"{name}.yaml"
    file.write_text(json.dumps(values))
    return file


@dataclass(frozen=True)
class Runs:
    """What one process and what two made of the same settings.

    Attributes:
        alone, together: directories, with an out directory for each variant.
        output: of the two processes and their launcher.
    """

    teacher: Path
    alone: Path
    together: Path
    output: str

    def status(self, name: str, attempt: int = 0) -> set[int]:
        """Exit statuses of the processes."""
        files = [self.together / f"{name}-{attempt}-{rank}.status" for rank in range(NUM_PROCESSES)]
        return {int(file.read_text()) for file in files}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    base = tmp_path_factory.mktemp("runs")
    teacher = make_tiny_checkpoint(base / "teacher", student=False)
    (teacher / "prompts.txt").write_text("\n".join(PROMPTS))
    latents = seeded_latents(range(3), (16, 8, 8))
    write_latents(teacher / "latents.safetensors", latents, PROMPTS)
    latents[0] = torch.nan
    write_latents(teacher / "broken.safetensors", latents, PROMPTS)
    files = [write_settings(base / "together", teacher, name, **VARIANTS[name]) for name in VARIANTS]
    stopped = {**VARIANTS["shards"], "checkpoint_every": 4}
    files.append(write_settings(base / "together", teacher, STOPPED, **stopped))
    # two rows per iteration, one for each process, of which one meets what is broken
    broken = {"method": "lcm", "latents": "broken.safetensors", "batch_size": 2, "seed": 1}
    files.append(write_settings(base / "together", teacher, BROKEN, **broken))
    script = base / "run_all.py"
    script.write_text(_RUN_ALL)
    with launched(str(script), *map(str, files)) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    for name, changes in VARIANTS.items():
        distill(read_config(write_settings(base / "alone", teacher, name, **changes)), quiet())
    return Runs(teacher, base / "alone", base / "together", output)


def state(out: Path) -> dict[str, Tensor]:
    newest = latest_checkpoint(out / "checkpoints")
    assert newest is not None
    return load_file(newest / "state.safetensors")


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Weights differ by rounding, which is little of what they moved: Adam's steps are as large as gradients
    are certain, and no more certain than their sign where they should be zero.
    """
    assert found.keys() == expected.keys()
    learned = [key for key in expected if key.startswith(("network.", "average."))]
    apart = torch.stack([(found[key] - expected[key]).square().sum() for key in learned]).sum()
    moved = torch.stack([(start[key] - expected[key]).square().sum() for key in learned]).sum()
    assert float((apart / moved).sqrt()) < 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_give_the_numbers_of_one(name: str, runs: Runs) -> None:
    alone, together = runs.alone / name, runs.together / name
    assert runs.status(name) == {0}
    first = load_file(alone / "checkpoints" / "00000002" / "state.safetensors")
    check_close(state(together), state(alone), first)
    mine, theirs = metrics(alone), metrics(together)
    assert [line["iteration"] for line in theirs] == [1, 2, 3, 4]
    for one, two in zip(mine, theirs, strict=True):
        assert two["distance"] == pytest.approx(one["distance"], rel=1e-3, abs=1e-5)
        for key in ("student_loss", "student_grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_files_of_two_processes_hold_whole_tensors(name: str, runs: Runs) -> None:
    alone, together = runs.alone / name, runs.together / name
    shapes = [{key: value.shape for key, value in state(out).items()} for out in (alone, together)]
    assert shapes[0] == shapes[1]
    weights = [
        load_file(out / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
        for out in (alone, together)
    ]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, atol=2e-4, rtol=2e-3)
    recorded = json.loads((together / "student" / "student.json").read_text())
    assert recorded["training"]["num_processes"] == NUM_PROCESSES


def test_processes_share_what_they_draw(runs: Runs) -> None:
    for name in ("00000002.png", "00000004.png"):
        sheets = []
        for out in (runs.alone, runs.together):
            with Image.open(out / "shards" / "samples" / name) as sheet:
                sheets.append(np.asarray(sheet).astype(int))
        assert np.abs(sheets[0] - sheets[1]).max() <= 2
    kept = [
        json.loads((out / "shards" / "student" / "student.json").read_text())["training"]["early_stop"]
        for out in (runs.alone, runs.together)
    ]
    values = [[one["value"] for one in each["evaluations"]] for each in kept]
    # distances between eleven pictures: roots of covariances that are nearly singular magnify rounding
    assert values[0] == pytest.approx(values[1], rel=2e-2)
    assert kept[0]["kept_iteration"] == kept[1]["kept_iteration"]


def test_the_first_process_alone_talks(runs: Runs) -> None:
    assert runs.output.count("student written to") == len(VARIANTS) + 1, runs.output
    assert runs.output.count("interrupted") == 1, runs.output


def test_a_signal_to_one_process_stops_all_which_then_go_on_with_the_same_numbers(runs: Runs) -> None:
    assert runs.status(STOPPED) == {130}
    assert runs.status(STOPPED, 1) == {0}
    assert "resuming after iteration 3" in runs.output
    expected, resumed = state(runs.together / "shards"), state(runs.together / STOPPED)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(runs: Runs) -> None:
    assert runs.status(BROKEN) == {2}
    refusal = "error[training_failed]: student: loss nan, gradient norm nan in iteration 1:"
    assert runs.output.count(refusal) == NUM_PROCESSES, runs.output
    assert all(value.isfinite().all() for value in state(runs.together / BROKEN).values())


def test_one_process_goes_on_where_two_stopped(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.together / "shards", tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards" / "checkpoints" / "00000004")
    distill(read_config(write_settings(tmp_path, runs.teacher, "shards", **VARIANTS["shards"])), quiet())
    first = load_file(tmp_path / "shards" / "checkpoints" / "00000002" / "state.safetensors")
    check_close(state(tmp_path / "shards"), state(runs.alone / "shards"), first)


def test_ctrl_c_at_the_launcher_leaves_a_checkpoint_and_no_process(runs: Runs, tmp_path: Path) -> None:
    file = write_settings(tmp_path, runs.teacher, "long", iterations=100_000, checkpoint_every=100_000)
    lines = []
    with launched("--module", "engines", "distill", str(file)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if re.match(r"\s*1/100000", line):
                os.killpg(process.pid, signal.SIGINT)
        process.wait()
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    output = "".join(lines)
    newest = latest_checkpoint(tmp_path / "long" / "checkpoints")
    assert newest is not None, output
    assert len(metrics(tmp_path / "long")) == int(newest.name)
    assert output.count("interrupted") == 1, output


# One process


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_of_draws_are_the_rows_of_the_whole(size: int) -> None:
    whole = World().generator(7)
    expected = draws.uniform((8, 3), whole), draws.normal((8, 2, 5), whole)
    shares = [World(rank, size).generator(7) for rank in range(size)]
    rows = 8 // size
    found = [(draws.uniform((rows, 3), rng), draws.normal((rows, 2, 5), rng)) for rng in shares]
    for index in range(2):
        assert torch.equal(torch.cat([share[index] for share in found]), expected[index])


def test_plain_generators_draw_what_torch_draws() -> None:
    mine, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert torch.equal(draws.normal((4, 2), mine), torch.randn(4, 2, generator=theirs))
    assert torch.equal(draws.uniform((4,), mine), torch.rand(4, generator=theirs, dtype=torch.float64))


def test_batches_that_cannot_be_shared_evenly_are_refused() -> None:
    assert World(2, 4).share(8) == slice(4, 6)
    with pytest.raises(ConfigError, match="batch_size: 6 rows cannot be shared evenly by 4 processes"):
        World(0, 4).share(6)


def test_a_task_that_fails_in_the_first_process_fails() -> None:
    def task() -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        World().main_only(task)
    assert World().main_first(lambda: 3) == 3
    assert World().any(False) is False
    assert World().mean(1.5) == 1.5

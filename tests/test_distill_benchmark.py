"""The distillation benchmark: sizes as published, FLOPs and memory that are what a real iteration needs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engines.distill import trajectory
from engines.distill.config import DistillConfig, read_config
from engines.distill.student import student_bucket
from engines.distill.trainer import Trainer
from engines.families.spec import family_of
from loadtests.distill import __main__ as benchmark
from loadtests.distill import flops, report
from loadtests.distill.backbones import (
    BACKBONES,
    COGVIDEOX_TOY,
    PIXART_TOY,
    Backbone,
    random_prompts,
    random_teacher,
    write_directory,
)
from loadtests.distill.measure import Request, is_out_of_memory, settings
from loadtests.distill.memory import PeakMeter, num_bytes, resident
from loadtests.distill.naive import NaiveTrainer
from loadtests.distill.stopwatch import PARTS, Stopwatch, shares
from loadtests.process import ROOT

MIB = 2**20
SMALL = {"num_layers": 2, "num_attention_heads": 2}


def small(name: str) -> Backbone:
    """A backbone whose toy size takes milliseconds."""
    backbone = BACKBONES[name]
    network: dict[str, Any] = {"pixart": PIXART_TOY, "cogvideox": COGVIDEOX_TOY}[backbone.family] | SMALL
    if backbone.family == "pixart":
        network |= {"cross_attention_dim": 144, "sample_size": 8}
        changes: tuple[str, ...] = ("batch_size=3",)
    else:
        changes = ("batch_size=3", "height=32", "width=32", "frames=9")
    return replace(backbone, toy=replace(backbone.toy, network=network, settings=changes))


def configured(backbone: Backbone, directory: Path) -> DistillConfig:
    write_directory(backbone, backbone.toy, directory)
    return read_config(
        backbone.config, [f"teacher={directory}", "student_init=null", "device=cpu", *backbone.toy.settings]
    )


def trainer_of(backbone: Backbone, directory: Path) -> Trainer:
    config = configured(backbone, directory)
    return Trainer(
        config,
        random_teacher(directory, dtype=torch.float32, device="cpu"),
        random_prompts(backbone.toy),
    )


# Backbones


@pytest.mark.parametrize(
    ("name", "millions", "bucket", "latents"),
    [
        ("pixart-512", 610.9, "512x512", (4, 64, 64)),
        ("pixart-1024", 611.3, "1024x1024", (4, 128, 128)),
        ("sdxl-512", 2567.5, "512x512", (4, 64, 64)),
        ("sdxl-1024", 2567.5, "1024x1024", (4, 128, 128)),
        ("cogvideox-2b", 1693.8, "480x720x49", (13, 16, 60, 90)),
    ],
)
def test_sizes_are_the_published_ones(
    name: str, millions: float, bucket: str, latents: tuple[int, ...], tmp_path: Path
) -> None:
    backbone = BACKBONES[name]
    write_directory(backbone, backbone.full, tmp_path)
    request = Request(backbone=name, variant="separate", device="cpu", toy=False)
    drawn, shape = student_bucket(settings(request, tmp_path)[0], family_of(tmp_path))
    assert (drawn.label, shape) == (bucket, latents)
    if name != "sdxl-512":  # the same network as below, which takes seconds to make
        network = random_teacher(tmp_path, dtype=torch.float32, device="meta").network
        count = sum(parameter.numel() for parameter in network.parameters())
        assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize("variant", ["naive", "separate", "lora"])
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("toy", [True, False])
def test_every_variant_keeps_the_config_but_for_what_it_is(
    name: str, variant: Any, toy: bool, tmp_path: Path
) -> None:
    ready = read_config(BACKBONES[name].config)
    config, changes = settings(Request(backbone=name, variant=variant, device="cpu", toy=toy), tmp_path)
    assert (config.lora is None) == (variant != "lora")
    assert config.teacher_dtype == ("bfloat16" if variant == "lora" else "float32")
    changed = {change.partition("=")[0] for change in changes}
    assert changed <= {"batch_size", "height", "width", "frames", "lora", "teacher_dtype"}
    assert config.objective == ready.objective
    if not toy:
        assert (config.batch_size, config.height) == (ready.batch_size, ready.height)


# FLOPs and time


@pytest.mark.parametrize("name", ["pixart-512", "cogvideox-2b"])
def test_counted_flops_are_those_of_a_real_iteration(name: str, tmp_path: Path) -> None:
    backbone = small(name)
    trainer = trainer_of(backbone, tmp_path)
    row = flops.count(tmp_path, backbone.toy, trainer.config)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), Stopwatch(trainer) as watch:
        for iteration in range(2):
            trainer.state.iteration = iteration
            watch.start()
            with counter:
                trainer.step()
            parts = watch.stop()
            again = row.recomputed * (watch.rows["student"] + watch.rows["fake_score"])
            assert counter.get_total_flops() == row.iteration(watch.rows) + again
            assert set(parts) == set(PARTS)
            assert sum(shares(parts).values()) == pytest.approx(1.0)
    assert row.recomputed > 0
    # as it was before
    assert "x0_eps" not in vars(trainer.roles.student)


def test_expected_rows_are_the_mean_of_what_is_drawn() -> None:
    config = read_config(BACKBONES["cogvideox-2b"].config, ["num_steps={4: 0.6, 2: 0.25, 1: 0.15}"])
    _, step = trajectory.draw_steps(20_000, config.num_steps, torch.Generator().manual_seed(0))
    rows = benchmark.expected_rows(config)
    assert rows["rollout"] / config.batch_size == pytest.approx(float(step.float().mean()), rel=0.03)
    assert rows["teacher"] == 3 * config.batch_size  # prompt, no prompt, anchor
    assert rows["student"] == rows["fake_score"] == rows["fake_query"] == config.batch_size


# Memory


def test_peak_is_that_of_its_own_process_and_begins_anew() -> None:
    meter = PeakMeter(torch.device("cpu"))
    block = torch.ones(64 * MIB // 4)
    assert meter.peak() >= 60 * MIB
    del block
    assert meter.peak() >= 60 * MIB
    assert PeakMeter(torch.device("cpu")).peak() < 30 * MIB
    code = "from loadtests.distill.memory import *; assert resident('VmHWM') < {}".format(resident("VmHWM"))
    big = torch.ones(256 * MIB // 4)  # a child that inherited the maximum would show it
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert big.sum() > 0


def test_shared_memory_is_counted_once() -> None:
    tensor = torch.zeros(1024)
    assert num_bytes([tensor, tensor[:10], tensor.view(32, 32), torch.zeros(8)]) == 4096 + 32


def test_naive_iteration_trains_both_learners_and_leaves_the_teacher(tmp_path: Path) -> None:
    backbone = small("pixart-512")
    config = configured(backbone, tmp_path)
    teacher = random_teacher(tmp_path, dtype=torch.float32, device="cpu")
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    trainer = NaiveTrainer(config, teacher, random_prompts(backbone.toy))
    trainer.step()
    changed = Counter(
        name
        for name, network in trainer.networks.items()
        for key, value in network.state_dict().items()
        if not torch.equal(value, before[key])
    )
    assert set(changed) == {"student", "fake_score"}
    # nothing it computes is lost on a branch without gradient
    for name in changed:
        assert all(parameter.grad is not None for parameter in trainer.networks[name].parameters())
    assert all(value.dtype == torch.float32 for value in trainer.networks["student"].parameters())


# The whole benchmark


@pytest.mark.slow
def test_benchmark_writes_result_tables_and_chart_and_keeps_other_backbones(tmp_path: Path) -> None:
    out = tmp_path / "distill.json"
    options = ["--device=cpu", "--warm-up=0", "--iterations=1", "--batch-size=1", f"--out={out}"]
    assert benchmark.main([*options, "--only", "pixart-512", "--variants", "lora"]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    entry = result["backbones"]["pixart-512"]
    assert result["toy"]
    assert entry["projected"] is None
    peaks = {run["variant"]: run["memory"] for run in entry["memory"]}
    assert peaks.keys() == {"separate", "lora"}
    assert peaks["lora"]["peak_gib"] < peaks["separate"]["peak_gib"]
    assert all(memory["kept_gib"] < memory["peak_gib"] for memory in peaks.values())
    assert entry["tflop_per_iteration"] > 0
    tables = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "shrunk" in tables
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result["backbones"]["cogvideox-2b"] = entry
    out.write_text(json.dumps(result))
    assert benchmark.kept_from(out, result).keys() == {"cogvideox-2b", "pixart-512"}
    other = {**result, "versions": {**result["versions"], "torch": "1.0"}}
    assert benchmark.kept_from(out, other) == {}


@pytest.mark.slow
def test_measurement_that_breaks_names_itself() -> None:
    request = Request(backbone="nobody", variant="lora", device="cpu", toy=True)
    with pytest.raises(benchmark.MeasurementError, match=r"nobody, lora(.|\n)*KeyError"):
        benchmark.take(request)


def run_of(variant: str, batch_size: int, peak: float | None) -> dict[str, Any]:
    taken = {"backbone": "pixart-512", "bucket": "512x512", "variant": variant, "batch_size": batch_size}
    if peak is None:
        return {**taken, "fits": False, "error": "CUDA out of memory"}
    seconds = {"median": 1.0, "mean": 1.2, "min": 0.9, "max": 1.5, "count": 3}
    rows = {"rollout": 1, "student": 1, "fake_score": 1, "fake_query": 1, "teacher": 2}
    return {
        **taken,
        "fits": True,
        "parameters_m": 610.9,
        "seconds": seconds,
        "parts": dict.fromkeys(PARTS, 0.2),
        "rows": [rows],
        "memory": {"kept_gib": peak / 2, "peak_gib": peak},
    }


@pytest.mark.slow
def test_batch_is_halved_until_it_fits_and_all_are_compared_at_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What a GPU that is too small makes of it; there is none here."""
    largest = {"separate": 32, "naive": 8, "lora": 32}

    def take(request: Request) -> Mapping[str, Any]:
        batch = request.batch_size or 32
        return run_of(request.variant, batch, batch / 4 if batch <= largest[request.variant] else None)

    monkeypatch.setattr(benchmark, "take", take)
    request = Request(backbone="pixart-512", variant="separate", device="cuda", toy=False)
    console = Console(quiet=True)
    measured = benchmark.measure_backbone(
        BACKBONES["pixart-512"], request, ["naive", "separate", "lora"], "abc", console
    )
    tried = [(run["variant"], run["batch_size"]) for run in measured["memory"]]
    assert tried == [
        ("separate", 32),
        *(("naive", batch) for batch in (32, 16, 8)),
        ("lora", 32),
        ("separate", 8),
        ("lora", 8),
    ]
    assert measured["common_batch_size"] == 8
    assert measured["projected"] == {"hours": 0.167, "iterations": 500, "source": "the paper's"}
    result = {
        "hardware": {"cpu": "CPU", "gpus": ["GPU, 1"]},
        "versions": {"torch": "2"},
        "toy": False,
        "backbones": {"pixart-512": measured},
    }
    tables = report.markdown(result)
    assert "| PixArt-alpha 512x512 | 8 (of 32): 2 | 32: 8 | 32: 8 |" in tables
    assert "0.17 h for the paper's 500 iterations" in tables
    largest["naive"] = 0
    measured = benchmark.measure_backbone(
        BACKBONES["pixart-512"], request, ["naive", "separate"], "abc", console
    )
    assert measured["common_batch_size"] == 32
    tables = report.markdown({**result, "backbones": {"pixart-512": measured}})
    assert "| PixArt-alpha 512x512 | 32 | does not fit | 8 (4) |" in tables
    assert "| PixArt-alpha 512x512 | not even 1 | 32: 8 |" in tables
    report.draw_chart({**result, "backbones": {"pixart-512": measured}}, tmp_path / "chart.png")


def test_only_a_lack_of_memory_is_one() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))

"""The GPU benchmark: published sizes and FLOPs, rates, going on where it was, and all of it at toy size."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from engines.__main__ import main
from engines.bench import gpu as gpu_module
from engines.bench.cell import CONTENDERS, fresh_prompts
from engines.bench.flops import count_flops, stage_specs
from engines.bench.gpu import GpuBench, line, open_result, parse_names, run_gpu_bench, with_rates
from engines.bench.models import MODELS, make_parts, write_checkpoint
from engines.bench.report import chart, tables, where
from engines.errors import CompileError
from engines.families.checkpoint import tensor_shapes
from engines.families.student import read_student

PNG = b"\x89PNG\r\n\x1a\n"


def make_bench(folder: Path, **changes: Any) -> GpuBench:
    settings: dict[str, Any] = {
        "models": ("pixart-512",),
        "contenders": ("eager", "diffusers"),
        "batches": (),
        "precision": "fp32",
        "toy": True,
        "out": folder / "gpu.json",
        "work": folder / "work",
        "seconds": 0.05,
        "minutes": 60.0,
    }
    return GpuBench(**{**settings, **changes})


@pytest.mark.parametrize(
    ("name", "millions", "tflop"),
    [
        # parameters as published; FLOPs as somebody counted them apart from this code
        ("pixart-512", 610.9, {"text": 1.117, "denoise": 1.236, "decode": 2.515, "sample": 8.58}),
        ("sdxl-1024", 2567.5, {"text": 0.111, "denoise": 6.761, "decode": 10.47, "sample": 37.63}),
    ],
)
def test_models_have_their_published_sizes(name: str, millions: float, tflop: dict[str, float]) -> None:
    model = MODELS[name]
    parts = make_parts(model, toy=False, device="meta", dtype=torch.bfloat16)
    network = parts["unet" if model.family == "sdxl" else "transformer"]
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == millions
    decoder = parts["vae"].decoder
    assert isinstance(decoder, torch.nn.Module)
    assert round(sum(parameter.numel() for parameter in decoder.parameters()) / 1e6, 1) == 49.5
    flops = count_flops(model, toy=False)
    assert {stage: flops[stage] / 1e12 for stage in tflop} == pytest.approx(tflop, rel=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_every_toy_is_a_student_of_its_family(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    directory = write_checkpoint(model, tmp_path / "student", toy=True, device="cpu")
    student = read_student(directory)
    assert (student.family, student.bucket) == (model.family, model.toy.bucket)
    assert student.gate_passed is None
    assert tensor_shapes(directory / "vae")
    assert [spec.name for spec in stage_specs(model, toy=True)] == ["text", "denoise", "decode"]
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*.safetensors")}
    write_checkpoint(model, directory, toy=True, device="cpu")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # a toy that takes no FLOPs would check nothing
    assert min(count_flops(model, toy=True).values()) > 10_000


def test_rates_follow_from_time_and_flops(tmp_path: Path) -> None:
    row = {"batch": 4, "ms": 200.0, "peak_bytes": 8_000_000_000, "stages_ms": {"text": 10.0, "denoise": 40.0}}
    flops = {"text": 10**12, "denoise": 4 * 10**12, "decode": 3 * 10**12, "sample": 20 * 10**12}
    cell = with_rates(row, flops, 800.0, make_bench(tmp_path))
    assert (cell["per_second"], cell["tflop_per_s"], cell["share_of_matmul"]) == (20.0, 400.0, 0.5)
    assert cell["stages_tflop_per_s"] == {"text": 400.0, "denoise": 400.0}
    assert "200 ms, 20 images/s, 400 TFLOP/s, 50.0% of" in line(cell, "images")
    failed = with_rates({"batch": 8, "error": "CUDA out of memory"}, flops, 800.0, make_bench(tmp_path))
    assert line(failed, "images") == "batch 8: CUDA out of memory"


def test_prompts_never_come_twice() -> None:
    prompts = fresh_prompts()
    assert len({next(prompts) for _ in range(1000)}) == 1000


def test_full_sizes_need_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CompileError, match="--gpu: torch sees no GPU here; --toy"):
        run_gpu_bench(make_bench(tmp_path, toy=False), Console(quiet=True))


def test_names_are_checked() -> None:
    assert parse_names("eager, diffusers", CONTENDERS) == ("eager", "diffusers")
    with pytest.raises(ValueError, match="not 'tensorrt'"):
        parse_names("tensorrt", CONTENDERS)
    assert main(["bench", "--gpu", "--models", "flux"]) == 2
    assert main(["bench"]) == 2


def test_result_of_another_machine_is_not_gone_on_with(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    result = open_result(bench)
    bench.out.write_text(json.dumps({**result, "hardware": {"gpu": "NVIDIA H100"}}))
    with pytest.raises(CompileError, match=r"field hardware is .*H100.*; choose another file"):
        open_result(bench)


@pytest.mark.timeout(1800)
def test_all_of_it_at_toy_size_and_again_from_where_it_was(
    compiled_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["bench", "--gpu", "--toy", "--models", "pixart-512", "--batches", "1,4", "--seconds", "0.05"]
    arguments += ["--out", str(out), "--work", str(tmp_path / "work")]
    # the suite's student instead of the benchmark's own toy: its code is compiled already
    bundle = tmp_path / "work" / "pixart-512-fp32"
    for folder in ("checkpoint", "engines"):
        shutil.copytree(compiled_bundle / folder, bundle / folder)
    packages = {path.name for path in (bundle / "engines").iterdir()}
    # one contender first: the others are added to its result
    assert main([*arguments, "--contenders", "aotinductor"]) == 0
    first = json.loads(out.read_text())
    assert {path.name for path in (bundle / "engines").iterdir()} == packages
    assert main([*arguments, "--contenders", "aotinductor,eager,diffusers"]) == 0
    result = json.loads(out.read_text())
    entry = result["models"]["pixart-512"]
    assert entry["backends"]["aotinductor"] == first["models"]["pixart-512"]["backends"]["aotinductor"]
    assert (entry["failed"], list(entry["backends"])) == ({}, ["aotinductor", "eager", "diffusers"])
    for name, cells in entry["backends"].items():
        assert list(cells) == ["1", "4"]
        for batch, cell in cells.items():
            assert cell["ms"] > 0
            assert cell["per_second"] == pytest.approx(int(batch) / cell["ms"] * 1e3, rel=2e-3)
            assert cell["tflop_per_s"] > 0
            assert set(cell["stages_ms"]) == (set() if name == "diffusers" else {"text", "denoise", "decode"})
    assert entry["about"]["aotinductor"]["build_s"] > 0
    assert min(entry["about"]["aotinductor"]["parity"].values()) > 0.999
    assert entry["worker_start"]["said"].startswith("ready on aotinductor")
    assert result["versions"]["torch"] == torch.__version__
    assert result["toy"] is True
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    assert "a check and no measure of the published sizes" in capsys.readouterr().out

    # nothing is left to do, and nothing is started
    monkeypatch.setattr(gpu_module, "_lines_of", lambda *_: pytest.fail("measured again"))
    run_gpu_bench(
        make_bench(tmp_path, batches=(1, 4), contenders=("aotinductor", "eager", "diffusers")),
        Console(quiet=True),
    )


def test_contender_that_breaks_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench(tmp_path, batches=(1,))

    def lines(request: Any, _: float) -> Any:
        if request.backend == "eager":
            raise gpu_module.CellError("exit status -9: killed")
        yield {"about": {"load_s": 1.0}}
        yield {"batch": 1, "ms": 10.0, "peak_bytes": None, "stages_ms": {}}

    monkeypatch.setattr(gpu_module, "_lines_of", lines)
    result = run_gpu_bench(bench, Console(quiet=True))
    entry = result["models"]["pixart-512"]
    assert entry["failed"] == {"eager": "exit status -9: killed"}
    assert entry["backends"]["diffusers"]["1"]["per_second"] == 100.0
    assert entry["about"] == {"diffusers": {"load_s": 1.0}}
    assert len(tables(result)) == 1
    assert "SHRUNK" in where(result)
    chart(result, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(PNG)
    # tried again the next time, and what is measured is not
    monkeypatch.setattr(
        gpu_module, "_lines_of", lambda *_: iter([{"batch": 1, "ms": 5.0, "peak_bytes": 1, "stages_ms": {}}])
    )
    again = run_gpu_bench(bench, Console(quiet=True))["models"]["pixart-512"]
    assert again["failed"] == {}
    assert (again["backends"]["eager"]["1"]["ms"], again["backends"]["diffusers"]["1"]["ms"]) == (5.0, 10.0)


def test_nothing_is_started_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "_lines_of", lambda *_: pytest.fail("started"))
    bench = replace(make_bench(tmp_path), minutes=0.0)
    assert run_gpu_bench(bench, Console(quiet=True))["models"]["pixart-512"]["failed"] == {}

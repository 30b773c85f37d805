"""The studio's whole road, as small as it gets."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from engines.__main__ import main
from loadtests.gpu import train_demo


@pytest.mark.slow
def test_one_call_goes_from_nothing_to_a_teacher_and_a_second_has_nothing_to_do(
    tmp_path: Path,
) -> None:
    arguments = ["--toy", "--out", str(tmp_path / "run"), "--deliver", str(tmp_path / "kept")]
    assert train_demo.main(arguments) == 0
    kept = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert kept == [
        "code.safetensors",
        "exam.png",
        "losses.jsonl",
        "reader.safetensors",
        "results.json",
        "studio-teacher.tar",
    ]
    results = json.loads((tmp_path / "kept" / "results.json").read_text())
    assert results["machine"]["hardware"]["cores"] >= 1
    assert 0 < results["vae"]["edge_contrast_of_linear_code"] <= 1
    assert set(results["exam"]["steps-50-cfg-2"]["groups"]) == {
        "one", "two", "three", "held_out_one", "held_out_two",
    }  # fmt: skip
    with Image.open(tmp_path / "kept" / "exam.png") as sheet:
        assert sheet.width == 8 * 96 * 2  # renders, and one column for each sampler
    with tarfile.open(tmp_path / "kept" / "studio-teacher.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    pipeline = PixArtAlphaPipeline.from_pretrained(tmp_path / "studio-teacher").to(torch.float32)
    drawn = pipeline(
        "a red cube",
        num_inference_steps=1,
        height=96,
        width=96,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="np",
    ).images
    assert drawn.shape == (1, 96, 96, 3)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    assert train_demo.main(arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}


@pytest.mark.slow
def test_what_a_run_keeps_another_begins_with(tmp_path: Path) -> None:
    stages = ("pictures", "text", "teacher")
    first = train_demo.toy_recipe(tmp_path / "first")
    first.run(stages)
    first.keep(tmp_path / "start")
    assert sorted(path.name for path in (tmp_path / "start").iterdir()) == [
        "code.safetensors",
        "teacher.safetensors",
        "text.safetensors",
    ]

    fits = {stage: replace(fit, num_steps=1, learning_rate=0.0) for stage, fit in first.fits.items()}
    second = replace(first, out=tmp_path / "second", start=tmp_path / "start", fits=fits)
    (second.out).mkdir()
    (second.out / "pictures").symlink_to(first.out / "pictures")
    second.run(stages)
    second.keep(tmp_path / "again")
    for stage in ("text", "teacher"):
        before, after = (load_file(tmp_path / name / f"{stage}.safetensors") for name in ("start", "again"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_keeping_alone_trains_and_draws_nothing(tmp_path: Path) -> None:
    text = tmp_path / "run" / "text" / "text.safetensors"
    text.parent.mkdir(parents=True)
    weights = {"average.text_encoder.weight": torch.ones(2)}
    save_file(weights, text, metadata={"step": "7"})
    command = ["demo-teacher", "--kind", "studio", "--out", str(tmp_path / "run")]

    assert main([*command, "--keep", str(tmp_path / "kept")]) == 0

    assert [path.name for path in (tmp_path / "run").iterdir()] == ["text"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["text.safetensors"]


def test_time_is_shared_out_among_the_stages_that_train() -> None:
    seconds = train_demo.plan(8)
    assert sum(seconds.values()) == pytest.approx(480 - train_demo.FIXED_SECONDS, abs=1)
    assert max(seconds, key=lambda stage: seconds[stage]) == "teacher"

"""TensorRT's plans, built and run on the stand-in (`fake_tensorrt.py`): what several files of tests need."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import Manifest, read_manifest
from engines.bundle.platform import Platform, current_platform
from engines.bundle.stages import Backend
from engines.compile import build as build_module
from engines.compile.backends import COMPILERS
from engines.compile.build import build_bundle, num_pieces
from engines.compile.progress import BuildProgress
from engines.compile.tensorrt import PlanJob
from engines.runtime.tensorrt import Scratch, TensorRtEngine
from tests.engines import fake_tensorrt
from tests.engines.conftest import build_settings

CPU = torch.device("cpu")
BUCKET = Bucket(64, 64)
OLDEST, NEWEST = fake_tensorrt.VERSIONS[0], fake_tensorrt.VERSIONS[-1]
BATCHES = (1, 3)


def with_gpu(**fields: str) -> Platform:
    gpu = {
        "gpu": "NVIDIA H200",
        "compute_capability": "9.0",
        "driver": "580.95.05",
        "tensorrt": OLDEST,
        **fields,
    }
    return current_platform().model_copy(update=gpu)


def build_plans(student: Path, out: Path) -> None:
    """A bundle of plans and nothing else, built with the oldest version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", fake_tensorrt.make(OLDEST))
        compiler = replace(COMPILERS[Backend.TENSORRT], check=lambda _: None)  # there is no GPU
        patch.setitem(COMPILERS, Backend.TENSORRT, compiler)
        patch.setattr(
            build_module,
            "current_platform",
            lambda _: current_platform().model_copy(update={"tensorrt": OLDEST}),
        )
        settings = replace(
            build_settings(student, out),
            backends=(Backend.TENSORRT,),
            batch_sizes=BATCHES,
            precision="fp32",
        )
        console = Console(record=True, width=300)
        with BuildProgress(console, num_pieces(settings)) as progress:
            build_bundle(settings, progress)
        text = console.export_text()
    assert "never run on a GPU" in text
    pieces = re.findall(r"\[(\d+)/(\d+)\]", text)
    assert pieces[-1][0] == pieces[-1][1]


def job_for(student: Path, root: Path, **fields: Any) -> PlanJob:
    """A plan of the text stage, which is exported in seconds."""
    from engines.families.spec import get_family
    from engines.families.student import read_student

    if not (root / "checkpoint").exists():
        shutil.copytree(student, root / "checkpoint")
    spec = next(
        one for one in get_family("pixart").stages(student, read_student(student)) if one.name == "text"
    )
    values = {
        "family": "pixart",
        "spec": spec,
        "batch_sizes": (1, 2, 4),
        "bundle": root,
        "platform": with_gpu(),
    }
    return PlanJob(**{**values, **fields})


def engine_of(bundle: Path, stage: str = "text", **fields: Any) -> TensorRtEngine:
    manifest = read_manifest(bundle)
    engine = next(one for one in manifest.engines if one.stage == stage)
    spec = next(one for one in manifest.stages if one.name == stage)
    values = {
        "plan": (bundle / engine.path).read_bytes(),
        "name": engine.path,
        "spec": spec,
        "ranges": engine.profiles,
        "scratch": Scratch(engine.scratch_bytes, CPU),
        "device": CPU,
    }
    return TensorRtEngine(**{**values, **fields})


def text_inputs(manifest: Manifest, batch: int) -> list[torch.Tensor]:
    from engines.compile.export import example_inputs

    return list(example_inputs(manifest.stages[0], batch, seed=batch))

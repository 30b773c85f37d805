"""The memory plan: every line from where it says, the sum checked, refusals that say what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engines.__main__ import main
from engines.bundle.bucket import Bucket
from engines.bundle.latency import LatencyRow
from engines.bundle.manifest import Manifest, read_manifest, write_manifest
from engines.bundle.stages import Backend, StageSpec, TensorSpec
from engines.errors import MemoryPlanError
from engines.families.spec import get_family
from engines.runtime.cuda_graphs import boundary_bytes
from engines.runtime.memory import FRACTION, MemoryLine, MemoryPlan, plan_memory
from engines.runtime.scratch import LiveBytes, load_without_memory, peak_of

pytestmark = pytest.mark.timeout(2400)

META = torch.device("meta")


def size_of(plan: MemoryPlan, what: str) -> MemoryLine:
    return next(line for line in plan.lines if line.what == what)


def with_peaks(manifest: Manifest, backend: str) -> Manifest:
    rows = [
        LatencyRow(
            stage=spec.name,
            bucket=spec.bucket,
            batch=batch,
            backend=backend,
            ms=1.0,
            peak_bytes=batch * (1000 + number),
        )
        for number, spec in enumerate(manifest.stages)
        for batch in manifest.batch_sizes
    ]
    return manifest.model_copy(update={"latency": rows})


def test_weights_are_those_of_the_modules(eager_bundle: Path) -> None:
    manifest = read_manifest(eager_bundle)
    plan = plan_memory(eager_bundle, with_peaks(manifest, Backend.EAGER))
    for spec in manifest.stages:
        module = get_family(manifest.family).load_stage(eager_bundle / "checkpoint", spec, torch.float32)
        held = {parameter.data_ptr(): parameter.nbytes for parameter in module.parameters()}
        line = size_of(plan, f"weights of {spec.name}")
        assert (line.size_bytes, line.basis) == (sum(held.values()), "from the files' headers")


def test_weights_of_packages_are_counted_once_and_with_their_own_constants(compiled_bundle: Path) -> None:
    manifest = read_manifest(compiled_bundle)
    plan = plan_memory(compiled_bundle, with_peaks(manifest, Backend.AOTINDUCTOR))
    (engine,) = [engine for engine in manifest.engines if engine.stage == "denoise"]
    checkpoint = load_file(
        compiled_bundle / "checkpoint" / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    own = load_file(compiled_bundle / engine.constants)
    found = size_of(plan, "weights of denoise").size_bytes
    total = sum(tensor.numel() * 4 for tensor in (*checkpoint.values(), *own.values()))
    assert 0.9 * total < found <= total  # the compiler may drop what does not matter
    doubled = manifest.model_copy(update={"engines": [*manifest.engines, *manifest.engines]})
    again = plan_memory(compiled_bundle, with_peaks(doubled, Backend.AOTINDUCTOR))
    assert size_of(again, "weights of denoise").size_bytes == found


def test_scratch_is_the_largest_that_was_measured_and_graphs_come_on_top(eager_bundle: Path) -> None:
    manifest = with_peaks(read_manifest(eager_bundle), Backend.EAGER)
    plan = plan_memory(eager_bundle, manifest, graphs=True)
    assert size_of(plan, "scratch of the largest call") == MemoryLine(
        "scratch of the largest call", 4 * 1002, "measured at build"
    )
    assert size_of(plan, "pool of CUDA graphs").size_bytes == 4 * 1002
    without = plan_memory(eager_bundle, manifest)
    gone = {line.what for line in plan.lines} - {line.what for line in without.lines}
    assert gone == {"pool of CUDA graphs", "static inputs and outputs of CUDA graphs"}


def test_scratch_that_was_not_measured_is_estimated_and_says_so(eager_bundle: Path) -> None:
    plan = plan_memory(eager_bundle, read_manifest(eager_bundle))
    line = size_of(plan, "scratch of the largest call")
    assert line.basis == "estimated"
    assert line.size_bytes > max(boundary_bytes(spec, 4) for spec in read_manifest(eager_bundle).stages)


def test_estimate_counts_what_is_alive_at_once() -> None:
    with LiveBytes() as live:
        first = torch.empty(1000, device=META)
        second = first + 1  # both
        del first
        third = second.view(10, 100) * 2  # the first is gone
        del second
        _ = third + third
    assert live.peak == 2 * 4000


def test_attention_is_estimated_without_its_table_of_weights() -> None:
    spec = StageSpec(
        name="denoise",
        parts=("transformer",),
        bucket=Bucket(64, 64),
        inputs=(TensorSpec(name="latents", dtype="float32", shape=(2, 1000, 8)),),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=(2, 1000, 8)),),
    )

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, value=x) + 1

    assert peak_of(Attention(), spec, 3) == 2 * 3 * 2 * 1000 * 8 * 4


def test_decoding_a_longer_video_takes_no_more_scratch_but_for_its_pixels(tmp_path: Path) -> None:
    from engines.families.student import read_student
    from tests.engines.tiny import make_tiny_cogvideox

    directory = make_tiny_cogvideox(tmp_path / "student")
    family, student = get_family("cogvideox"), read_student(directory)
    peaks, outputs = [], []
    for frames in (17, 49):
        spec = family.stages(directory, student.model_copy(update={"frames": frames}))[-1]
        module = load_without_memory(directory, "cogvideox", spec, torch.bfloat16)
        peaks.append(peak_of(module, spec, 1))
        outputs.append(boundary_bytes(spec, 1))
    # pixels twice: chunk by chunk, and joined; and the latents in the module's order and dtype
    assert peaks[1] - peaks[0] <= 3 * (outputs[1] - outputs[0])
    assert peaks[1] < 1.5 * peaks[0]


def test_plan_that_does_not_fit_is_refused_with_its_sum_and_a_remedy() -> None:
    lines = (
        MemoryLine("weights of denoise", 6 << 30, "from the files' headers"),
        MemoryLine("scratch", 3 << 30, "estimated"),
    )
    plan = MemoryPlan(name="scenes (aotinductor)", lines=lines)
    plan.check(int((9 << 30) / FRACTION) + 10)
    with pytest.raises(MemoryPlanError) as caught:
        plan.check(9 << 30)
    message = str(caught.value)
    assert (
        "scenes (aotinductor) needs 9.66 GB of GPU memory, 8.89 GB may be used (92% of 9.66 GB free)"
        in message
    )
    assert "weights of denoise    6.44 GB  from the files' headers" in message
    assert "scratch               3.22 GB  estimated" in message
    assert "--batches" in message


def test_inspect_prints_the_plan_of_a_bundle_for_a_gpu(
    eager_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(eager_bundle, tmp_path / "bundle")
    manifest = with_peaks(read_manifest(bundle), Backend.EAGER)
    gpu = manifest.platform.model_copy(update={"gpu": "NVIDIA H100", "cuda": "13.0", "driver": "580.1"})
    write_manifest(bundle, manifest.model_copy(update={"device": "cuda", "platform": gpu}))
    assert main(["inspect", str(bundle)]) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H100, CUDA 13.0, driver 580.1" in printed
    assert "scratch of the largest call" in printed
    assert "measured at build" in printed


def test_meta_module_has_the_shapes_of_the_real_one(eager_bundle: Path) -> None:
    manifest = read_manifest(eager_bundle)
    for spec in manifest.stages:
        module = load_without_memory(eager_bundle / "checkpoint", manifest.family, spec, torch.bfloat16)
        assert isinstance(module, nn.Module)
        assert {parameter.device for parameter in module.parameters()} == {META}
        assert peak_of(module, spec, 2) >= boundary_bytes(spec, 2) - sum(
            2 * torch.Size(tensor.shape).numel() * 8 for tensor in spec.inputs
        )

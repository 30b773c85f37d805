"""Float8: what is quantised, how far it is off, and that packages quantise the checkpoint's weights."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from engines.bundle.manifest import read_manifest
from engines.bundle.platform import current_platform
from engines.bundle.stages import Backend
from engines.compile.aotinductor import CompileJob, bind_constants, compile_stage
from engines.compile.export import example_inputs
from engines.compile.fp8 import RowwiseLinear, is_quantised, quantise_denoiser
from engines.compile.parity import MIN_COSINE, check_parity, compare, worst
from engines.families.spec import get_family
from engines.families.student import read_student
from engines.runtime.aotinductor import Binding, Constants, _as_bound
from engines.runtime.rowwise import FLOAT8, LARGEST, dequantise_rows, quantise_rows
from engines.runtime.stages import EagerStages, load_compiled_stage
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox, make_tiny_sdxl

MAKERS: dict[str, Callable[[Path], Path]] = {
    "pixart": make_tiny_checkpoint,
    "sdxl": make_tiny_sdxl,
    "cogvideox": make_tiny_cogvideox,
}
QUANTISED = {
    # self-attention and cross-attention, and the feed-forward's two layers, of each block
    "pixart": {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k"}
    | {"attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"},
    "sdxl": {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k"}
    | {"attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2"},
    "cogvideox": {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"},
}


def denoiser(family: str, directory: Path, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A tiny student's denoise stage, and inputs for it."""
    spec = get_family(family).stages(directory, read_student(directory))[1]
    return get_family(family).load_stage(directory, spec, dtype), example_inputs(spec, 3)


def test_rows_come_back_within_the_formats_precision() -> None:
    matrix = torch.randn(32, 48) * torch.logspace(-6, 6, 32)[:, None]
    quantised, scale = quantise_rows(matrix)
    assert (quantised.dtype, quantised.shape, scale.shape) == (FLOAT8, (32, 48), (32, 1))
    assert quantised.float().abs().amax(dim=1).allclose(torch.tensor(LARGEST))
    off = (dequantise_rows(quantised, scale) - matrix).abs()
    largest = matrix.abs().amax(dim=1, keepdim=True)
    assert (off <= matrix.abs() / 16 + 3e-6 * largest).all()


def test_row_of_zeros_stays_so_and_rows_do_not_depend_on_each_other() -> None:
    matrix = torch.randn(4, 16)
    matrix[1] = 0
    quantised, scale = quantise_rows(matrix)
    assert dequantise_rows(quantised, scale)[1].abs().max() == 0
    alone, alone_scale = quantise_rows(matrix[2:3])
    assert torch.equal(alone.float(), quantised[2:3].float())
    assert torch.equal(alone_scale, scale[2:3])


@pytest.mark.parametrize("bias", [True, False])
def test_float8_product_is_that_of_the_dequantised_matrices(bias: bool) -> None:
    linear = nn.Linear(64, 48, bias=bias).bfloat16()
    x = torch.randn(2, 5, 64).bfloat16()
    hardware, reference = RowwiseLinear(linear)(x), RowwiseLinear(linear, exact=True)(x)
    assert hardware.shape == (2, 5, 48)
    assert hardware.dtype == torch.bfloat16
    torch.testing.assert_close(hardware, reference, rtol=0.01, atol=0.01)
    assert compare(linear.float()(x.float()), hardware.float()).cosine > 0.998


@pytest.mark.parametrize("family", MAKERS)
def test_denoiser_in_float8_stays_within_its_tolerance(family: str, tmp_path: Path) -> None:
    directory = MAKERS[family](tmp_path / "student")
    reference, inputs = denoiser(family, directory, torch.float32)
    with torch.inference_mode():
        wanted = reference(*inputs)
        for exact in (True, False):
            quantised, _ = denoiser(family, directory, torch.bfloat16)
            names = quantise_denoiser(quantised, exact=exact)
            found = {name.split("transformer_blocks.")[1].partition(".")[2] for name in names}
            assert found == QUANTISED[family]
            agreement = worst([compare(wanted, quantised(*inputs))])
            assert agreement.finite
            assert agreement.cosine >= MIN_COSINE["float8"]
            # it is another computation, not the same one under another name
            assert agreement.cosine < 0.999999


@pytest.mark.parametrize(
    "name",
    [
        "transformer.proj_out",
        "transformer.pos_embed.proj",
        "transformer.adaln_single.linear",
        "transformer.caption_projection.linear_1",
        "transformer.transformer_blocks.0.norm1.linear",
        "unet.time_embedding.linear_1",
        "unet.down_blocks.1.attentions.0.proj_in",
    ],
)
def test_what_everything_hangs_on_stays_in_bfloat16(name: str) -> None:
    assert not is_quantised(name, nn.Linear(32, 32))
    assert is_quantised("transformer.transformer_blocks.0.attn1.to_q", nn.Linear(32, 32))
    assert not is_quantised("transformer.transformer_blocks.0.attn1.to_q", nn.Linear(32, 24))


def test_packages_take_quantised_weights_from_the_checkpoint() -> None:
    stored = torch.randn(32, 16).half()
    layer = RowwiseLinear(nn.Linear(16, 32))
    weight, scale = quantise_rows(stored.bfloat16())
    layer.weight.copy_(weight)
    layer.weight_scale.copy_(scale)
    tensors = {"net.to_q.weight": layer.weight, "net.to_q.weight_scale": layer.weight_scale}
    bindings, own = bind_constants(tensors, tensors, {"transformer": {"to_q.weight": stored}})
    assert own == {}
    assert bindings == {
        "net.to_q.weight": Binding(tensor="to_q.weight", dtype="float8_e4m3fn", rowwise="weight"),
        "net.to_q.weight_scale": Binding(tensor="to_q.weight", dtype="float32", rowwise="scale"),
    }
    cpu = torch.device("cpu")
    bound = _as_bound(stored, bindings["net.to_q.weight"], cpu)
    assert torch.equal(bound.float(), weight.float())
    assert torch.equal(_as_bound(stored, bindings["net.to_q.weight_scale"], cpu), scale)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_float8_agrees_and_packages_for_one_size_share_its_weights(
    eager_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where inductor is to keep its files
    bundle = shutil.copytree(eager_bundle, tmp_path / "bundle")
    manifest = read_manifest(bundle)
    spec = manifest.stages[1].model_copy(update={"compute_dtype": "float8"})
    jobs = [
        CompileJob(
            family="pixart",
            spec=spec,
            min_batch=min_batch,
            max_batch=max_batch,
            num_threads=1,
            bundle=bundle,
            platform=current_platform(),
        )
        for min_batch, max_batch in ((1, 4), (2, 2))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of inductor's
        engines = [compile_stage(job) for job in jobs]
    assert [Path(engine.path).name.rpartition("-")[0] for engine in engines] == [
        "denoise-64x64",
        "denoise-64x64-b2",
    ]
    with safe_open(bundle / engines[0].constants, framework="pt") as stream:
        assert not any(name.endswith("weight_scale") for name in stream.keys())  # noqa: SIM118
    constants = Constants(bundle)
    dynamic, static = (constants.bind(spec, engine) for engine in engines)
    quantised = [name for name, tensor in dynamic.items() if tensor.dtype == FLOAT8]
    assert len(quantised) == 2 * len(QUANTISED["pixart"])
    # tables of positions, too, which no checkpoint has
    assert all(dynamic[name] is static[name] for name in dynamic if name in static)
    compiled = load_compiled_stage(bundle, manifest.model_copy(update={"engines": engines}), spec, constants)
    assert [compiled.engine_for(batch)[0].max_batch for batch in (1, 2, 3, 4)] == [4, 2, 4, 4]
    reference = EagerStages(bundle, manifest).load(spec)
    for batch in (1, 2, 3, 4):
        row = check_parity(spec, reference, compiled, batch, Backend.AOTINDUCTOR)
        assert MIN_COSINE["float8"] <= row.cosine < 0.999999

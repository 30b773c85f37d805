"""What every family promises to serving and training, held against diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, PixArtAlphaPipeline, StableDiffusionXLPipeline
from torch import Tensor

from engines.bundle.bucket import Bucket
from engines.compile.export import example_inputs
from engines.denoiser import Conditioning, NetworkDenoiser, is_step_aware
from engines.errors import CheckpointError
from engines.families.checkpoint import read_json
from engines.families.spec import FAMILIES, FamilySpec, family_of, get_family
from engines.families.student import read_student
from engines.families.weights import load_weights
from engines.noise import seeded_latents
from engines.sampler import sample
from engines.schedule import NoiseSchedule, student_timesteps
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox, make_tiny_sdxl

MAKERS: dict[str, Callable[..., Path]] = {
    "pixart": make_tiny_checkpoint,
    "sdxl": make_tiny_sdxl,
    "cogvideox": make_tiny_cogvideox,
}
PIPELINES: dict[str, Any] = {
    "pixart": PixArtAlphaPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "cogvideox": CogVideoXPipeline,
}

# diffusers warns of its own and transformers' deprecated arguments while it loads
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> FamilySpec:
    return get_family(request.param)


@pytest.fixture(scope="module")
def directory(family: FamilySpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student; row 4 of its steps embedding is zero, so diffusers' pipeline draws the same in 4 steps."""
    return MAKERS[family.name](tmp_path_factory.mktemp(family.name) / "student")


@pytest.fixture(scope="module")
def pipeline(family: FamilySpec, directory: Path) -> Any:
    loaded = PIPELINES[family.name].from_pretrained(directory, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def inputs_for(family: FamilySpec, directory: Path, batch: int) -> tuple[Tensor, Tensor, Conditioning]:
    """Latents, timesteps and conditioning of a tiny checkpoint."""
    shape = family.latent_shape(directory, family.native_bucket(directory))
    cond = family.load_encoder(directory)(["a red cube", "a blue sphere"][:batch])
    return seeded_latents(range(batch), shape), torch.tensor([499, 999][:batch]), cond


def test_family_is_told_by_the_pipelines_class(family: FamilySpec, directory: Path, tmp_path: Path) -> None:
    assert family_of(directory) is family
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(CheckpointError, match=r"_class_name.*CogVideoXPipeline.*'FluxPipeline'"):
        family_of(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_stage_gives_what_its_spec_says(
    family: FamilySpec, directory: Path, dtype: torch.dtype
) -> None:
    for spec in family.stages(directory, read_student(directory)):
        with torch.no_grad():
            found = family.load_stage(directory, spec, dtype)(*example_inputs(spec, 3))
        outputs = (found,) if isinstance(found, Tensor) else found
        assert [(tuple(tensor.shape), tensor.dtype) for tensor in outputs] == [
            ((3, *expected.shape), getattr(torch, expected.dtype)) for expected in spec.outputs
        ]


def test_sampling_draws_what_the_diffusers_pipeline_draws(
    family: FamilySpec, directory: Path, pipeline: Any
) -> None:
    bucket, prompt = family.native_bucket(directory), "A red Cube left of"
    if family.name == "pixart":
        bucket = Bucket(64, 64)
    latents = seeded_latents([7], family.latent_shape(directory, bucket))
    cond = family.load_encoder(directory)([prompt])
    config = read_json(directory / "scheduler" / "scheduler_config.json")
    denoiser = NetworkDenoiser(
        family.load_network(directory, torch.float32), NoiseSchedule.from_config(config), family.predict
    )
    clean = sample(denoiser, latents, student_timesteps(4), replace(cond, num_steps=torch.tensor([4])))
    with torch.no_grad():
        pixels = family.load_decoder(directory)(clean)

    options: dict[str, Any] = {
        "height": bucket.height,
        "width": bucket.width,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "return_dict": False,
    }
    if family.name == "pixart":
        options |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 20}
    if family.kind == "video":
        options |= {"num_frames": bucket.frames, "max_sequence_length": 20}
    (expected,) = pipeline(prompt, latents=latents, output_type="latent", **options)
    torch.testing.assert_close(clean, expected, atol=1e-4, rtol=1e-4)
    (drawn,) = pipeline(prompt, latents=latents, output_type="np", **options)
    drawn = torch.as_tensor(drawn).reshape(1, bucket.frames, bucket.height, bucket.width, 3) * 255
    assert pixels.dtype == torch.uint8
    assert (pixels - drawn).abs().max() <= 1.0  # half of it is rounding


def test_making_a_network_step_aware_changes_nothing_at_first(family: FamilySpec, tmp_path: Path) -> None:
    teacher = MAKERS[family.name](tmp_path / "teacher", student=False)
    network = family.load_network(teacher, torch.float32)
    names = set(network.state_dict())
    latents, times, cond = inputs_for(family, teacher, 2)
    with torch.no_grad():
        before = family.predict(network, latents, times, cond)
        assert not is_step_aware(network)
        family.make_step_aware(network, 4)
        family.make_step_aware(network, 4)  # a second time is harmless
        after = family.predict(network, latents, times, replace(cond, num_steps=torch.tensor([1, 4])))
    assert is_step_aware(network)
    assert set(network.state_dict()) - names == {family.steps_key}
    assert network.state_dict()[family.steps_key].shape[0] == 5
    assert torch.equal(before, after)


def test_number_of_steps_changes_the_prediction_row_by_row(family: FamilySpec, directory: Path) -> None:
    network = family.load_network(directory, torch.float32)
    latents, times, cond = inputs_for(family, directory, 2)
    with torch.no_grad():
        plain, mixed = (
            family.predict(network, latents, times, replace(cond, num_steps=steps))
            for steps in (None, torch.tensor([1, 4]))
        )
    assert (plain[0] - mixed[0]).abs().max() > 1e-3
    torch.testing.assert_close(plain[1], mixed[1])


def test_steps_embedding_trains(family: FamilySpec, directory: Path) -> None:
    network = family.load_network(directory, torch.float32).requires_grad_(True)
    latents, times, cond = inputs_for(family, directory, 2)
    cond = replace(cond, num_steps=torch.tensor([1, 4]))
    family.predict(network, latents, times, cond).square().mean().backward()
    gradient = network.get_parameter(family.steps_key).grad
    assert gradient is not None
    assert gradient.abs().sum(dim=1).nonzero().flatten().tolist() == [1, 4]


def test_copied_parts_and_network_are_the_whole_checkpoint(family: FamilySpec, directory: Path) -> None:
    folders = {path.name for path in directory.iterdir() if path.is_dir()}
    assert {*family.copied_parts, family.network_part} == folders


# --- SDXL ---


@pytest.fixture
def sdxl(tmp_path: Path) -> Path:
    return make_tiny_sdxl(tmp_path / "student")


def test_no_prompt_is_zeros_for_sdxl_unless_its_pipeline_says_otherwise(sdxl: Path) -> None:
    family = get_family("sdxl")
    cond = family.load_encoder(sdxl).unconditional()
    assert cond.pooled is not None
    assert cond.text.count_nonzero() == cond.pooled.count_nonzero() == 0
    index = sdxl / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
    encoder = family.load_encoder(sdxl)
    assert torch.equal(encoder.unconditional().text, encoder([""]).text)


def test_sdxl_is_told_the_pictures_size_in_pixels() -> None:
    from engines.families.sdxl import time_ids

    assert time_ids(torch.zeros(2, 4, 8, 16)).tolist() == [[64, 128, 0, 0, 64, 128]] * 2


def test_text_encoders_written_by_older_transformers_are_read(sdxl: Path) -> None:
    from safetensors.torch import save_file

    family = get_family("sdxl")
    before = family.load_encoder(sdxl)(["a red cube"])
    part = sdxl / "text_encoder"
    weights = {f"text_model.{name}": tensor for name, tensor in load_weights(part).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(weights, part / "model.safetensors")
    assert torch.equal(family.load_encoder(sdxl)(["a red cube"]).text, before.text)


def test_published_form_of_clips_tokenizer_is_read(sdxl: Path) -> None:
    family = get_family("sdxl")
    before = family.load_encoder(sdxl)(["A red  cube", ""])
    for name in ("tokenizer", "tokenizer_2"):
        path = sdxl / name / "tokenizer.json"
        model = json.loads(path.read_text())["model"]
        (sdxl / name / "vocab.json").write_text(json.dumps(model["vocab"]))
        (sdxl / name / "merges.txt").write_text("#version: 0.2\n")
        path.unlink()
    after = family.load_encoder(sdxl)(["A red  cube", ""])
    assert torch.equal(before.text, after.text)


def test_normalised_latents_are_decoded_as_the_pipeline_does(tmp_path: Path) -> None:
    config = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 2.0, 1.0, 0.7]}
    directory = make_tiny_sdxl(tmp_path, student=False, vae_config=config)
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(directory, dtype=torch.float32)
    latents = seeded_latents([0], (4, 8, 8))
    mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        image = pipeline.vae.decode(latents * std / 0.5 + mean).sample
        pixels = get_family("sdxl").load_decoder(directory)(latents)
    expected = pipeline.image_processor.postprocess(image, output_type="pt").permute(0, 2, 3, 1) * 255
    assert (pixels[:, 0] - expected).abs().max() <= 0.5 + 1e-3


def test_sdxl_without_a_pooled_caption_is_refused(sdxl: Path) -> None:
    family = get_family("sdxl")
    cond = Conditioning(torch.zeros(1, 16, 64), torch.ones(1, 16))
    with pytest.raises(ValueError, match="pooled"):
        family.predict(
            family.load_network(sdxl, torch.float32), torch.zeros(1, 4, 8, 8), torch.tensor([9]), cond
        )


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("unet/config.json", {"addition_embed_type": None}, "unet/config.json: addition_embed_type"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "unet/config.json: time_cond_proj_dim"),
        ("unet/config.json", {"cross_attention_dim": 48}, "cross_attention_dim is 48, .* 64 together"),
        ("unet/config.json", {"addition_time_embed_dim": 4}, "projection_class_embeddings_input_dim"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels is 16"),
        ("student.json", {"max_text_tokens": 77}, "max_text_tokens: 77, the text encoders take 16"),
        ("student.json", {"height": 60}, "height: 60 is not a multiple of 8"),
        ("student.json", {"frames": 9}, "frames: an image has one"),
    ],
)
def test_sdxl_parts_that_do_not_fit_are_refused_by_name(
    sdxl: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    edit(sdxl / file, **fields)
    with pytest.raises(CheckpointError, match=message):
        get_family("sdxl").stages(sdxl, read_student(sdxl))


# --- CogVideoX ---


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_cogvideox(tmp_path_factory.mktemp("cogvideox") / "student")


@pytest.mark.parametrize("num_frames", [1, 3, 5])
def test_video_is_decoded_in_the_same_chunks_as_by_diffusers(cogvideox: Path, num_frames: int) -> None:
    from engines.families.cogvideox import chunks

    pipeline: Any = CogVideoXPipeline.from_pretrained(cogvideox, dtype=torch.float32)
    latents = seeded_latents([1, 2], (num_frames, 4, 4, 4))
    with torch.no_grad():
        pixels = get_family("cogvideox").load_decoder(cogvideox)(latents)
        video = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), output_type="np")
    expected = (torch.as_tensor(video) * 255).round().to(torch.uint8)
    assert pixels.shape == (2, 4 * num_frames - 3, 32, 32, 3)
    assert torch.equal(pixels, expected)
    assert list(chunks(5)) == [(0, 3), (3, 5)]


def test_norms_of_the_decoder_mix_channels_at_the_latents_size(cogvideox: Path) -> None:
    from engines.families.spatial_norm import SpatialNorm

    kinds = [type(module).__name__ for module in get_family("cogvideox").load_decoder(cogvideox).modules()]
    assert kinds.count(SpatialNorm.__name__) > 0
    assert "CogVideoXSpatialNorm3D" not in kinds


def test_rotary_embeddings_are_those_of_the_pipeline(tmp_path: Path) -> None:
    directory = make_tiny_cogvideox(
        tmp_path, student=False, transformer_config={"use_rotary_positional_embeddings": True}
    )
    family = get_family("cogvideox")
    pipeline: Any = CogVideoXPipeline.from_pretrained(directory, dtype=torch.float32)
    latents, times, cond = inputs_for(family, directory, 2)
    rotary = pipeline._prepare_rotary_positional_embeddings(32, 32, 3, torch.device("cpu"))
    with torch.no_grad():
        expected = pipeline.transformer(latents, cond.text, times, image_rotary_emb=rotary).sample
        found = family.predict(family.load_network(directory, torch.float32), latents, times, cond)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("transformer/config.json", {"patch_size_t": 2}, "patch_size_t: CogVideoX 1.5 is not supported"),
        ("transformer/config.json", {"text_embed_dim": 8}, "text_embed_dim is 8, .* d_model is 32"),
        ("student.json", {"max_text_tokens": 19}, "max_text_tokens: 19, .* max_text_seq_length is 20"),
        ("student.json", {"frames": 13}, "frames: 13 is not 1 more than a multiple of 8"),
        ("student.json", {"width": 40}, "width: 40 is not a multiple of 16"),
    ],
)
def test_cogvideox_parts_that_do_not_fit_are_refused_by_name(
    cogvideox: Path, tmp_path: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    directory = shutil.copytree(cogvideox, tmp_path / "student")
    edit(directory / file, **fields)
    with pytest.raises(CheckpointError, match=message):
        get_family("cogvideox").stages(directory, read_student(directory))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_table_of_positions_has_the_dtype_of_the_weights(cogvideox: Path, dtype: torch.dtype) -> None:
    network = get_family("cogvideox").load_network(cogvideox, dtype)
    assert {tensor.dtype for tensor in (*network.parameters(), *network.buffers())} == {dtype}

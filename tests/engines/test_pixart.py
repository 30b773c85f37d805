"""Loading PixArt directories, what their stages compute, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from torch import Tensor

from engines.bundle.stages import StageSpec
from engines.compile.export import example_inputs, export_stage
from engines.errors import CheckpointError
from engines.families.checkpoint import check_safetensors, tensor_shapes, weight_files
from engines.families.pixart import (
    FAMILY,
    STEPS_EMBEDDING_KEY,
    StepAwareEmbeddings,
    load_transformer,
    make_step_aware,
)
from engines.families.student import read_student
from engines.families.tokenizer import PromptTokenizer, PromptTokenizers
from engines.families.weights import load_weights
from tests.engines.published_form import as_published, shard_variant
from tests.engines.tiny import (
    CLIP_TEXT_TOKENS,
    MAX_TEXT_TOKENS,
    make_tiny_checkpoint,
    make_tiny_sdxl,
    make_tokenizer,
)

# What tells the published PixArt-alpha-1024 from the demo, at a size that tests can afford.
REAL_PIXART = {
    "in_channels": 4,
    "out_channels": 8,  # noise and variance
    "sample_size": 128,  # micro-conditions
    "use_additional_conditions": True,
    "num_attention_heads": 3,  # the size embeddings take a third of the width each
    "attention_head_dim": 24,
    "cross_attention_dim": 72,
}


@pytest.fixture(scope="module")
def real_pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learned sigma, micro-conditions, epsilon, 4 latent channels; 1024 pixels in name, 64 in fact."""
    return make_tiny_checkpoint(
        tmp_path_factory.mktemp("real") / "student",
        transformer_config=REAL_PIXART,
        scheduler_config={"prediction_type": "epsilon"},
    )


def specs(student: Path) -> dict[str, StageSpec]:
    return {spec.name: spec for spec in FAMILY.stages(student, read_student(student))}


def run_stage(student: Path, name: str, *inputs: Tensor) -> Tensor:
    stage = FAMILY.load_stage(student, specs(student)[name], torch.float32)
    with torch.no_grad():
        output: Tensor = stage(*inputs)
    return output


def load_pipeline(directory: Path) -> Any:
    return PixArtAlphaPipeline.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def student(tiny_student: Path, tmp_path: Path) -> Path:
    """A student that may be damaged."""
    return shutil.copytree(tiny_student, tmp_path / "student")


@pytest.mark.parametrize("fixture", ["tiny_student", "real_pixart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_stage_gives_what_its_spec_says(
    fixture: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(fixture)
    for spec in specs(directory).values():
        with torch.no_grad():
            output = FAMILY.load_stage(directory, spec, dtype)(*example_inputs(spec, 3))
        (expected,) = spec.outputs
        assert tuple(output.shape) == (3, *expected.shape)
        assert str(output.dtype) == f"torch.{expected.dtype}"


def test_specs_are_read_off_the_configs(tiny_student: Path, real_pixart: Path) -> None:
    tiny, real = specs(tiny_student), specs(real_pixart)
    assert tiny["denoise"].outputs[0].shape == (16, 8, 8)
    assert real["denoise"].outputs[0].shape == (4, 8, 8)
    assert tiny["text"].outputs[0].shape == (MAX_TEXT_TOKENS, 32)
    assert tiny["decode"].outputs[0].shape == (64, 64, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_stages_agree_with_the_diffusers_pipeline(tmp_path: Path) -> None:
    teacher = make_tiny_checkpoint(tmp_path / "teacher", student=False)
    student = make_tiny_checkpoint(tmp_path / "student")
    pipeline = load_pipeline(teacher)
    prompt = "A red Cube left of "
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, max_sequence_length=MAX_TEXT_TOKENS
    )
    ids, our_mask = PromptTokenizers("pixart", student, MAX_TEXT_TOKENS)([prompt]).values()
    text = run_stage(student, "text", ids, our_mask)
    assert torch.equal(our_mask, mask.to(torch.int64))
    torch.testing.assert_close(text, embeds)

    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipeline.transformer(
            latents,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=torch.tensor([499]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    num_steps = torch.tensor([4])  # row 4 of the steps embedding is zero
    prediction = run_stage(student, "denoise", latents, torch.tensor([499]), text, our_mask, num_steps)
    torch.testing.assert_close(prediction, expected)

    pixels = run_stage(student, "decode", latents)[0].numpy()
    expected_pixels = pipeline.image_processor.postprocess(image, output_type="np")[0] * 255
    assert abs(pixels - expected_pixels).max() <= 0.5 + 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_learned_sigma_is_dropped_and_micro_conditions_are_the_pictures_size(real_pixart: Path) -> None:
    pipeline = load_pipeline(real_pixart)
    latents, timestep, text, mask, _ = example_inputs(specs(real_pixart)["denoise"], 2)
    with torch.no_grad():
        expected = pipeline.transformer(
            latents,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=timestep,
            added_cond_kwargs={
                "resolution": torch.tensor([[64.0, 64.0]] * 2),
                "aspect_ratio": torch.tensor([[1.0]] * 2),
            },
        ).sample.chunk(2, dim=1)[0]
    num_steps = torch.tensor([4, 4])
    prediction = run_stage(real_pixart, "denoise", latents, timestep, text, mask, num_steps)
    torch.testing.assert_close(prediction, expected)


def test_micro_conditions_leave_no_constant_in_the_exported_program(real_pixart: Path) -> None:
    spec = specs(real_pixart)["denoise"]
    stage = FAMILY.load_stage(real_pixart, spec, torch.float32)
    assert set(export_stage(stage, spec, min_batch=1, max_batch=2).constants) <= set(
        dict(stage.named_buffers())
    )


def test_number_of_steps_changes_the_prediction_row_by_row(tiny_student: Path) -> None:
    latents, timestep, text, mask, _ = example_inputs(specs(tiny_student)["denoise"], 1)

    def predict(*num_steps: int) -> Tensor:
        rows = len(num_steps)
        repeated = [tensor.expand(rows, *tensor.shape[1:]) for tensor in (latents, timestep, text, mask)]
        return run_stage(tiny_student, "denoise", *repeated, torch.tensor(num_steps))

    one, four = predict(1), predict(4)
    assert (one - four).abs().max() > 1e-3
    torch.testing.assert_close(predict(1, 4), torch.cat([one, four]))


def test_padding_tokens_do_not_reach_the_prediction(tiny_student: Path) -> None:
    latents, timestep, text, mask, num_steps = example_inputs(specs(tiny_student)["denoise"], 2)
    mask[:, 5:] = 0
    noisy = text.clone()
    noisy[:, 5:] += 10.0
    before = run_stage(tiny_student, "denoise", latents, timestep, text, mask, num_steps)
    after = run_stage(tiny_student, "denoise", latents, timestep, noisy, mask, num_steps)
    torch.testing.assert_close(before, after)


def test_making_a_transformer_step_aware_changes_nothing_at_first(tmp_path: Path) -> None:
    teacher = make_tiny_checkpoint(tmp_path / "teacher", student=False)
    transformer = load_transformer(teacher)
    names = set(transformer.state_dict())
    arguments = {
        "hidden_states": torch.randn(2, 16, 8, 8),
        "encoder_hidden_states": torch.randn(2, MAX_TEXT_TOKENS, 32),
        "timestep": torch.tensor([1, 999]),
    }
    conditions: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        before = transformer(**arguments, added_cond_kwargs=conditions).sample
        make_step_aware(transformer)
        make_step_aware(transformer)  # a second time is harmless
        conditions["num_steps"] = torch.tensor([1, 4])
        after = transformer(**arguments, added_cond_kwargs=conditions).sample
    assert isinstance(transformer.adaln_single.emb, StepAwareEmbeddings)
    assert set(transformer.state_dict()) - names == {STEPS_EMBEDDING_KEY}
    assert torch.equal(before, after)


def test_step_embedding_comes_back_from_disk(tiny_student: Path) -> None:
    transformer = load_transformer(tiny_student)
    rows = transformer.adaln_single.emb.steps_embedding.weight.abs().sum(dim=1)
    assert rows.count_nonzero() == 2
    assert rows[4] == 0


def test_teacher_is_refused_as_a_student(tmp_path: Path) -> None:
    teacher = make_tiny_checkpoint(tmp_path / "teacher", student=False)
    with pytest.raises(CheckpointError, match=r"^student\.json: missing .* distil"):
        read_student(teacher)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a/b"}, "field name"),
        ({"num_steps": []}, "field num_steps"),
        ({"timesteps": {"1": [999], "2": [499, 999], "4": [999, 749, 499, 249]}}, r"timesteps\.2"),
        ({"default_num_steps": 3}, "default_num_steps"),
        ({"solver": "dpm"}, "field solver"),
        ({"height": 60}, "field height: 60 is not a multiple of 16"),
    ],
)
def test_bad_field_of_a_student_is_refused_by_name(
    student: Path, fields: dict[str, Any], message: str
) -> None:
    path = student / "student.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(CheckpointError, match=message):
        specs(student)


def test_unknown_family_is_refused_by_name(student: Path) -> None:
    from engines.families.spec import get_family

    with pytest.raises(CheckpointError, match=r"field family.*'unet'"):
        get_family("unet")


def rename_to_pickle(part: Path) -> None:
    next(part.glob("*.safetensors")).rename(part / "diffusion_pytorch_model.bin")


def truncate(part: Path) -> None:
    path = next(part.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


def damage_header(part: Path) -> None:
    path = next(part.glob("*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"?" + data[9:])


def empty(part: Path) -> None:
    next(part.glob("*.safetensors")).write_bytes(b"")


def second_file(part: Path) -> None:
    shutil.copy(next(part.glob("*.safetensors")), part / "other.safetensors")


def index_to_nowhere(part: Path) -> None:
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))


def escaping_index(part: Path) -> None:
    weight_map = {"a": "../vae/diffusion_pytorch_model.safetensors"}
    (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def no_config(part: Path) -> None:
    (part / "config.json").unlink()


def foreign_config(part: Path) -> None:
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))


def other_size(part: Path) -> None:
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "num_layers": 3}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename_to_pickle, r"transformer/diffusion_pytorch_model\.bin: pickles"),
        (truncate, r"transformer/\S+\.safetensors: \d+ bytes on disk, its header promises \d+"),
        (damage_header, r"transformer/\S+\.safetensors: safetensors header is damaged"),
        (empty, r"transformer/\S+\.safetensors: not a safetensors file"),
        (second_file, "transformer: one safetensors file is expected"),
        (index_to_nowhere, r"transformer/gone\.safetensors: file is missing"),
        (escaping_index, "file is missing"),
        (no_config, r"transformer/config\.json: file is missing"),
        (foreign_config, r"transformer/config\.json: PixArtTransformer2DModel is expected"),
        (other_size, "transformer: no weight for transformer_blocks.2"),
        (shutil.rmtree, r"transformer/config\.json: file is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_part_is_refused_by_name(student: Path, damage: Any, message: str) -> None:
    damage(student / "transformer")
    with pytest.raises(CheckpointError, match=message):
        load_transformer(student)


def test_sharded_weights_are_read_whole(student: Path) -> None:
    from safetensors.torch import save_file

    part = student / "transformer"
    weights = load_weights(part)
    next(part.glob("*.safetensors")).unlink()
    names = sorted(weights)
    shards = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: weights[key] for key in keys}, part / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (part / "a.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load_weights(part).keys() == weights.keys()
    load_transformer(student)


@pytest.mark.parametrize("prompt", ["a red cube", "", "  Two  WORDS, nonsense ", "a cube " * 40])
def test_tokens_are_those_of_transformers(tiny_student: Path, prompt: str) -> None:
    expected = make_tokenizer()(
        prompt.lower().strip(), padding="max_length", truncation=True, max_length=MAX_TEXT_TOKENS
    )
    ids, mask = PromptTokenizers("pixart", tiny_student, MAX_TEXT_TOKENS)([prompt]).values()
    assert ids[0].tolist() == expected["input_ids"]
    assert mask[0].tolist() == expected["attention_mask"]


def test_tokenizer_without_its_file_is_refused(student: Path) -> None:
    (student / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer\.json: file is missing"):
        PromptTokenizer(student / "tokenizer", MAX_TEXT_TOKENS)


CUT = "the model reads 19 tokens of this prompt and not the rest: "


@pytest.mark.parametrize(
    ("prompt", "unheard"),
    [
        ("a red sphere", []),
        ("", []),
        (" A RED, round!! Sphere on a zebra and a Zebra ", ["the model does not know: round, zebra"]),
        (
            "a red cube and a zebra " * 5 + "behind a blue cone",
            [
                "the model does not know: zebra",
                CUT + "red cube and a zebra a red cube and a zebra behind a blue cone",
            ],
        ),
    ],
)
def test_what_of_a_prompt_is_not_heard_is_said(student: Path, prompt: str, unheard: list[str]) -> None:
    assert PromptTokenizers("pixart", student, MAX_TEXT_TOKENS).unheard(prompt) == unheard


def test_both_tokenizers_of_a_family_say_it_once(tmp_path: Path) -> None:
    student = make_tiny_sdxl(tmp_path / "sdxl")
    (said,) = PromptTokenizers("sdxl", student, CLIP_TEXT_TOKENS).unheard("x" * 20 + "YZ")
    assert said == CUT.replace("19", "14") + "xxxxxxYZ"


# The folders as they were published


def test_published_folder_gives_what_the_modern_one_gives(tiny_student: Path, student: Path) -> None:
    as_published(student)
    assert {path.name for path in (student / "transformer").glob("*-of-*")} == {
        f"diffusion_pytorch_model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)
    }
    names = check_safetensors(student / "vae" / "diffusion_pytorch_model.safetensors")
    assert {
        "decoder.mid_block.attentions.0.query.weight",
        "encoder.mid_block.attentions.0.proj_attn.bias",
    } < (names.keys())
    assert specs(student) == specs(tiny_student)
    for name, spec in specs(tiny_student).items():
        inputs = example_inputs(spec, 2)
        assert torch.equal(run_stage(student, name, *inputs), run_stage(tiny_student, name, *inputs))
    for part in ("transformer", "text_encoder", "vae"):
        assert tensor_shapes(student / part) == tensor_shapes(tiny_student / part)
    assert FAMILY.native_bucket(student) == FAMILY.native_bucket(tiny_student)


def test_weights_without_a_variant_come_before_those_of_one(student: Path) -> None:
    part = student / "transformer"
    shard_variant(part, "diffusion_pytorch_model")
    shards = weight_files(part)
    assert len(shards) == 2
    index = {"weight_map": {"a": "whole.safetensors"}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (part / "whole.safetensors").write_bytes(b"")
    assert weight_files(part) == [part / "whole.safetensors"]


def test_transformers_of_other_norms_are_refused(student: Path) -> None:
    config = as_published(student) / "transformer" / "config.json"
    config.write_text(config.read_text().replace("ada_norm_single", "ada_norm_zero"))
    with pytest.raises(CheckpointError, match="PixArtTransformer2DModel is expected, not Transformer2DModel"):
        load_transformer(student)

"""The models that are measured: published architectures with random weights, and shrunk ones for a CPU.

Neither time nor memory nor FLOPs depend on the weights' values, which are not public for few-step students of
these sizes. A checkpoint is written by diffusers itself, so that its own pipeline runs the same files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines.bundle.bucket import Bucket
from engines.families import published
from engines.families.spec import FAMILIES, get_family
from engines.families.student import STUDENT

NUM_STEPS = 4
TIMESTEPS = (999, 749, 499, 249)
WORDS = ("a", "red", "cube", "on", "the", "left", "of", "blue", "sphere", "at", "sunset", "moves", "right")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Configs of a model's parts.

    Attributes:
        bucket: what it draws.
        network, vae: `config.json` of the network and the autoencoder.
        text: of the text encoders, by folder.
        max_text_tokens: length of a prompt.
        batches: that are measured.
    """

    bucket: Bucket
    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Mapping[str, Any]]
    max_text_tokens: int
    batches: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One line of the benchmark."""

    name: str
    title: str
    family: str
    scheduler: Mapping[str, Any]
    full: Architecture
    toy: Architecture
    unit: str = field(default="images")

    def architecture(self, *, toy: bool) -> Architecture:
        """The published size, or the shrunk one."""
        return self.toy if toy else self.full


TOY_T5 = {
    **published.T5_XXL,
    "d_ff": 64,
    "d_kv": 8,
    "d_model": 32,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 64,
}
TOY_IMAGE_VAE = {
    **published.IMAGE_VAE,
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
TOY_VIDEO_VAE = {
    **published.VIDEO_VAE,
    "block_out_channels": [8, 8, 8, 8],
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 32,
    "sample_width": 32,
}
SDXL_VAE = {"scaling_factor": 0.13025, "force_upcast": True}


def _pixart(pixels: int, batches: tuple[int, ...]) -> Model:
    return Model(
        name=f"pixart-{pixels}",
        title=f"PixArt-alpha XL/2 {pixels}",
        family="pixart",
        scheduler=published.PIXART_SCHEDULER,
        full=Architecture(
            bucket=Bucket(pixels, pixels),
            network={**published.PIXART_NETWORK, "sample_size": pixels // 8},
            vae={**published.IMAGE_VAE, "sample_size": pixels},
            text={"text_encoder": published.T5_XXL},
            max_text_tokens=120,
            batches=batches,
        ),
        toy=Architecture(
            bucket=Bucket(64, 64),
            network={
                **published.PIXART_NETWORK,
                "attention_head_dim": 16,
                "caption_channels": 32,
                "cross_attention_dim": 48,
                "num_attention_heads": 3,
                "num_layers": 2,
                "sample_size": 8,
            },
            vae=TOY_IMAGE_VAE,
            text={"text_encoder": TOY_T5},
            max_text_tokens=20,
            batches=(1, 2),
        ),
    )


def _toy_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    return {**config, **sizes, "max_position_embeddings": 16, "projection_dim": 24, "vocab_size": 600}


MODELS = {
    model.name: model
    for model in (
        _pixart(512, (1, 2, 4, 8, 16, 32)),
        _pixart(1024, (1, 2, 4, 8)),
        Model(
            name="sdxl-1024",
            title="SDXL 1024",
            family="sdxl",
            scheduler=published.SDXL_SCHEDULER,
            full=Architecture(
                bucket=Bucket(1024, 1024),
                network=published.SDXL_NETWORK,
                vae={**published.IMAGE_VAE, **SDXL_VAE, "sample_size": 1024},
                text={"text_encoder": published.CLIP_L, "text_encoder_2": published.CLIP_BIGG},
                max_text_tokens=77,
                batches=(1, 2, 4, 8),
            ),
            toy=Architecture(
                bucket=Bucket(64, 64),
                network={
                    **published.SDXL_NETWORK,
                    "addition_time_embed_dim": 8,
                    "attention_head_dim": [1, 2, 4],
                    "block_out_channels": [32, 64, 64],
                    "cross_attention_dim": 64,
                    "layers_per_block": 1,
                    "norm_num_groups": 8,
                    "projection_class_embeddings_input_dim": 6 * 8 + 24,
                    "sample_size": 8,
                    "transformer_layers_per_block": [1, 1, 1],
                },
                vae={**TOY_IMAGE_VAE, **SDXL_VAE},
                text={
                    "text_encoder": _toy_clip(published.CLIP_L),
                    "text_encoder_2": _toy_clip(published.CLIP_BIGG),
                },
                max_text_tokens=16,
                batches=(1, 2),
            ),
        ),
        Model(
            name="cogvideox-2b",
            title="CogVideoX-2B 49x480x720",
            family="cogvideox",
            unit="videos",
            scheduler=published.COGVIDEOX_SCHEDULER,
            full=Architecture(
                bucket=Bucket(480, 720, 49),
                network=published.COGVIDEOX_NETWORK,
                vae=published.VIDEO_VAE,
                text={"text_encoder": published.T5_XXL},
                max_text_tokens=226,
                batches=(1, 2),
            ),
            toy=Architecture(
                bucket=Bucket(32, 32, 9),
                network={
                    **published.COGVIDEOX_NETWORK,
                    "attention_head_dim": 16,
                    "in_channels": 4,
                    "max_text_seq_length": 20,
                    "num_attention_heads": 2,
                    "num_layers": 2,
                    "out_channels": 4,
                    "sample_frames": 9,
                    "sample_height": 4,
                    "sample_width": 4,
                    "text_embed_dim": 32,
                    "time_embed_dim": 16,
                },
                vae=TOY_VIDEO_VAE,
                text={"text_encoder": TOY_T5},
                max_text_tokens=20,
                batches=(1,),
            ),
        ),
    )
}
"""By name."""


def make_parts(
    model: Model, *, toy: bool, device: torch.device | str, dtype: torch.dtype, seed: int = 0
) -> dict[str, nn.Module]:
    """The model's networks with the weights that their classes start training with.

    Args:
        model: which.
        toy: the shrunk size.
        device: where they are made; "meta" gives networks without memory.
        dtype: of their parameters.
        seed: of the weights.
    """
    import diffusers
    import transformers

    architecture = model.architecture(toy=toy)
    parts: dict[str, nn.Module] = {}
    torch.manual_seed(seed)
    with torch.device(device):
        for folder, config in architecture.text.items():
            if model.family == "sdxl":
                second = folder.endswith("_2")
                kind = transformers.CLIPTextModelWithProjection if second else transformers.CLIPTextModel
                parts[folder] = kind(transformers.CLIPTextConfig(**config, bos_token_id=0, eos_token_id=2))
            else:
                parts[folder] = transformers.T5EncoderModel(transformers.T5Config(**config))
        for folder, config in ((_network_part(model), architecture.network), ("vae", architecture.vae)):
            parts[folder] = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    # not the models' own `to`, which logs advice for users of pipelines
    return {
        folder: nn.Module.to(part, device, dtype).eval().requires_grad_(False)
        for folder, part in parts.items()
    }


def _network_part(model: Model) -> str:
    return "unet" if model.family == "sdxl" else "transformer"


def stage_modules(model: Model, parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The family's stages around `parts`."""
    from engines.families import cogvideox, image_vae, pixart, sdxl

    network: Any = parts[_network_part(model)]
    vae: Any = parts["vae"]
    if model.family == "sdxl":
        text: nn.Module = sdxl.TextStage(parts["text_encoder"], parts["text_encoder_2"])
        return {"text": text, "denoise": sdxl.DenoiseStage(network), "decode": image_vae.DecodeStage(vae)}
    if model.family == "cogvideox":
        return {
            "text": cogvideox.TextStage(parts["text_encoder"]),
            "denoise": cogvideox.DenoiseStage(network),
            "decode": cogvideox.DecodeStage(vae),
        }
    return {
        "text": pixart.TextStage(parts["text_encoder"]),
        "denoise": pixart.DenoiseStage(network),
        "decode": image_vae.DecodeStage(vae),
    }


def write_checkpoint(model: Model, directory: Path, *, toy: bool, device: torch.device | str) -> Path:
    """Write a student with random weights in bfloat16, unless it is there already.

    Returns:
        `directory`.
    """
    import diffusers

    if (directory / STUDENT).is_file():
        return directory
    scheduler_class = getattr(
        diffusers, "CogVideoXDDIMScheduler" if model.family == "cogvideox" else "DDIMScheduler"
    )
    settings = {name: value for name, value in model.scheduler.items() if not name.startswith("_")}
    scheduler = scheduler_class(**settings, timestep_spacing="trailing", clip_sample=False)
    parts = make_parts(model, toy=toy, device=device, dtype=torch.bfloat16)
    pipeline = getattr(diffusers, FAMILIES[model.family])(
        **parts, **_tokenizers(model, toy=toy), scheduler=scheduler
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    (directory / STUDENT).write_text(json.dumps(student(model, toy=toy), indent=2) + "\n", encoding="utf-8")
    return directory


def student(model: Model, *, toy: bool) -> dict[str, Any]:
    """`student.json` of a random network: it never went through a gate."""
    architecture = model.architecture(toy=toy)
    bucket = architecture.bucket
    return {
        "schema_version": 1,
        "name": f"{model.name}-random",
        "family": model.family,
        "kind": get_family(model.family).kind,
        "height": bucket.height,
        "width": bucket.width,
        "frames": bucket.frames,
        "num_steps": [NUM_STEPS],
        "default_num_steps": NUM_STEPS,
        "timesteps": {str(NUM_STEPS): list(TIMESTEPS)},
        "solver": "ddim",
        "guidance_scale": 1.0,
        "max_text_tokens": architecture.max_text_tokens,
    }


def _tokenizers(model: Model, *, toy: bool) -> dict[str, Any]:
    """Tokenizers that know a few words: what tokens say does not matter, only how many there are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    length = model.architecture(toy=toy).max_text_tokens
    if model.family == "sdxl":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        return {
            folder: CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=length)
            for folder, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!"))
        }
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
        model_input_names=["input_ids", "attention_mask"],
    )
    return {"tokenizer": fast}

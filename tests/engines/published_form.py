"""Rewrites parts of a modern diffusers folder the way that the published ones were written."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

FORMER_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def as_published(directory: Path) -> Path:
    """PixArt-alpha's folder as it was published, shards of its fp16 variant included; in place."""
    for index in (directory / "model_index.json", directory / "transformer" / "config.json"):
        index.write_text(index.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    config = directory / "transformer" / "config.json"
    # what the class of then had and today's does not know
    former = {"norm_type": "ada_norm_single", "only_cross_attention": False, "num_vector_embeds": None}
    config.write_text(json.dumps(json.loads(config.read_text()) | former))
    shard_variant(directory / "transformer", "diffusion_pytorch_model")
    shard_variant(directory / "text_encoder", "model")
    with_former_attention(directory / "vae")
    return directory


def shard_variant(part: Path, stem: str) -> None:
    """Two shards of the variant fp16 instead of the one file, named as diffusers names them; in place."""
    file = part / f"{stem}.safetensors"
    weights = load_file(file)
    file.unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, keys in ((1, names[::2]), (2, names[1::2])):
        shard = f"{stem}.fp16-{number:05}-of-00002.safetensors"
        save_file({key: weights[key] for key in keys}, part / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(keys, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (part / f"{stem}.safetensors.index.fp16.json").write_text(json.dumps(index))


def with_former_attention(part: Path) -> None:
    """An autoencoder's attention under the names that it had before diffusers 0.17; in place."""
    file = part / "diffusion_pytorch_model.safetensors"
    renamed = {_former_name(name): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})


def _former_name(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    for now, then in FORMER_NAMES.items():
        if ".attentions." in layer and layer.endswith(f".{now}"):
            return f"{layer.removesuffix(now)}{then}.{kind}"
    return name

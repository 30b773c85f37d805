"""Low-rank adapters (LoRA, arXiv:2106.09685) in one safetensors file: read as people share them, and merged.

A layer's weight W becomes W + scale (alpha / rank) B A. Tensors show the rank. Alpha is found, in this order,
in the file (`.alpha`, kohya's way), in its header (diffusers' way), or in `adapter_config.json` beside it
(peft's way); a file that says nothing means alpha = rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engines.errors import CheckpointError
from engines.families.checkpoint import check_safetensors, read_json

PREFIXES = ("base_model.model.", "transformer.", "unet.", "diffusion_model.")
KOHYA = "lora_unet_"
ADAPTER_CONFIG = "adapter_config.json"
HEADER_CONFIG = "lora_adapter_metadata"

_FACTOR = re.compile(
    r"^(?P<layer>.+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.[A-Za-z_]\w*)?\.weight"
    r"|\.lora_(?P<kohya>down|up)\.weight"
    r"|\.lora(?:_linear_layer)?\.(?P<old>down|up)\.weight"
    r"|(?P<processor>\.processor\.to_(?:q|k|v|out)_lora)\.(?P<oldest>down|up)\.weight"
    r"|\.(?P<alpha>alpha))$"
)
_DOWN = {"A", "down"}
_OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_embedding_": "embedding adapters",
    "lora_mid": "Tucker-decomposed LoRA",
}


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """The adapter of one layer.

    Attributes:
        down: A, (rank, in) or (rank, in, kh, kw).
        up: B, (out, rank) or (out, rank, 1, 1).
        alpha: None where the file does not say.
    """

    down: Tensor
    up: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class Lora:
    """Adapters by the layers' names in the file, the usual prefixes taken off.

    Attributes:
        rank_stabilised: alpha is divided by the root of the rank (arXiv:2312.03732), not by the rank.
    """

    layers: Mapping[str, LoraLayer]
    rank_stabilised: bool = False

    def scaling(self, layer: LoraLayer) -> float:
        """What B A of a layer is multiplied with."""
        alpha = layer.rank if layer.alpha is None else layer.alpha
        return float(alpha / (layer.rank**0.5 if self.rank_stabilised else layer.rank))


def read_lora(file: Path) -> Lora:
    """Read a LoRA as peft, diffusers or kohya's scripts write it.

    Raises:
        CheckpointError: the file is missing, is no safetensors, holds something else than the LoRA of one
            network, or a layer of it lacks a factor.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file.name}: a .safetensors file is expected; others can run code")
    header = check_safetensors(file)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file.name}: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, part = _parse(key, file.name)
        factors.setdefault(layer, {})[part] = tensor
    config = _config(file, header)
    layers = {}
    for name, parts in factors.items():
        if not {"down", "up"} <= parts.keys():
            missing = "A" if "down" not in parts else "B"
            raise CheckpointError(f"{file.name}: layer {name} has no factor {missing}")
        down, up = parts["down"], parts["up"]
        if down.shape[0] != up.shape[1]:
            raise CheckpointError(
                f"{file.name}: layer {name} has rank {down.shape[0]} in A, {up.shape[1]} in B"
            )
        alpha = float(parts["alpha"]) if "alpha" in parts else _alpha_of(name, config)
        layers[name] = LoraLayer(down, up, alpha)
    if not layers:
        raise CheckpointError(f"{file.name}: no LoRA in it")
    return Lora(layers, rank_stabilised=bool(config.get("use_rslora", False)))


def merge_lora(weights: Mapping[str, Tensor], lora: Lora, scale: float = 1.0) -> dict[str, Tensor]:
    """Add a LoRA to a network's weights.

    Args:
        weights: by name, `LAYER.weight` for each layer; those without adapter are passed on as they are.
        scale: of the whole LoRA.
    Returns:
        New weights in the dtypes of the old, products and sums in float32.
    Raises:
        CheckpointError: the network has no such layer, or one of another shape.
    """
    layers = _find_layers(weights, lora.layers)
    merged = dict(weights)
    for name, layer in lora.layers.items():
        key = f"{layers[name]}.weight"
        base = weights[key]
        product = layer.up.float().flatten(1) @ layer.down.float().flatten(1)
        if product.numel() != base.numel() or layer.up.shape[0] != base.shape[0]:
            shape = (layer.up.shape[0], *layer.down.shape[1:])
            raise CheckpointError(f"LoRA: layer {name} is {shape}, the network's {tuple(base.shape)}")
        merged[key] = (base.float() + scale * lora.scaling(layer) * product.view(base.shape)).to(base.dtype)
    return merged


def _parse(key: str, file: str) -> tuple[str, str]:
    """Layer and part ("down", "up" or "alpha") of a tensor of the file."""
    for mark, kind in _OTHER_KINDS.items():
        if mark in key:
            raise CheckpointError(f"{file}: tensor {key}: {kind} is not supported, plain LoRA is")
    if key.startswith(("text_encoder", "lora_te")):
        raise CheckpointError(f"{file}: tensor {key}: adapters of text encoders are not supported")
    found = _FACTOR.match(key)
    if found is None:
        raise CheckpointError(
            f"{file}: tensor {key} is no part of a LoRA that peft, diffusers or kohya write"
        )
    layer = found["layer"]
    for prefix in PREFIXES:
        layer = layer.removeprefix(prefix)
    if found["processor"]:  # diffusers before peft: attn1.processor.to_out_lora for attn1.to_out.0
        projection = found["processor"].removeprefix(".processor.").removesuffix("_lora")
        layer += f".{projection}.0" if projection == "to_out" else f".{projection}"
    if found["alpha"]:
        return layer, "alpha"
    side = found["peft"] or found["kohya"] or found["old"] or found["oldest"]
    return layer, "down" if side in _DOWN else "up"


def _config(file: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the adapter, as peft names them; empty where nobody wrote them down."""
    stored = header.get("__metadata__", {}).get(HEADER_CONFIG)
    if stored is not None:
        try:
            values = json.loads(stored)
            return {
                str(key).removeprefix("transformer.").removeprefix("unet."): value
                for key, value in values.items()
            }
        except (ValueError, AttributeError):
            raise CheckpointError(f"{file.name}: header field {HEADER_CONFIG} is damaged") from None
    beside = file.with_name(ADAPTER_CONFIG)
    return read_json(beside) if beside.is_file() else {}


def _alpha_of(layer: str, config: Mapping[str, Any]) -> float | None:
    """Alpha of a layer by peft's config, whose patterns are ends of layers' names or regular expressions."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(alpha)
    alpha = config.get("lora_alpha")
    return None if alpha is None else float(alpha)


def _find_layers(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    """The network's layer for each name: the same, or for kohya's the one that is spelt with underscores."""
    layers = {key.removesuffix(".weight") for key in weights if key.endswith(".weight")}
    spelt: dict[str, str] = {}
    found = {}
    for name in names:
        if name in layers:
            found[name] = name
            continue
        spelt = spelt or {KOHYA + layer.replace(".", "_"): layer for layer in layers}
        if name not in spelt:
            raise CheckpointError(
                f"LoRA: the network has no layer {name}; it was made for another model, or is named as the "
                "original code names its layers and has to be converted first"
            )
        found[name] = spelt[name]
    return found


def ranks(lora: Lora) -> list[int]:
    """All ranks that occur, sorted."""
    return sorted({layer.rank for layer in lora.layers.values()})

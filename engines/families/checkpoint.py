"""One part of a diffusers directory on disk: its config, its safetensors files, what is refused. No torch.

Only safetensors are read. A `.bin`, `.pt` or `.ckpt` file is a pickle, which runs code when it is loaded.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_FORMER_CLASSES = {("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel"}
"""Classes that diffusers split by their `norm_type`, and what those parts are called since."""

_FORMER_ATTENTION = re.compile(r"(.*\battentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)")
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of an autoencoder's attention, as diffusers before 0.17 wrote them and as they are called since."""


def current_name(stored: str) -> str:
    """What today's modules call a tensor that a file of an older diffusers has under the name `stored`."""
    match = _FORMER_ATTENTION.fullmatch(stored)
    return f"{match[1]}{_ATTENTION[match[2]]}.{match[3]}" if match else stored


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent.name}/{path.name}: file is missing from {path.parent}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path.parent.name}/{path.name}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path.parent.name}/{path.name}: a JSON object is expected, not {type(value).__name__}"
        )
    return value


def read_config(part: Path) -> dict[str, Any]:
    """Read `part/config.json`, the constructor arguments of a diffusers or transformers model."""
    return read_json(part / "config.json")


def read_part_config(part: Path, expected: str) -> dict[str, Any]:
    """Read `part/config.json` and check that it describes the class `expected`, by its name or a former one.

    Raises:
        CheckpointError: the part is missing, or is of another class.
    """
    config = read_config(part)
    names = [config.get("_class_name"), *config.get("architectures", ())]
    if (former := _FORMER_CLASSES.get((str(names[0]), str(config.get("norm_type"))))) is not None:
        names.append(former)
    if expected not in names:
        found = next((name for name in names if name), None)
        raise CheckpointError(f"{part.name}/config.json: {expected} is expected, not {found}")
    return config


def weight_files(part: Path) -> list[Path]:
    """The safetensors files of one part: one file, or the shards that an index names.

    Of an index and one of a variant, `*.safetensors.index.fp16.json`, it is the first, as diffusers has it.

    Raises:
        CheckpointError: there are none, a shard is missing, several unrelated files could be meant, or the
            weights are pickles.
    """
    index = next(iter(index_files(part)), None)
    if index is not None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{part.name}/{index.name}: field weight_map is missing or empty")
        files = [part / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(part.glob("*.safetensors"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise CheckpointError(f"{part.name}: one safetensors file is expected, found {names}")
    if not files:
        pickles = [file.name for file in sorted(part.glob("*")) if file.suffix in PICKLE_SUFFIXES]
        if pickles:
            raise CheckpointError(
                f"{part.name}/{pickles[0]}: pickles can run code and are refused; convert to safetensors"
            )
        raise CheckpointError(f"{part.name}: no .safetensors file in {part}")
    for file in files:
        if file.parent != part or not file.is_file():
            raise CheckpointError(f"{part.name}/{file.name}: file is missing from {part}")
    return files


def index_files(part: Path) -> list[Path]:
    """The files that say in which shard a tensor lies; those of variants, such as fp16, come last."""
    variants = sorted(part.glob("*.safetensors.index.*.json"))
    return [*sorted(part.glob("*.safetensors.index.json")), *variants]


def check_safetensors(file: Path) -> dict[str, Any]:
    """Compare the size that a safetensors header promises with the size on disk, without reading the tensors.

    Returns:
        The header: dtype, shape and data_offsets by tensor name, and perhaps `__metadata__`.

    Raises:
        CheckpointError: the header is damaged, or the file is shorter or longer than it says.
    """
    name = f"{file.parent.name}/{file.name}"
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < header_bytes <= size_bytes - 8:
            raise CheckpointError(f"{name}: not a safetensors file, or cut off inside its header")
        try:
            header = json.loads(stream.read(header_bytes))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise CheckpointError(f"{name}: safetensors header is damaged") from None
    expected_bytes = 8 + header_bytes + max(ends, default=0)
    if size_bytes != expected_bytes:
        raise CheckpointError(f"{name}: {size_bytes} bytes on disk, its header promises {expected_bytes}")
    return dict(header)


def tensor_shapes(part: Path) -> dict[str, list[int]]:
    """Shape of every tensor of one part by its `current_name`, from the headers alone.

    Raises:
        CheckpointError: as `weight_files` and `check_safetensors`.
    """
    headers = (check_safetensors(file) for file in weight_files(part))
    return {
        current_name(name): entry["shape"]
        for header in headers
        for name, entry in header.items()
        if name != "__metadata__"
    }

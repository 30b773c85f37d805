"""Spaces that a gate compares pictures in when there is no judge, and scores of how they fit their prompts.

Networks come from local directories in the format of transformers, weights in safetensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engines.errors import CheckpointError, ConfigError
from engines.families.checkpoint import check_safetensors, read_config, read_json, weight_files

PIXELS, VAE = "pixels", "vae"
GRID = 16
"""Height and width that pictures are averaged down to for the features that need no network."""
VAE_GRID = 8
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Features = Callable[[Tensor], Tensor]
"""(N, H, W, 3) images or (N, F, H, W, 3) videos, uint8, to (N, D) fp32."""


def make_features(
    name: str, encode: Callable[[Tensor], Tensor], *, batch: int, device: torch.device | str = "cpu"
) -> Features:
    """The feature space of that name.

    Distances are taken along its principal axes, see `frechet.Reference`.

    Args:
        name: "pixels", averaged down; "vae", latents averaged down; or a directory of an image network.
        encode: pictures to latents, for "vae".
        batch: pictures that are looked at together.
        device: of the network.

    Raises:
        CheckpointError: the directory holds no image network that can be used.
        ConfigError: it is neither a known name nor a directory.
    """
    if name == PIXELS:
        look: Features = pixel_features
    elif name == VAE:

        def look(pictures: Tensor) -> Tensor:
            return latent_features(encode(pictures))
    else:
        look = NetworkFeatures(Path(name), device=device)
    return lambda pictures: torch.cat([look(part) for part in pictures.split(batch)])


def check_features(name: str) -> None:
    """Refuse a feature space that does not exist, before anything is loaded.

    Raises:
        ConfigError: it is neither a known name nor a directory.
    """
    if name not in (PIXELS, VAE) and not Path(name).is_dir():
        raise ConfigError(
            f"features: {PIXELS}, {VAE} or an image network's directory is expected; {name} is none"
        )


def key_frames(pictures: Tensor) -> Tensor:
    """First, middle and last frame of videos, (N, 3, H, W, 3); of images the image, (N, 1, H, W, 3)."""
    if pictures.ndim == 4:
        return pictures[:, None]
    return pictures[:, [0, pictures.shape[1] // 2, -1]]


def pixel_features(pictures: Tensor) -> Tensor:
    """Colours of a 16 x 16 grid, of videos in three frames, in [-1, 1]."""
    frames = key_frames(pictures)
    small = functional.adaptive_avg_pool2d(to_unit(frames.flatten(0, 1)) * 2 - 1, GRID)
    return _beside(small, len(frames))


def latent_features(latents: Tensor) -> Tensor:
    """Latents (N, C, h, w) or (N, F, C, h, w) of an 8 x 8 grid, of videos in at most three frames."""
    frames = latents[:, None] if latents.ndim == 4 else latents
    frames = frames[:, sorted({0, frames.shape[1] // 2, frames.shape[1] - 1})].float()
    small = functional.adaptive_avg_pool2d(frames.flatten(0, 1), VAE_GRID)
    return _beside(small, len(frames))


def _beside(frames: Tensor, num: int) -> Tensor:
    """Features of every frame, (num * F, ...), as one row per video, (num, D)."""
    return frames.reshape(num, -1)


def to_unit(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) fp32 in [0, 1]."""
    return images.permute(0, 3, 1, 2).float() / 255


class Preprocess:
    """What an image network is shown: the middle square, resized and normalised.

    Args:
        directory: its `preprocessor_config.json`, if there, says mean, standard deviation and size.
        size: if it does not say.
        mean, std: if it does not say.
    """

    def __init__(
        self,
        directory: Path,
        size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        path = directory / "preprocessor_config.json"
        config = read_json(path) if path.is_file() else {}
        found = config.get("crop_size") or config.get("size") or size
        if isinstance(found, dict):
            found = found.get("height") or found.get("shortest_edge") or size
        self.size = int(found)
        self.mean = torch.tensor(config.get("image_mean") or mean).view(1, 3, 1, 1)
        self.std = torch.tensor(config.get("image_std") or std).view(1, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 to (B, 3, size, size) fp32."""
        edge = min(images.shape[1:3])
        top, left = (images.shape[1] - edge) // 2, (images.shape[2] - edge) // 2
        square = to_unit(images[:, top : top + edge, left : left + edge])
        resized = functional.interpolate(
            square, size=(self.size, self.size), mode="bicubic", antialias=True, align_corners=False
        )
        return (resized.clamp(0, 1) - self.mean) / self.std


class NetworkFeatures:
    """What an image network of transformers says of whole pictures: CLIP, DINO, ViT, ResNet and the like.

    Of CLIP the projected image embedding is taken, of others the pooled output or the class token; of videos
    those of three frames beside each other.

    Raises:
        CheckpointError: the directory holds no image network, or no safetensors that fit it.
    """

    def __init__(self, directory: Path, *, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel

        self.device = device
        self.network = load_network(directory, AutoModel).to(device)
        if getattr(self.network, "main_input_name", None) != "pixel_values" and not _has_image_half(
            self.network
        ):
            raise CheckpointError(
                f"{directory}: {type(self.network).__name__} does not look at pictures; a network like "
                "CLIP or DINOv2 is expected"
            )
        config = self.network.config
        vision = getattr(config, "vision_config", config)
        self.preprocess = Preprocess(directory, int(getattr(vision, "image_size", 224) or 224))

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        frames = key_frames(pictures)
        shown = self.preprocess(frames.flatten(0, 1)).to(self.device)
        return _beside(self._look(shown).float().cpu(), len(frames))

    def _look(self, shown: Tensor) -> Tensor:
        if _has_image_half(self.network):
            return _embedding(self.network.get_image_features(pixel_values=shown))
        out = self.network(pixel_values=shown)
        pooled = getattr(out, "pooler_output", None)
        found: Tensor = out.last_hidden_state[:, 0] if pooled is None else pooled
        return found


class ClipScore:
    """How well pictures fit their prompts, as a CLIP sees it: 100 times the cosine of their embeddings.

    Source: Hessel et al., "CLIPScore", arXiv:2104.08718, there 2.5 max(cos, 0). With the weights of HPSv2 in
    CLIP's architecture it is HPSv2's preference (Wu et al., arXiv:2306.09341), which is that cosine. Of a
    video, the mean over three frames.

    Args:
        directory: of a CLIPModel with tokenizer.

    Raises:
        CheckpointError: it is none, or its weights are no safetensors.
    """

    def __init__(self, directory: Path, *, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel

        architectures = _read_model_config(directory).get("architectures") or []
        if architectures != ["CLIPModel"]:
            found = ", ".join(map(str, architectures)) or "nothing"
            raise CheckpointError(f"{directory}: config.json: CLIPModel is expected, not {found}")
        self.device = device
        self.network = load_network(directory, CLIPModel).to(device)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{directory}: its tokenizer cannot be read ({_line(error)})") from None
        config = self.network.config
        self.max_tokens = int(config.text_config.max_position_embeddings)
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        self.preprocess = Preprocess(directory, int(config.vision_config.image_size), mean, std)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str], *, batch: int = 64) -> Tensor:
        """Score (N, H, W, 3) images or (N, F, H, W, 3) videos against their prompts, (N,)."""
        scores = []
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            frames = key_frames(pictures[rows])
            shown = self.preprocess(frames.flatten(0, 1)).to(self.device)
            images = _embedding(self.network.get_image_features(pixel_values=shown))
            tokens = self.tokenizer(
                list(prompts[rows]),
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.device)
            said = _embedding(
                self.network.get_text_features(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                )
            )
            each = images.unflatten(0, (len(frames), -1))
            scores.append(
                100 * functional.cosine_similarity(each, said[:, None], dim=-1).mean(1).float().cpu()
            )
        return torch.cat(scores)


def load_network(directory: Path, kind: Any) -> Any:  # transformers' Auto classes have no common type
    """Load a network of transformers in fp32, in eval mode, every weight from its safetensors.

    Args:
        kind: the class, or Auto class, that loads it.

    Raises:
        CheckpointError: there is no such directory, it holds pickles or nothing, or tensors are missing or of
            other shapes.
    """
    _read_model_config(directory)
    for file in weight_files(directory):
        check_safetensors(file)
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # a missing weight is an error here, not a warning
    logging.disable_progress_bar()
    try:
        network, info = kind.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: cannot be loaded ({_line(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            raise CheckpointError(f"{directory}: {problem.replace('_', ' ')}: {min(map(str, info[problem]))}")
    assert isinstance(network, nn.Module)
    return network.eval()


def _read_model_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    config = read_config(directory)
    if "model_type" not in config:
        raise CheckpointError(f"{directory}: config.json: no model_type; it is not a network of transformers")
    return config


def _has_image_half(network: Any) -> bool:
    return hasattr(network, "get_image_features") and hasattr(network.config, "vision_config")


def _embedding(out: Any) -> Tensor:
    """The projected embedding: some versions of transformers return it bare, others inside an output."""
    found: Tensor = out if isinstance(out, Tensor) else out.pooler_output
    return found


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

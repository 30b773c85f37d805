"""The studio's text encoder, and how it learns to read before any picture is drawn.

A diffusion model learns from its own loss which adjective belongs to which noun, but slowly: of everything
that the loss asks for, binding is the smallest part. Captions are free, so the encoder first learns to say
back what they ask for; published models begin with a T5 that has read the web.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5EncoderModel

from engines.demo.fit import FitConfig, autocast, fit
from engines.demo.scenes import COLOURS, SHAPES, SIZES
from engines.demo.studio.captions import caption, make_tokenizer, scene_said_by
from engines.demo.studio.scenes import (
    ARRANGEMENTS,
    GROUNDS,
    LOOSE,
    MATERIALS,
    MAX_OBJECTS,
    SKIES,
    VIEWS,
    Scene,
    sample_scenes,
)
from engines.demo.text import D_MODEL, tokenize
from engines.demo.text import make_text_encoder as make_encoder

TRAIN_TOKENS = 40
"""The longest caption has fewer; the tokenizer's own limit leaves room for what people add."""
PARTLY_SAID = 0.7
"""Share of captions in which attributes are left unsaid."""

_UNSAID = ("",)
_OF_SCENE: tuple[tuple[str, ...], ...] = (
    tuple(place for places in ARRANGEMENTS.values() for place in places) + tuple(LOOSE) + _UNSAID,
    GROUNDS + _UNSAID,
    SKIES + _UNSAID,
    VIEWS + _UNSAID,
)
_OF_SOLID: tuple[tuple[str, ...], ...] = (
    SHAPES + _UNSAID,  # unsaid: there is no such solid
    tuple(COLOURS) + _UNSAID,
    SIZES + _UNSAID,
    MATERIALS + _UNSAID,
)


def make_text_encoder() -> T5EncoderModel:
    """An untrained one, of the size that the smaller demo has."""
    return make_encoder(vocab_size=96)


def said_in(scenes: Sequence[Scene], rng: np.random.Generator) -> list[str]:
    """One caption of each, attributes left unsaid in `PARTLY_SAID` of them."""
    return [caption(scene.partly_said(rng) if rng.random() < PARTLY_SAID else scene, rng) for scene in scenes]


def ids_of(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, both (B, TRAIN_TOKENS) int64."""
    return tokenize(make_tokenizer(), captions, TRAIN_TOKENS)


def asked_of(scene: Scene) -> list[int]:
    """Numbers of what a caption asks for: of the scene, then of each of three solids."""
    said = (scene.place, scene.ground, scene.sky, scene.view)
    row = [values.index(value or "") for values, value in zip(_OF_SCENE, said, strict=True)]
    for slot in range(MAX_OBJECTS):
        parts: tuple[str | None, ...] = (None,) * len(_OF_SOLID)
        if slot < scene.num_objects:
            solid = scene.solids[slot]
            parts = (solid.shape, solid.colour, solid.size, solid.material)
        row += [values.index(part or "") for values, part in zip(_OF_SOLID, parts, strict=True)]
    return row


class CaptionReader(nn.Module):
    """Four questions to a text encoder's output: what scene is asked for, and what the three solids are."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = nn.Parameter(torch.randn(1 + MAX_OBJECTS, D_MODEL) * 0.2)
        self.attention = nn.MultiheadAttention(D_MODEL, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, 256), nn.GELU(), nn.Linear(256, D_MODEL)
        )
        self.of_scene = nn.Linear(D_MODEL, sum(map(len, _OF_SCENE)))
        self.of_solid = nn.Linear(D_MODEL, sum(map(len, _OF_SOLID)))

    def forward(self, text: Tensor, mask: Tensor) -> list[Tensor]:
        """(B, T, D_MODEL) and (B, T) to logits (B, n) of every number of `asked_of`."""
        questions = self.questions.expand(len(text), -1, -1)
        found, _ = self.attention(questions, text, text, key_padding_mask=mask == 0, need_weights=False)
        found = found + self.mlp(found)
        logits = [*self.of_scene(found[:, 0]).split([*map(len, _OF_SCENE)], dim=1)]
        for slot in range(MAX_OBJECTS):
            logits += self.of_solid(found[:, 1 + slot]).split([*map(len, _OF_SOLID)], dim=1)
        return logits


def captions_to_read(num: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, masks (num, TRAIN_TOKENS) and numbers (num, 16) of random captions without held-out pairs."""
    rng = np.random.default_rng([seed, 5])
    shares = (0.25, 0.4, 0.35)
    scenes = [
        scene
        for number, share in zip(range(1, MAX_OBJECTS + 1), shares, strict=True)
        for scene in sample_scenes(round(num * share), seed, num_objects=number, split="train")
    ]
    captions = said_in(scenes, rng)
    asked = [scene_said_by(said) for said in captions]
    return *ids_of(captions), torch.tensor([asked_of(scene) for scene in asked if scene is not None])


def train_text(
    config: FitConfig, directory: Path, *, num: int = 24_000, batch: int = 128, begin: Path | None = None
) -> T5EncoderModel:
    """Teach a text encoder to read captions; the questions are thrown away. `begin` as of `fit`."""
    torch.manual_seed(config.seed)
    encoder, reader = make_text_encoder(), CaptionReader()
    ids, masks, asked = captions_to_read(num, config.seed)

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(asked), (batch,), generator=rng)
        mask = masks[rows].to(config.device)
        with autocast(config.device):
            text = encoder(ids[rows].to(config.device), attention_mask=mask).last_hidden_state
        total = torch.zeros((), device=config.device)
        for logits, target in zip(reader(text.float(), mask), asked[rows].unbind(1), strict=True):
            total = total + functional.cross_entropy(logits, target.to(config.device))
        return total

    fit("text", {"encoder": encoder, "reader": reader}, loss, config, directory, begin=begin)
    return encoder.eval()

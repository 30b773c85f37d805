"""A domain that is not the project's: plain colours, and a judge that says which one it sees."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engines.gate.domain import PromptSet

SIZE = 64
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


@dataclass(frozen=True)
class Asked:
    """One colour."""

    name: str

    def shown_by(self, seen: str, /) -> bool:
        return seen == self.name


class ColourJudge:
    """Names the colour that a picture's mean is nearest to; its features are three channels."""

    def __init__(self, colours: Mapping[str, Sequence[int]]) -> None:
        self.names = list(colours)
        self.values = torch.tensor(list(colours.values())).float()

    def read(self, images: Tensor, *, batch: int = 250) -> list[str]:
        distances = torch.cdist(self.features(images, batch=batch), self.values)
        return [self.names[index] for index in distances.argmin(1).tolist()]

    def features(self, images: Tensor, *, batch: int = 250) -> Tensor:
        del batch
        return images.float().flatten(1, -2).mean(1)


class Colours:
    """See `engines.gate.domain.Domain`."""

    groups: Mapping[str, str] = {"plain": "plain colours"}
    judge_file = Path("colours.json")

    def load_judge(self, path: Path, /) -> ColourJudge:
        return ColourJudge(json.loads(path.read_text()))

    def counts(self, num: int, /) -> dict[str, int]:
        return {"plain": num}

    def prompts(self, seed: int, num: int) -> PromptSet:
        drawn = np.random.default_rng(seed).choice(list(COLOURS), num).tolist()
        return PromptSet(drawn, ["plain"] * num, seed, [Asked(name) for name in drawn], drawn)

    def asked_by(self, caption: str, /) -> Asked | None:
        return Asked(caption) if caption in COLOURS else None

    def render(self, prompts: PromptSet) -> Tensor:
        rng = torch.Generator().manual_seed(prompts.seed)
        flat = torch.tensor([COLOURS[name] for name in prompts.scenes])[:, None, None]
        noise = torch.randint(-20, 20, (len(flat), SIZE, SIZE, 3), generator=rng)
        shade = torch.randint(-15, 15, (len(flat), 1, 1, 3), generator=rng)
        return (flat + noise + shade).clamp(0, 255).to(torch.uint8)

    def render_again(self, prompts: PromptSet, copies: int) -> Tensor:
        rows = [row for row in range(len(prompts.captions)) for _ in range(copies)]
        return self.render(prompts.take(rows))


DOMAIN = DOMAIN_TOO = Colours()
EMPTY = object()

"""What a gate asks for and what answers it: domains of pictures, their judges, and prompts from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class Judge(Protocol):
    """Says what pictures show, and gives the features that distances are taken between.

    Pictures are (N, H, W, 3) images or (N, F, H, W, 3) videos, uint8.
    """

    def read(self, images: Tensor, *, batch: int = 250) -> Sequence[Any]:
        """What each picture shows, N answers; a prompt of the domain knows whether it is what was asked."""
        ...

    def features(self, images: Tensor, *, batch: int = 250) -> Tensor:
        """(N, D) fp32."""
        ...


class Asked(Protocol):
    """What a prompt says, as the judge of its domain would say it."""

    def shown_by(self, seen: Any, /) -> bool:
        """Whether a picture in which a judge has read `seen` shows all of it."""
        ...


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one seed.

    Attributes:
        captions: what samplers are told.
        groups: which kind each is; empty if there are no kinds.
        seed: they were drawn with.
        asked: what the captions say, each an `Asked`, and `scenes` whatever a domain renders for each; both
            empty for prompts from a file, which nobody can render.
    """

    captions: list[str]
    groups: list[str]
    seed: int
    asked: list[Any]
    scenes: list[Any]

    def take(self, rows: Sequence[int]) -> PromptSet:
        """Some of them, in this order."""

        def of(values: list[Any]) -> list[Any]:
            return [values[row] for row in rows] if values else []

        return PromptSet(of(self.captions), of(self.groups), self.seed, of(self.asked), of(self.scenes))


class Domain(Protocol):
    """Pictures of one kind: prompts for them can be drawn and rendered, and a judge reads them.

    `engines.domains` finds them by name.
    """

    @property
    def groups(self) -> Mapping[str, str]:
        """Kinds of prompts, and what the table calls them; the first is the one a student must keep."""
        ...

    @property
    def judge_file(self) -> Path:
        """Weights of the judge that comes with it."""
        ...

    def load_judge(self, path: Path, /) -> Judge:
        """Read a judge's weights."""
        ...

    def counts(self, num: int, /) -> dict[str, int]:
        """How many of each kind there are among so many prompts."""
        ...

    def prompts(self, seed: int, num: int) -> PromptSet:
        """Draw so many prompts; the same ones for the same seed."""
        ...

    def render(self, prompts: PromptSet) -> Tensor:
        """Real pictures of them, one each."""
        ...

    def render_again(self, prompts: PromptSet, copies: int) -> Tensor:
        """Real pictures, `copies` of each prompt in a row; what is unsaid is drawn anew."""
        ...

    def asked_by(self, caption: str, /) -> Asked | None:
        """What somebody's prompt says; None if it says what this domain does not know. Without this method a
        gate accepts no examples.
        """
        ...

    def captions(self, num: int, seed: int, /) -> list[str]:
        """Prompts to distil with; a gate does not ask for them."""
        ...

    def illustrated(self, num: int, seed: int) -> tuple[list[str], Tensor]:
        """Prompts like those, and a real picture of each, to distil with."""
        ...


@dataclass(frozen=True, slots=True)
class FileDomain:
    """Prompts that somebody wrote; nobody can render them or read them back.

    Attributes:
        captions: all of them.
    """

    captions: tuple[str, ...]

    @property
    def groups(self) -> Mapping[str, str]:
        """There are no kinds."""
        return {}

    def counts(self, num: int) -> dict[str, int]:
        return {"prompts": num}

    def prompts(self, seed: int, num: int) -> PromptSet:
        """Draw prompts, each as often as the others when more are wanted than there are."""
        rng = np.random.default_rng([seed, 77])
        rounds = -(-num // len(self.captions))
        order = np.concatenate([rng.permutation(len(self.captions)) for _ in range(rounds)])[:num]
        return PromptSet([self.captions[row] for row in order], [], seed, [], [])

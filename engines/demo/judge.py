"""A reader of scenes: a small network that looks at a picture and says what a caption of it would say."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from engines.demo.fit import FitConfig, autocast, fit
from engines.demo.scenes import (
    COLOURS,
    GROUNDS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    SKIES,
    Scene,
    Solid,
    said,
)

_PLACES = (*POSITIONS, *RELATIONS)
# one classifier a question; the last three repeat for the second solid, which need not exist
HEADS: tuple[tuple[str, int], ...] = (
    ("place", len(_PLACES)),
    ("ground", len(GROUNDS)),
    ("sky", len(SKIES)),
    *((f"{what}_{i}", num) for i in (0, 1) for what, num in (("shape", 5), ("colour", 8), ("size", 2))),
)
NUM_FEATURES = 256
_IGNORE = -100


def answers(scene: Scene) -> list[int]:
    """What the heads should say of a scene, in their order."""
    row = [
        _PLACES.index(said(scene.place)),
        tuple(GROUNDS).index(said(scene.ground)),
        tuple(SKIES).index(said(scene.sky)),
    ]
    for solid in scene.solids:
        row += [SHAPES.index(solid.shape), tuple(COLOURS).index(solid.colour), SIZES.index(said(solid.size))]
    return row + [_IGNORE] * (len(HEADS) - len(row))


def _scene(row: Sequence[int]) -> Scene:
    place = _PLACES[row[0]]
    num = 2 if place in RELATIONS else 1
    colours = tuple(COLOURS)
    solids = tuple(
        Solid(SHAPES[row[3 + 3 * i]], colours[row[4 + 3 * i]], SIZES[row[5 + 3 * i]]) for i in range(num)
    )
    return Scene(solids, place, tuple(GROUNDS)[row[1]], tuple(SKIES)[row[2]])


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_out(functional.silu(self.conv_in(functional.silu(self.norm(x)))))
        return out


class Judge(nn.Module):
    """Reads 64 x 64 pictures; Fréchet distances are taken between its `features`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 48, 4, stride=2, padding=1), nn.SiLU(), nn.Conv2d(48, 64, 4, stride=2, padding=1),
            _Residual(64), nn.Conv2d(64, 96, 4, stride=2, padding=1),
            _Residual(96), nn.Conv2d(96, 128, 4, stride=2, padding=1),
            _Residual(128), nn.GroupNorm(8, 128), nn.SiLU(), nn.Flatten(), nn.Linear(128 * 16, NUM_FEATURES),
        )  # fmt: skip
        self.heads = nn.Linear(NUM_FEATURES, sum(num for _, num in HEADS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, 3, 64, 64) in [-1, 1] to features (B, 256) and all heads' logits side by side."""
        features = self.body(images.contiguous(memory_format=torch.channels_last))
        return features, self.heads(functional.silu(features))

    @classmethod
    def load(cls, path: Path | str) -> "Judge":
        judge = cls()
        judge.load_state_dict({key: value.float() for key, value in load_file(path).items()})
        return _channels_last(judge).eval()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half().contiguous() for key, value in self.state_dict().items()}, path)

    @torch.no_grad()
    def features(self, images: Tensor, *, batch: int = 250) -> Tensor:
        """Features of (B, 64, 64, 3) uint8 pictures, (B, 256) fp32."""
        return torch.cat([self(to_input(part))[0].float() for part in images.split(batch)])

    @torch.no_grad()
    def read(self, images: Tensor, *, batch: int = 250) -> list[Scene]:
        """Say what (B, 64, 64, 3) uint8 pictures show."""
        sizes = [num for _, num in HEADS]
        scenes = []
        for part in images.split(batch):
            labels = torch.stack(
                [head.argmax(1) for head in self(to_input(part))[1].split(sizes, dim=1)], dim=1
            )
            scenes += [_scene(row) for row in labels.tolist()]
        return scenes


def _channels_last(judge: Judge) -> Judge:
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return judge


def to_input(images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) fp32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def accuracy(judge: Judge, images: Tensor, scenes: Sequence[Scene]) -> float:
    """Share of pictures in which the judge reads everything that was asked for."""
    seen = judge.read(images)
    return sum(asked.shown_by(shown) for asked, shown in zip(scenes, seen, strict=True)) / len(scenes)


def train_judge(
    images: Tensor, scenes: Sequence[Scene], config: FitConfig, directory: Path, *, batch: int = 96
) -> Judge:
    """Train on rendered pictures, (N, 64, 64, 3) uint8, shifted, blurred and made noisy a little."""
    torch.manual_seed(config.seed)
    judge = _channels_last(Judge())
    truth = torch.tensor([answers(scene) for scene in scenes])
    sizes = [num for _, num in HEADS]

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=rng)
        x = to_input(images[rows])
        dy, dx = torch.randint(-1, 2, (2,), generator=rng).tolist()
        x = torch.roll(functional.pad(x, (1, 1, 1, 1), mode="replicate"), (dy, dx), (2, 3))[:, :, 1:-1, 1:-1]
        if torch.rand((), generator=rng) < 0.3:
            x = functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        x = x + 0.05 * torch.rand((), generator=rng) * torch.randn(x.shape, generator=rng)
        with autocast(config.device):
            _, logits = judge(x.to(config.device))
        total = logits.new_zeros((), dtype=torch.float32)
        labels = truth[rows].to(config.device)
        for head, target in zip(logits.float().split(sizes, dim=1), labels.unbind(1), strict=True):
            total = (
                total + functional.cross_entropy(head, target, ignore_index=_IGNORE, reduction="sum") / batch
            )
        return cast("Tensor", total)

    fit("judge", {"judge": judge}, loss, config, directory)
    return judge.eval()

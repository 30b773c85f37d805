"""A reader of pictures: what a caption would say of one, and which pixels belong to which solid.

A classifier alone forgives melted shapes. So the reader also marks every solid's pixels; it has learnt to do
so on pictures deformed together with their masks, so that the marks follow what is there, not what ought to
be. `Eye` compares the marked outlines with real ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from engines.demo.fit import FitConfig, autocast, fit
from engines.demo.judge import to_input
from engines.demo.scenes import COLOURS, SHAPES, SIZES
from engines.demo.studio.outlines import CANVAS, OutlineBank, num_solids, overlaps
from engines.demo.studio.scenes import (
    ARRANGEMENTS,
    GROUNDS,
    MATERIALS,
    MAX_OBJECTS,
    SKIES,
    VIEWS,
    Scene,
    Solid,
)

PLACES = tuple(place for places in ARRANGEMENTS.values() for place in places)
_OF_SCENE: tuple[tuple[str, ...], ...] = (PLACES, GROUNDS, SKIES, VIEWS)
_OF_SOLID: tuple[tuple[str, ...], ...] = (SHAPES, tuple(COLOURS), SIZES, MATERIALS)
NUM_FEATURES = 256
MIN_OVERLAP = 0.85
"""An outline that is less like every real one of its shape is deformed."""

_IGNORE = -100


def answers(scene: Scene) -> list[int]:
    """Numbers of place, ground, sky and view, then of shape, colour, size and material of each slot."""
    said = [scene.place, scene.ground, scene.sky, scene.view]
    row = [values.index(value or "") for values, value in zip(_OF_SCENE, said, strict=True)]
    for solid in scene.solids:
        parts = (solid.shape, solid.colour, solid.size, solid.material)
        row += [values.index(part or "") for values, part in zip(_OF_SOLID, parts, strict=True)]
    return row + [_IGNORE] * (len(_OF_SOLID) * (MAX_OBJECTS - scene.num_objects))


def scene_of(row: Sequence[int]) -> Scene:
    place, ground, sky, view = (values[i] for values, i in zip(_OF_SCENE, row[:4], strict=True))
    count = next(count for count, places in ARRANGEMENTS.items() if place in places)
    solids = []
    for slot in range(count):
        mine = row[4 + 4 * slot : 8 + 4 * slot]
        solids.append(Solid(*(values[i] for values, i in zip(_OF_SOLID, mine, strict=True))))
    return Scene(tuple(solids), place, ground, sky, view)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_out(functional.silu(self.conv_in(functional.silu(self.norm(x)))))
        return out


@dataclass(frozen=True, slots=True)
class Reading:
    """What the network says of B pictures.

    Attributes:
        features: (B, 256).
        scene: logits of place, ground, sky and view side by side.
        marks: (B, 4, 96, 96) logits of ground and sky, and of each slot.
        solids: (B, 3, n) logits of shape, colour, size and material of each slot.
    """

    features: Tensor
    scene: Tensor
    marks: Tensor
    solids: Tensor


class Reader(nn.Module):
    """Reads 96 x 96 pictures. Fréchet distances are taken between its features."""

    def __init__(self) -> None:
        super().__init__()
        self.at_48 = nn.Conv2d(3, 32, 4, stride=2, padding=1)
        self.at_24 = nn.Sequential(nn.SiLU(), nn.Conv2d(32, 64, 4, stride=2, padding=1), _Residual(64))
        self.at_12 = nn.Sequential(nn.Conv2d(64, 96, 4, stride=2, padding=1), _Residual(96))
        self.at_6 = nn.Sequential(nn.Conv2d(96, 128, 4, stride=2, padding=1), _Residual(128), _Residual(128))
        self.features = nn.Sequential(
            nn.GroupNorm(8, 128), nn.SiLU(), nn.Flatten(), nn.Linear(128 * 36, NUM_FEATURES)
        )
        self.scene = nn.Linear(NUM_FEATURES, sum(map(len, _OF_SCENE)))
        self.context = nn.Linear(NUM_FEATURES, 96)
        self.up_12 = nn.Conv2d(128, 96, 1)
        self.mix_12 = _Residual(96)
        self.up_24 = nn.Conv2d(96, 64, 1)
        self.mix_24 = _Residual(64)
        self.up_48 = nn.Conv2d(64, 32, 1)
        self.mix_48 = _Residual(32)
        self.marks = nn.Conv2d(32, 4 * (1 + MAX_OBJECTS), 3, padding=1)
        self.solid = nn.Sequential(
            nn.Linear(64 + 96 + NUM_FEATURES, 192), nn.SiLU(), nn.Linear(192, 192), nn.SiLU()
        )
        self.solids = nn.Linear(192, sum(map(len, _OF_SOLID)))

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Reading:
        """Read (B, 3, 96, 96) in [-1, 1].

        Args:
            images: the pictures.
            masks: (B, 96, 96), whose solids to describe; None: those that it marks itself.
        """
        fine = self.at_48(images.contiguous(memory_format=torch.channels_last))
        middle = self.at_24(fine)
        coarse = self.at_12(middle)
        deep = self.at_6(coarse)
        features = self.features(deep)
        said = functional.silu(features)

        def doubled(x: Tensor) -> Tensor:
            return functional.interpolate(x, scale_factor=2.0)

        x12 = self.mix_12(coarse + doubled(self.up_12(deep)) + self.context(said)[:, :, None, None])
        x24 = self.mix_24(middle + doubled(self.up_24(x12)))
        x48 = self.mix_48(fine + doubled(self.up_48(x24)))
        marks = functional.pixel_shuffle(self.marks(functional.silu(x48)), 2)
        if masks is None:
            share = marks.detach().float().softmax(1)[:, 1:]
        else:
            share = functional.one_hot(masks.long(), 1 + MAX_OBJECTS).movedim(-1, 1)[:, 1:].float()
        pooled = [_pooled(x, share) for x in (x24, x12)]
        whole = said.float()[:, None].expand(-1, MAX_OBJECTS, -1)
        solids = self.solids(self.solid(torch.cat([*pooled, whole], dim=2)))
        return Reading(features, self.scene(said), marks, solids)

    @classmethod
    def load(cls, path: Path | str) -> "Reader":
        reader = cls()
        stored = {key: value for key, value in load_file(path).items() if not key.startswith("outlines.")}
        reader.load_state_dict({key: value.float() for key, value in stored.items()})
        return _channels_last(reader).eval()


def _pooled(x: Tensor, share: Tensor) -> Tensor:
    """Mean of (B, C, h, w) over each of (B, S, H, W) shares; (B, S, C)."""
    weights = functional.adaptive_avg_pool2d(share, x.shape[2]).flatten(2)
    weights = weights / weights.sum(2, keepdim=True).clamp_min(1e-4)
    return weights @ x.float().flatten(2).transpose(1, 2)


def _channels_last(reader: Reader) -> Reader:
    reader.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return reader


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen in a picture: the scene it would be, and whether it is one.

    Attributes:
        scene: as read.
        overlaps: of each solid's outline with the most similar real one.
        count: how many solids are marked.
    """

    scene: Scene
    overlaps: tuple[float, ...]
    count: int

    @property
    def is_sound(self) -> bool:
        """As many solids as the scene has, none of them deformed."""
        return self.count == self.scene.num_objects and all(o >= MIN_OVERLAP for o in self.overlaps)


class Eye:
    """Sees what people see: attributes by network, outlines and number by comparison. A gate's judge."""

    def __init__(self, reader: Reader, bank: OutlineBank) -> None:
        self.reader = reader
        self.bank = bank

    @classmethod
    def load(cls, path: Path | str) -> "Eye":
        """From safetensors written by `save`."""
        stored = load_file(path)
        outlines = []
        for shape in SHAPES:
            bits = np.unpackbits(stored[f"outlines.{shape}"].numpy(), axis=1)
            outlines.append(torch.from_numpy(bits[:, : CANVAS * CANVAS]).bool())
        return cls(Reader.load(path), OutlineBank(tuple(outlines)))

    def save(self, path: Path) -> None:
        """Write weights in fp16 and outlines as bits."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.half().contiguous() for key, value in self.reader.state_dict().items()}
        for shape, outlines in zip(SHAPES, self.bank.outlines, strict=True):
            tensors[f"outlines.{shape}"] = torch.from_numpy(np.packbits(outlines.numpy(), axis=1))
        save_file(tensors, path)

    def _readings(self, images: Tensor, batch: int) -> list[Reading]:
        device = next(self.reader.parameters()).device
        with torch.no_grad():
            return [self.reader(to_input(part).to(device)) for part in images.split(batch)]

    def features(self, images: Tensor, *, batch: int = 250) -> Tensor:
        """Features of (B, 96, 96, 3) uint8 pictures, (B, 256) fp32."""
        return torch.cat([reading.features.float().cpu() for reading in self._readings(images, batch)])

    def marks(self, images: Tensor, *, batch: int = 250) -> Tensor:
        """Which solid each pixel of (B, 96, 96, 3) pictures is of, (B, 96, 96) as in the renderer's masks."""
        readings = self._readings(images, batch)
        return torch.cat([reading.marks.argmax(1).to(torch.uint8).cpu() for reading in readings])

    def look(self, images: Tensor, *, batch: int = 250) -> list[Look]:
        """See everything in (B, 96, 96, 3) uint8 pictures."""
        looks = []
        for reading in self._readings(images, batch):
            scenes = [scene_of(row) for row in _labels(reading).tolist()]
            masks = reading.marks.argmax(1).cpu()
            found = overlaps(self.bank, masks, scenes)
            looks += [
                Look(scene, like, num_solids(mask))
                for scene, like, mask in zip(scenes, found, masks, strict=True)
            ]
        return looks

    def read(self, images: Tensor, *, batch: int = 250) -> list[Scene | None]:
        """Say what pictures show; None if solids are deformed, missing or too many."""
        return [look.scene if look.is_sound else None for look in self.look(images, batch=batch)]


def _labels(reading: Reading) -> Tensor:
    """(B, 16) as `answers` has them."""
    of_scene = [part.argmax(-1)[:, None] for part in reading.scene.split([*map(len, _OF_SCENE)], dim=-1)]
    of_solid = [part.argmax(-1) for part in reading.solids.split([*map(len, _OF_SOLID)], dim=-1)]
    return torch.cat([*of_scene, torch.stack(of_solid, dim=2).flatten(1)], dim=1).cpu()


def deform(images: Tensor, masks: Tensor, pixels: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Push pictures and masks about by smooth random fields, as if they had melted.

    Args:
        images: (B, 3, H, W).
        masks: (B, H, W) uint8.
        pixels: (B,) standard deviation of the push.
        rng: draws the fields; on the pictures' device.
    """
    num, size = len(images), images.shape[2]
    field = (
        torch.randn(num, 2, 7, 7, generator=rng, device=images.device) * pixels.view(-1, 1, 1, 1) * 2 / size
    )
    field = functional.interpolate(field, size=size, mode="bicubic").permute(0, 2, 3, 1)
    lines = torch.linspace(-1, 1, size, device=images.device)
    grid = torch.stack(torch.meshgrid(lines, lines, indexing="ij")[::-1], dim=-1) + field
    moved = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=True)
    marks = functional.grid_sample(
        masks[:, None].float(), grid, mode="nearest", padding_mode="reflection", align_corners=True
    )
    return moved, marks[:, 0].to(torch.uint8)


def loss_of(reading: Reading, masks: Tensor, labels: Tensor) -> Tensor:
    """Cross entropies of every answer and of the marks; scalar.

    Args:
        reading: of B pictures.
        masks: (B, 96, 96).
        labels: (B, 16), `answers`.
    """
    total = 2 * functional.cross_entropy(reading.marks.float(), masks.long())
    heads = reading.scene.float().split([*map(len, _OF_SCENE)], dim=-1)
    for head, target in zip(heads, labels[:, :4].unbind(1), strict=True):
        total = total + functional.cross_entropy(head, target)
    slots = labels[:, 4:].reshape(-1, len(_OF_SOLID))
    solids = reading.solids.float().flatten(0, 1).split([*map(len, _OF_SOLID)], dim=-1)
    for head, target in zip(solids, slots.unbind(1), strict=True):
        total = total + functional.cross_entropy(head, target, ignore_index=_IGNORE)
    return total


def train_reader(
    images: Tensor,
    masks: Tensor,
    scenes: Sequence[Scene],
    config: FitConfig,
    directory: Path,
    *,
    batch: int = 64,
    begin: Path | None = None,
) -> Reader:
    """Train on rendered pictures, (N, 96, 96, 3) uint8, some deformed or blurred; `begin` as of `fit`."""
    torch.manual_seed(config.seed)
    reader = _channels_last(Reader())
    truth = torch.tensor([answers(scene) for scene in scenes])

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=rng).to(images.device)
        noise = torch.Generator(config.device).manual_seed(int(torch.randint(2**62, (), generator=rng)))
        push, soft, grainy = torch.rand(3, generator=rng).tolist()
        pictures, marks = to_input(images[rows]).to(config.device), masks[rows].to(config.device)
        if push < 0.5:
            pixels = 4 * torch.rand(batch, generator=noise, device=config.device)
            pictures, marks = deform(pictures, marks, pixels, noise)
        if soft < 0.3:
            pictures = functional.interpolate(
                functional.avg_pool2d(pictures, 2), scale_factor=2.0, mode="bilinear"
            )
        if grainy < 0.5:
            grain = torch.randn(pictures.shape, generator=noise, device=config.device)
            pictures = pictures + 0.1 * grainy * grain
        with autocast(config.device):
            reading = reader(pictures, marks if soft < 0.6 else None)
        return loss_of(reading, marks, truth[rows.cpu()].to(config.device))

    fit("reader", {"reader": reader}, loss, config, directory, begin=begin)
    return reader.eval()

"""What the eye checks and a classifier forgives: outlines, crisp edges, number of solids.

A *mask* is the renderer's, or a reader's: (H, W) uint8, 0 for the ground and sky, 1 + slot for a solid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engines.demo.scenes import SHAPES
from engines.demo.studio.scenes import Scene

CANVAS = 40
_SIDE = 16.0  # on a canvas an outline has the area of a square with this side
MIN_PIXELS = 14
"""A solid with fewer is not seen as one; the smallest of the renderer's that stands free has about 40."""


def normalised(mask: Tensor) -> Tensor:
    """A solid's outline without place and size: its centroid in the middle, its area always the same.

    Args:
        mask: (H, W) bool, not empty.
    Returns:
        (CANVAS, CANVAS) bool.
    """
    ys, xs = mask.nonzero(as_tuple=True)
    height, width = mask.shape
    y, x = ys.float().mean() + 0.5, xs.float().mean() + 0.5
    scale = len(ys) ** 0.5 / _SIDE
    steps = (torch.arange(CANVAS) + 0.5 - CANVAS / 2) * scale
    grid_y, grid_x = (y + steps) * 2 / height - 1, (x + steps) * 2 / width - 1
    grid = torch.stack(torch.meshgrid(grid_y, grid_x, indexing="ij")[::-1], dim=-1)
    return functional.grid_sample(mask[None, None].float(), grid[None], align_corners=False)[0, 0] > 0.5


@dataclass(frozen=True, slots=True)
class OutlineBank:
    """Real outlines of each shape, as solids show them from all sides, cut off by others or the frame.

    Attributes:
        outlines: for each of `SHAPES`, (n, CANVAS * CANVAS) bool.
    """

    outlines: tuple[Tensor, ...]

    @classmethod
    def of(cls, masks: Tensor, scenes: Sequence[Scene], *, per_shape: int = 800) -> "OutlineBank":
        """From rendered masks (N, H, W) of these scenes."""
        found: dict[str, list[Tensor]] = {shape: [] for shape in SHAPES}
        for mask, scene in zip(masks, scenes, strict=True):
            for slot, solid in enumerate(scene.solids):
                mine = mask == slot + 1
                if len(found[solid.shape]) < per_shape and int(mine.sum()) >= MIN_PIXELS:
                    found[solid.shape].append(normalised(mine).flatten())
        return cls(tuple(torch.stack(found[shape]) for shape in SHAPES))

    def overlap(self, outlines: Tensor, shape: str) -> Tensor:
        """Intersection over union of outlines with the real one of a shape that each is most like.

        Args:
            outlines: (n, CANVAS * CANVAS) bool, `normalised`.
            shape: what they should be.
        Returns:
            (n,) fp32.
        """
        bank, ones = self.outlines[SHAPES.index(shape)].float(), outlines.float()
        both = ones @ bank.T
        either = ones.sum(1)[:, None] + bank.sum(1) - both
        return (both / either).amax(1)


def overlaps(bank: OutlineBank, masks: Tensor, scenes: Sequence[Scene]) -> list[tuple[float, ...]]:
    """`OutlineBank.overlap` of every solid that (N, H, W) masks should show; 0 for those that are missing."""
    found = [[0.0] * scene.num_objects for scene in scenes]
    places: dict[str, list[tuple[int, int]]] = {shape: [] for shape in SHAPES}
    outlines: dict[str, list[Tensor]] = {shape: [] for shape in SHAPES}
    for row, (mask, scene) in enumerate(zip(masks, scenes, strict=True)):
        for slot, solid in enumerate(scene.solids):
            mine = mask == slot + 1
            if mine.any():
                places[solid.shape].append((row, slot))
                outlines[solid.shape].append(normalised(mine).flatten())
    for shape in SHAPES:
        if places[shape]:
            values = bank.overlap(torch.stack(outlines[shape]), shape).tolist()
            for (row, slot), value in zip(places[shape], values, strict=True):
                found[row][slot] = value
    return [tuple(values) for values in found]


def num_solids(mask: Tensor) -> int:
    """How many solids a mask (H, W) shows."""
    sizes = torch.bincount(mask.flatten().long(), minlength=2)[1:]
    return int((sizes >= MIN_PIXELS).sum())


def edge_contrast(images: Tensor, reals: Tensor, masks: Tensor) -> float:
    """Share of the outlines' contrast that copies of renders have kept.

    Steps of colour between neighbours on either side of an outline, along the direction of the render's own.

    Args:
        images: (N, H, W, 3) uint8, what became of the renders.
        reals: (N, H, W, 3) uint8, the renders.
        masks: (N, H, W) of the renders.
    """
    kept = whole = 0.0
    for axis in (1, 2):
        crossed = masks.int().diff(dim=axis) != 0
        step, real = (pictures.float().diff(dim=axis)[crossed] for pictures in (images, reals))
        length = real.norm(dim=1)
        kept += float(((step * real).sum(1) / length.clamp_min(1e-3)).sum())
        whole += float(length.sum())
    return kept / whole


def crispness(images: Tensor, masks: Tensor) -> float:
    """How much of the change across outlines happens between two neighbouring pixels, at most 1.

    Needs no real picture beside: renders have about 0.7, with blur it falls.

    Args:
        images: (N, H, W, 3) uint8.
        masks: (N, H, W), as a reader sees the solids.
    """
    steepest = whole = 0.0
    for axis in (1, 2):
        lines, marks = (
            images.float().movedim(axis, -1),
            masks.int().movedim(axis, -1),
        )  # (N, W, 3, H), (N, W, H)
        windows = lines.unfold(-1, 6, 1)  # (N, W, 3, H - 5, 6)
        crossed = marks[..., 2:-3] != marks[..., 3:-2]
        step = windows.diff(dim=-1).square().sum(2).sqrt().amax(-1)
        change = (windows[..., -1] - windows[..., 0]).square().sum(2).sqrt()
        steepest += float(torch.minimum(step, change)[crossed].sum())
        whole += float(change[crossed].sum())
    return steepest / max(whole, 1e-6)

"""Buckets: the shapes a bundle is compiled for, and how a batch is rounded up to one of them.

A bucket is what samples of one batch must share: height, width and number of frames. No torch here: the api
process imports this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LABEL = re.compile(r"(?P<height>[1-9]\d*)x(?P<width>[1-9]\d*)(?:x(?P<frames>[1-9]\d*))?")


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """One output shape in pixels; an image is a video of one frame."""

    height: int
    width: int
    frames: int = 1

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.frames) < 1:
            raise ValueError(f"a bucket's height, width and frames must be at least 1, not {self.label}")

    @classmethod
    def parse(cls, label: str) -> Bucket:
        """Read `HEIGHTxWIDTH` or `HEIGHTxWIDTHxFRAMES`.

        Raises:
            ValueError: `label` has another form.
        """
        match = _LABEL.fullmatch(label)
        if match is None:
            raise ValueError(f"a bucket is written HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, not {label!r}")
        return cls(int(match["height"]), int(match["width"]), int(match["frames"] or 1))

    @property
    def label(self) -> str:
        """`HEIGHTxWIDTH`, and `xFRAMES` after it for a video."""
        frames = "" if self.frames == 1 else f"x{self.frames}"
        return f"{self.height}x{self.width}{frames}"

    @property
    def size(self) -> str:
        """`WIDTHxHEIGHT`, as requests and answers of the HTTP API write it."""
        return f"{self.width}x{self.height}"


def pick_batch(n: int, batch_sizes: Iterable[int]) -> int:
    """Smallest compiled batch size that holds `n` samples.

    Raises:
        ValueError: `n` is below 1 or above the largest size.
    """
    sizes = sorted(batch_sizes)
    if n < 1 or not sizes or n > sizes[-1]:
        raise ValueError(f"no compiled batch size holds {n} samples; compiled are {sizes}")
    return next(size for size in sizes if size >= n)

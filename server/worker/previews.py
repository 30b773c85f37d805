"""Small pictures of a video: one frame, and a sheet of many, for lists and for scrubbing."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TILE_SIDE = 160
"""Longest side of a frame on a sheet, in pixels; smaller frames stay as they are."""
MAX_TILES = 64


def thumbnail(frames: NDArray[np.uint8]) -> Image.Image:
    """The frame in the middle: what moves through the picture is in it by then.

    Args:
        frames: (F, H, W, 3) RGB.
    Returns:
        (W, H) RGB.
    """
    return Image.fromarray(frames[len(frames) // 2])


def spritesheet(frames: NDArray[np.uint8]) -> Image.Image:
    """Frames from the first to the last, row by row, on a sheet as square as their number allows.

    Args:
        frames: (F, H, W, 3) RGB. Of more than MAX_TILES, so many are taken at even distances.
    Returns:
        `columns x rows` tiles as `grid` has them, the rest of the last row black.
    """
    shown = tiles(len(frames))
    columns, rows = grid(len(shown))
    height, width = frames.shape[1:3]
    scale = min(1.0, TILE_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    sheet = Image.new("RGB", (columns * size[0], rows * size[1]))
    for place, index in enumerate(shown):
        tile = Image.fromarray(frames[index])
        if scale < 1:
            tile = tile.resize(size, Image.Resampling.LANCZOS)
        row, column = divmod(place, columns)
        sheet.paste(tile, (column * size[0], row * size[1]))
    return sheet


def tiles(num_frames: int) -> list[int]:
    """Which frames a sheet shows: all, or MAX_TILES with the first and the last among them."""
    if num_frames <= MAX_TILES:
        return list(range(num_frames))
    return [round(index * (num_frames - 1) / (MAX_TILES - 1)) for index in range(MAX_TILES)]


def grid(num_tiles: int) -> tuple[int, int]:
    """Columns and rows of a sheet: the square root, rounded up, and as many rows as that needs."""
    columns = math.ceil(math.sqrt(num_tiles))
    return columns, math.ceil(num_tiles / columns)

"""Small pictures of a video: which frames they show, and where."""

from itertools import pairwise

import numpy as np
import pytest

from server.worker.previews import MAX_TILES, TILE_SIDE, grid, spritesheet, thumbnail, tiles


def frames_of(
    number: int, height: int = 4, width: int = 6
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """(F, H, W, 3); frame `i` is all `i`."""
    return np.broadcast_to(
        np.arange(number, dtype=np.uint8)[:, None, None, None], (number, height, width, 3)
    ).copy()


@pytest.mark.parametrize(("number", "middle"), [(1, 0), (2, 1), (9, 4), (49, 24)])
def test_thumbnail_is_the_middle_frame(number: int, middle: int) -> None:
    picture = thumbnail(frames_of(number))
    assert picture.size == (6, 4)
    assert np.unique(np.asarray(picture)) == [middle]


def test_sheet_shows_every_frame_row_by_row_and_black_after_the_last() -> None:
    sheet = np.asarray(spritesheet(frames_of(7) + 1))
    assert sheet.shape == (3 * 4, 3 * 6, 3)
    shown = [[int(sheet[row * 4 + 1, column * 6 + 1, 0]) for column in range(3)] for row in range(3)]
    assert shown == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]


def test_long_video_is_shown_at_even_distances_from_its_first_frame_to_its_last() -> None:
    shown = tiles(200)
    assert (len(shown), shown[0], shown[-1]) == (MAX_TILES, 0, 199)
    assert {after - before for before, after in pairwise(shown)} == {3, 4}


@pytest.mark.parametrize(
    ("number", "expected"), [(1, (1, 1)), (2, (2, 1)), (9, (3, 3)), (10, (4, 3)), (49, (7, 7)), (64, (8, 8))]
)
def test_grid_is_as_square_as_it_can_be(number: int, expected: tuple[int, int]) -> None:
    assert grid(number) == expected


def test_large_frames_are_made_smaller_and_small_ones_stay() -> None:
    assert spritesheet(frames_of(4, 480, 720)).size == (2 * TILE_SIDE, 2 * 107)
    assert spritesheet(frames_of(4, TILE_SIDE, 10)).size == (2 * 10, 2 * TILE_SIDE)

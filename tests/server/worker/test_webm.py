"""WebM files: VP9 with the frames that went in, and the same bytes each time."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from server.worker.packing import SOURCE_TYPE, pack, read_provenance
from tests.server.worker.test_mp4 import FPS, PROVENANCE, frames

__all__ = ["frames"]  # a fixture


@pytest.fixture
def data(frames: NDArray[np.uint8]) -> bytes:
    packed = pack(frames, "webm", PROVENANCE, fps=FPS)
    assert (packed.content_type, packed.suffix) == ("video/webm", "webm")
    return packed.data


def test_file_is_vp9_of_every_frame_at_its_time(data: bytes) -> None:
    with av.open(io.BytesIO(data), "r") as file:
        (stream,) = file.streams.video
        codec = stream.codec_context
        times = [frame.time for frame in file.decode(video=0)]
        assert "webm" in file.format.name
        assert (codec.name, codec.pix_fmt, codec.width, codec.height) == ("vp9", "yuv420p", 64, 48)
        assert stream.average_rate == Fraction(FPS)
        assert codec.colorspace == 1  # BT.709
    assert times == [index / FPS for index in range(17)]


def test_frames_come_back_nearly_as_they_were(frames: NDArray[np.uint8], data: bytes) -> None:
    with av.open(io.BytesIO(data), "r") as file:
        shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    off = np.abs(np.stack(shown).astype(int) - frames)
    assert off.mean() < 4


def test_same_frames_give_the_same_bytes(frames: NDArray[np.uint8], data: bytes) -> None:
    assert pack(frames, "webm", PROVENANCE, fps=FPS).data == data


def test_file_says_what_drew_it_and_that_a_machine_did(data: bytes) -> None:
    assert read_provenance(data) == PROVENANCE
    assert SOURCE_TYPE.encode() in data
    assert b"red" not in data


@pytest.mark.parametrize("shape", [(2, 15, 16, 3), (2, 16, 15, 3), (16, 16, 3), (2, 16, 16, 4)])
def test_frames_that_it_does_not_hold_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="webm holds"):
        pack(np.zeros(shape, np.uint8), "webm", PROVENANCE, fps=FPS)

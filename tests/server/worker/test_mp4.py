"""MP4 files: what browsers play, with the frames that went in, and the same bytes each time."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from server.worker import mp4
from server.worker.packing import SOURCE_TYPE, Provenance, pack, prompt_hash, read_provenance

FPS = 8
PROVENANCE = Provenance(
    model="clips", version="0123456789ab", seed=7, num_steps=4, prompt_sha256=prompt_hash("a <red> cube")
)


@pytest.fixture
def frames() -> NDArray[np.uint8]:
    """Seventeen smooth frames, (17, 48, 64, 3), in which a bright edge moves right; the channels differ."""
    time, y, x = np.mgrid[0:17, 0:48, 0:64]
    edge = 255 / (1 + np.exp((x - 4 * time) / 4.0))
    return np.stack([edge, 40 + 3 * y, 255 - 2 * x], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture
def data(frames: NDArray[np.uint8]) -> bytes:
    return pack(frames, "mp4", PROVENANCE, fps=FPS).data


def test_file_is_what_browsers_play(data: bytes) -> None:
    with av.open(io.BytesIO(data), "r") as file:
        (stream,) = file.streams.video
        codec = stream.codec_context
        times = [frame.time for frame in file.decode(video=0)]

        assert (codec.name, codec.profile, codec.pix_fmt) == ("h264", "High", "yuv420p")
        assert (codec.width, codec.height) == (64, 48)
        assert (stream.average_rate, stream.frames) == (Fraction(FPS), 17)
        assert stream.duration is not None
        assert stream.time_base is not None
        assert stream.duration * stream.time_base == Fraction(17, FPS)
        assert (codec.color_primaries, codec.color_trc, codec.colorspace) == (1, 1, 1)  # BT.709
        assert len(file.streams) == 1
    assert times == [index / FPS for index in range(17)]


def test_index_comes_before_the_frames(data: bytes) -> None:
    order = [kind for kind, _ in mp4.boxes(data)]

    assert order[0] == b"ftyp"
    assert order.index(b"moov") < order.index(b"mdat")
    assert sum(8 + len(content) for _, content in mp4.boxes(data)) == len(data)  # no byte outside of a box


def test_frames_come_back_nearly_as_they_were(frames: NDArray[np.uint8], data: bytes) -> None:
    with av.open(io.BytesIO(data), "r") as file:
        seen = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])

    assert seen.shape == frames.shape
    assert np.abs(seen.astype(int) - frames).mean() < 4


def test_players_can_seek_to_each_second(data: bytes) -> None:
    with av.open(io.BytesIO(data), "r") as file:
        keys = [index for index, frame in enumerate(file.decode(video=0)) if frame.key_frame]

    assert {0, 8, 16} <= set(keys)


def test_same_frames_give_the_same_bytes(frames: NDArray[np.uint8], data: bytes) -> None:
    assert pack(frames, "mp4", PROVENANCE, fps=FPS).data == data


def test_file_says_what_drew_it_and_that_a_machine_did(data: bytes) -> None:
    assert read_provenance(data) == PROVENANCE
    assert SOURCE_TYPE.encode() in data
    assert b"red" not in data  # the prompt itself stays out


def test_damaged_or_foreign_files_have_no_provenance(data: bytes) -> None:
    assert read_provenance(data[:-1]) is None
    assert mp4.read_xmp(b"") is None
    assert mp4.read_xmp(data[:4]) is None


def test_one_frame_is_a_video_too(frames: NDArray[np.uint8]) -> None:
    packed = pack(frames[:1], "mp4", PROVENANCE, fps=FPS)

    assert (packed.content_type, packed.suffix) == ("video/mp4", "mp4")
    with av.open(io.BytesIO(packed.data), "r") as file:
        assert len(list(file.decode(video=0))) == 1


@pytest.mark.parametrize("shape", [(17, 48, 64), (17, 48, 64, 1), (17, 47, 64, 3), (17, 48, 63, 3)])
def test_shape_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="H and W even"):
        pack(np.zeros(shape, np.uint8), "mp4", PROVENANCE, fps=FPS)


@pytest.mark.parametrize("fps", [None, 0])
def test_video_without_its_pace_is_refused(frames: NDArray[np.uint8], fps: int | None) -> None:
    with pytest.raises(ValueError, match="frames per second"):
        pack(frames, "mp4", PROVENANCE, fps=fps)

"""MP4: frames to an H.264 file that every browser plays, the same bytes for the same frames.

One thread and no clock: x264's output depends on the number of its threads, and MP4 files usually hold the
time of their making and the library's version.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray

CONTENT_TYPE = "video/mp4"
CRF = 17
"""x264's quality: smaller is better; 18 is commonly taken for visually lossless."""
X264_OPTIONS = {"crf": str(CRF), "preset": "medium", "threads": "1", "profile": "high"}
# The index goes before the frames, so that a player can begin before it has all bytes.
MUXER_OPTIONS = {"movflags": "+faststart", "fflags": "+bitexact"}
BT709 = 1  # in H.264's tables of primaries, transfer and matrix alike
XMP_BOX = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
"""Identifies the box that holds XMP (XMP specification, part 3, 1.1.5: MPEG-4)."""


def encode(frames: NDArray[np.uint8], fps: int, xmp: str) -> bytes:
    """Make an MP4 of one video track.

    Args:
        frames: (F, H, W, 3) RGB, height and width even: chroma is stored for each 2 x 2 pixels.
        fps: frames per second.
        xmp: packet that goes into the file's XMP box.

    Returns:
        The file: H.264, yuv420p in BT.709, a key frame each second, index first.

    Raises:
        ValueError: another shape, or sides that are odd.
    """
    check_frames(frames, "mp4")
    with tempfile.TemporaryDirectory(prefix="mp4-") as folder:  # faststart reads again what was written
        path = Path(folder) / "video.mp4"
        with av.open(str(path), "w", options=MUXER_OPTIONS) as container:
            stream = container.add_stream("libx264", rate=fps, options=X264_OPTIONS)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            codec = stream.codec_context
            codec.thread_count = 1
            codec.gop_size = fps
            codec.max_b_frames = 0  # the first frame is then shown at 0, without an edit list
            for frame in bt709_frames(frames, codec):
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path.read_bytes() + _box(b"uuid", XMP_BOX + xmp.encode())


def check_frames(frames: NDArray[np.uint8], output_format: str) -> None:
    """Return if an encoder takes frames of this shape.

    Raises:
        ValueError: it does not.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"frames of shape {frames.shape}: {output_format} holds (F, H, W, 3), H and W even")


def bt709_frames(frames: NDArray[np.uint8], codec: av.VideoCodecContext) -> Iterator[av.VideoFrame]:
    """RGB frames, (F, H, W, 3), as yuv420p in BT.709, studio range; tells the codec so."""
    codec.color_primaries = codec.color_trc = codec.colorspace = BT709
    codec.color_range = int(ColorRange.MPEG)
    for pixels in frames:
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        yield rgb.reformat(
            format="yuv420p",
            src_colorspace=Colorspace.ITU709,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
        )


def read_xmp(data: bytes) -> str | None:
    """The XMP packet of an MP4 file, or None if it has none."""
    for kind, content in boxes(data):
        if kind == b"uuid" and content.startswith(XMP_BOX):
            return content[len(XMP_BOX) :].decode(errors="replace")
    return None


def is_mp4(data: bytes) -> bool:
    """True for a file that begins as an MP4 does."""
    return data[4:8] == b"ftyp"


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each box at the top level, up to the first that is damaged."""
    start = 0
    while start + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1 and start + 16 <= len(data):
            (size,), header = struct.unpack_from(">Q", data, start + 8), 16
        if size < header or start + size > len(data):
            return
        yield kind, data[start + header : start + size]
        start += size


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content

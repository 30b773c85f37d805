"""WebM: frames to a VP9 file, for players without H.264; the same bytes for the same frames.

The XMP packet is a tag of the file: Matroska has no place of its own for it.
"""

from __future__ import annotations

import io

import av
import numpy as np
from numpy.typing import NDArray

from server.worker.mp4 import bt709_frames, check_frames

CONTENT_TYPE = "video/webm"
# Constant quality: a bit rate of 0 leaves it to `crf`. One thread: the output depends on their number.
VP9_OPTIONS = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "2", "threads": "1", "row-mt": "0"}
MUXER_OPTIONS = {"fflags": "+bitexact"}
XMP_TAG = "XMP"
EBML = b"\x1a\x45\xdf\xa3"
"""First bytes of every Matroska file."""


def encode(frames: NDArray[np.uint8], fps: int, xmp: str) -> bytes:
    """Make a WebM of one video track; arguments, shape and errors as of `mp4.encode`.

    Returns:
        The file: VP9, yuv420p in BT.709, a key frame each second.
    """
    check_frames(frames, "webm")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm", options=MUXER_OPTIONS) as container:
        container.metadata[XMP_TAG] = xmp
        stream = container.add_stream("libvpx-vp9", rate=fps, options=VP9_OPTIONS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = fps
        for frame in bt709_frames(frames, stream.codec_context):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def read_xmp(data: bytes) -> str | None:
    """The XMP packet of a WebM file, or None if it has none."""
    with av.open(io.BytesIO(data), "r") as container:
        tags = {name.upper(): value for name, value in container.metadata.items()}
    return tags.get(XMP_TAG)


def is_webm(data: bytes) -> bool:
    """True for a file that begins as a WebM does."""
    return data.startswith(EBML)

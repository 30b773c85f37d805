"""Files made of pixels: right pictures, and provenance that survives."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from server.worker.packing import FORMATS, SOURCE_TYPE, Provenance, pack, prompt_hash, read_provenance

PROVENANCE = Provenance(
    model="scenes",
    version="0123456789ab",
    seed=2**63 - 1,
    num_steps=4,
    prompt_sha256=prompt_hash("a <red> cube"),
)


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    """A smooth (1, 48, 64, 3) picture, with all three channels different."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([x * 4, y * 5, 255 - x * 2], axis=-1).astype(np.uint8)[None]


def decode(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def test_png_holds_exactly_these_pixels(pixels: NDArray[np.uint8]) -> None:
    packed = pack(pixels, "png", PROVENANCE)
    assert (packed.content_type, packed.suffix) == ("image/png", "png")
    assert np.array_equal(decode(packed.data), pixels[0])


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lossy_formats_come_close_and_shrink_with_quality(
    pixels: NDArray[np.uint8], output_format: str
) -> None:
    fine = pack(pixels, output_format, PROVENANCE, quality=95).data
    coarse = pack(pixels, output_format, PROVENANCE, quality=10).data
    error = np.abs(decode(fine).astype(int) - pixels[0].astype(int))
    assert error.mean() < 4
    assert len(coarse) < len(fine)


@pytest.mark.parametrize("output_format", FORMATS)
def test_every_format_says_what_drew_it_and_that_a_machine_did(
    pixels: NDArray[np.uint8], output_format: str
) -> None:
    data = pack(pixels, output_format, PROVENANCE).data
    assert read_provenance(data) == PROVENANCE
    assert SOURCE_TYPE.encode() in data
    assert b"red" not in data  # the prompt itself stays out


def test_same_pixels_give_the_same_bytes(pixels: NDArray[np.uint8]) -> None:
    for output_format in FORMATS:
        assert pack(pixels, output_format, PROVENANCE) == pack(pixels, output_format, PROVENANCE)


def test_foreign_file_has_no_provenance(pixels: NDArray[np.uint8]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels[0]).save(buffer, "PNG")
    assert read_provenance(buffer.getvalue()) is None


def test_unknown_format_and_wrong_shape_are_refused(pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="'gif'"):
        pack(pixels, "gif", PROVENANCE)
    with pytest.raises(ValueError, match=r"\(3, 48, 64, 3\)"):
        pack(pixels.repeat(3, axis=0), "png", PROVENANCE)

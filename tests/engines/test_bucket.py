import pytest

from engines.bundle.bucket import Bucket, pick_batch


@pytest.mark.parametrize(
    ("label", "bucket"),
    [("64x64", Bucket(64, 64)), ("512x768", Bucket(512, 768)), ("480x720x49", Bucket(480, 720, 49))],
)
def test_label_and_bucket_are_each_others_inverse(label: str, bucket: Bucket) -> None:
    assert Bucket.parse(label) == bucket
    assert bucket.label == label


@pytest.mark.parametrize(
    "label", ["", "64", "64x", "x64", "64x64x", "0x64", "-1x2", "64 x 64", "64x64x1x1", "a"]
)
def test_malformed_label_is_refused_with_its_text(label: str) -> None:
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        Bucket.parse(label)


def test_bucket_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Bucket(64, 0)


@pytest.mark.parametrize(("n", "batch"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 16), (16, 16)])
def test_batch_is_rounded_up_to_the_next_compiled_size(n: int, batch: int) -> None:
    assert pick_batch(n, [16, 1, 4, 2]) == batch


@pytest.mark.parametrize("n", [0, -1, 17])
def test_batch_that_no_compiled_size_holds_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=str(n)):
        pick_batch(n, [1, 2, 4, 16])

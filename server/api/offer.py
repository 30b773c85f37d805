"""Offer: which sizes, lengths and steps a model draws, and which of them a request asks for."""

from __future__ import annotations

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import Manifest
from server.api.errors import FpsNotServedError, LengthNotServedError, SizeNotServedError, StepsNotServedError
from server.api.schemas import VideoRequest
from server.api.views import seconds_of

DEFAULT_FPS = 8
"""Of a video bundle that does not say."""
LENGTH_TOLERANCE = 0.01
"""Of a frame: clients round seconds."""


def pick_bucket(size: str, manifest: Manifest) -> Bucket:
    """The bucket of a `WIDTHxHEIGHT` size; `auto` is the model's first one.

    Raises:
        SizeNotServedError: the bundle has no such bucket.
    """
    return _buckets_of_size(size, manifest)[0]


def pick_video_bucket(body: VideoRequest, manifest: Manifest, fps: int) -> Bucket:
    """The first bucket that has the size and the length that are asked for.

    Raises:
        SizeNotServedError: the bundle has none of this size.
        LengthNotServedError: it has none of this size with so many frames or seconds.
    """
    sized = _buckets_of_size(body.size, manifest)
    for bucket in sized:
        if body.frames in (None, bucket.frames) and _lasts(body.seconds, bucket.frames, fps):
            return bucket
    name = "seconds" if body.frames is None else "frames"
    asked = f"{body.seconds:g} s" if body.frames is None else f"{body.frames} frames"
    allowed = ", ".join(
        dict.fromkeys(f"{seconds_of(bucket.frames, fps)} s ({bucket.frames} frames)" for bucket in sized)
    )
    and_seconds = f" in {body.seconds:g} s" if body.frames is not None and body.seconds is not None else ""
    raise LengthNotServedError(
        f"{manifest.name} does not draw {asked}{and_seconds}; allowed are: {allowed}", param=name
    )


def pick_fps(fps: int | None, manifest: Manifest) -> int:
    """The model's frames per second, which is all that may be asked for.

    Raises:
        FpsNotServedError: another number was.
    """
    own = manifest.fps or DEFAULT_FPS
    if fps not in (None, own):
        raise FpsNotServedError(
            f"{manifest.name} does not draw {fps} frames per second; allowed is: {own}", param="fps"
        )
    return own


def _lasts(seconds: float | None, frames: int, fps: int) -> bool:
    """Whether so many frames last `seconds`, the last frame's own time counted or not."""
    return seconds is None or frames - 1 - LENGTH_TOLERANCE <= seconds * fps <= frames + LENGTH_TOLERANCE


def _buckets_of_size(size: str, manifest: Manifest) -> list[Bucket]:
    """At least one bucket.

    Raises:
        SizeNotServedError: there is none.
    """
    if size == "auto":
        return list(manifest.buckets)
    width, height = (int(part) for part in size.split("x"))
    found = [bucket for bucket in manifest.buckets if (bucket.width, bucket.height) == (width, height)]
    if not found:
        allowed = ", ".join(sizes_of(manifest))
        raise SizeNotServedError(
            f"{manifest.name} does not draw {size}; allowed are: auto, {allowed}", param="size"
        )
    return found


def sizes_of(manifest: Manifest) -> list[str]:
    """Every `WIDTHxHEIGHT` of a model, its own first."""
    return list(dict.fromkeys(bucket.size for bucket in manifest.buckets))


def pick_fewer_steps(most: int, manifest: Manifest) -> int:
    """The largest number of steps that the model draws in, of at most so many.

    Raises:
        StepsNotServedError: it needs more.
    """
    fewer = [number for number in manifest.num_steps if number <= most]
    if not fewer:
        raise StepsNotServedError(
            f"{manifest.name} does not draw in {most} steps or fewer; it needs {min(manifest.num_steps)}",
            param="max_steps_under_load",
        )
    return max(fewer)


def pick_steps(steps: int | None, manifest: Manifest) -> int:
    """The number of steps asked for, or the model's default.

    Raises:
        StepsNotServedError: the student was not distilled for it.
    """
    if steps is None:
        return manifest.default_num_steps
    if steps not in manifest.num_steps:
        allowed = ", ".join(str(number) for number in sorted(manifest.num_steps))
        raise StepsNotServedError(
            f"{manifest.name} does not draw in {steps} steps; allowed are: {allowed}", param="steps"
        )
    return steps

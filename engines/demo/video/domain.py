"""The demo's clips as a domain, see `engines.demo.domain`."""

from __future__ import annotations

from collections.abc import Sequence

from engines.demo.domain import CHECKPOINTS, DemoDomain, Scene, first_named
from engines.demo.video import scenes
from engines.demo.video.judge import VideoJudge


def video_counts(num: int) -> dict[str, int]:
    """A fifth with held-out pairs."""
    return {"seen": num - num // 5, "held_out": num // 5}


def _draw(group: str, num: int, seed: int) -> Sequence[Scene]:
    return scenes.sample_scenes(num, seed, split="held_out" if group == "held_out" else "train")


def _draw_like(asked: scenes.Scene, num: int, seed: int) -> Sequence[Scene]:
    return scenes.sample_scenes(num, seed, split="held_out" if asked.is_held_out() else "train")


def _draw_training(num: int, seed: int) -> Sequence[Scene]:
    return scenes.sample_scenes(num, seed, split="train")


def scene_said_by(caption: str) -> scenes.Scene | None:
    """What a caption asks for, in the words that the tokenizer makes of it; None if it is no scene."""
    from engines.demo.video.text import make_tokenizer

    tokenizer = make_tokenizer()
    words = tokenizer.convert_ids_to_tokens(tokenizer(caption)["input_ids"])[:-1]
    text = " ".join(words)
    shape = first_named(scenes.SHAPES, text)
    if tokenizer.unk_token in words or shape is None:
        return None
    return scenes.Scene(shape, first_named(scenes.COLOURS, text), first_named(scenes.MOTIONS, text))


CLIPS = DemoDomain(
    groups={"seen": "seen pairs", "held_out": "held-out pairs"},
    partial_share=0.75,
    counts=video_counts,
    draw=_draw,
    draw_like=_draw_like,
    draw_pixels=scenes.render,
    load_judge=VideoJudge.load,
    judge_file=CHECKPOINTS / "video-judge.safetensors",
    captions=scenes.sample_captions,
    draw_training=_draw_training,
    asked_by=scene_said_by,
)

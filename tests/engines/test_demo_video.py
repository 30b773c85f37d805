"""The video demo's clips, text, code and stages."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline

from engines.demo.dataset import SHARD_SIZE
from engines.demo.fit import FitConfig
from engines.demo.text import tokenize
from engines.demo.video.codec import ClipCode, make_vae, num_cells, silence, to_pixels, train_vae
from engines.demo.video.dataset import ClipSet
from engines.demo.video.judge import VideoJudge, accuracy, train_judge
from engines.demo.video.scenes import (
    CLIP_SIZE,
    HELD_OUT_PAIRS,
    MOTIONS,
    NUM_FRAMES,
    SHAPES,
    Scene,
    render,
    sample_captions,
    sample_scenes,
)
from engines.demo.video.teachers import (
    TeacherConfig,
    encode_set,
    make_transformer,
    save_teacher,
    train_teacher,
)
from engines.demo.video.text import MAX_TOKENS, make_text_encoder, make_tokenizer
from engines.families.cogvideox import FAMILY


def _where_red(clip: torch.Tensor) -> list[tuple[float, float, int]]:
    """Mean row, mean column and number of reddish pixels of every frame of one clip."""
    found = []
    for frame in clip.float():
        red = (frame[..., 0] > 1.7 * frame[..., 1]) & (frame[..., 0] > 1.7 * frame[..., 2])
        rows, columns = red.nonzero(as_tuple=True)
        found.append((rows.float().mean().item(), columns.float().mean().item(), len(rows)))
    return found


def _red(motion: str, seed: int = 4) -> list[tuple[float, float, int]]:
    return _where_red(render([Scene("ball", "red", motion)], seed)[0])


def test_same_seed_draws_the_same_clips_whatever_the_chunk() -> None:
    scenes = sample_scenes(5, 3)
    clips = render(scenes, 5, chunk=5)
    assert clips.shape == (5, NUM_FRAMES, CLIP_SIZE, CLIP_SIZE, 3)
    assert torch.equal(clips, render(scenes, 5, chunk=2))
    assert not torch.equal(clips, render(scenes, 6))


def test_solids_move_where_the_caption_says() -> None:
    assert _red("left")[-1][1] < _red("left")[0][1] - 3
    assert _red("right")[-1][1] > _red("right")[0][1] + 3
    assert _red("closer")[-1][2] > 1.5 * _red("closer")[0][2]
    assert _red("away")[0][2] > 1.5 * _red("away")[-1][2]
    assert _red("rising")[-1][0] < _red("rising")[0][0] - 3
    heights = np.array([row for row, _, _ in _red("bouncing")])
    assert len(set(np.sign(np.diff(heights)))) > 1


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_can_be_seen_in_its_colour(shape: str) -> None:
    clip = render([Scene(shape, "red", "closer")], 0)[0]
    assert all(count >= 8 for _, _, count in _where_red(clip))


def test_training_never_sees_a_held_out_pair_mirrored_or_not() -> None:
    train = sample_scenes(500, 0, split="train")
    assert not any(scene.is_held_out() or scene.mirrored().is_held_out() for scene in train)
    assert all(scene.is_held_out() for scene in sample_scenes(200, 0, split="held_out"))
    assert {(s.colour, s.motion) for s in sample_scenes(4000, 0)} >= HELD_OUT_PAIRS


def test_mirrored_clip_shows_the_mirrored_scene() -> None:
    assert Scene("ring", "blue", "left").mirrored() == Scene("ring", "blue", "right")
    for scene in sample_scenes(30, 1):
        assert scene.mirrored().mirrored() == scene


def test_what_is_left_unsaid_is_shown_by_anything() -> None:
    seen = Scene("ball", "red", "left")
    assert Scene("ball", None, None).shown_by(seen)
    assert Scene("ball", "red", None).shown_by(seen)
    assert not Scene("ball", "blue", None).shown_by(seen)
    assert not Scene("ball", None, "right").shown_by(seen)
    rng = np.random.default_rng(0)
    assert all(scene.partly_said(rng).shown_by(scene) for scene in sample_scenes(50, 2))


def test_every_caption_fits_the_tokenizer_without_unknown_words() -> None:
    tokenizer = make_tokenizer()
    captions = sample_captions(300, 0, "all")
    ids, mask = tokenize(tokenizer, captions, MAX_TOKENS)
    assert (ids == tokenizer.unk_token_id).sum() == 0
    assert mask.sum(1).max() < MAX_TOKENS
    assert ids.max() < make_text_encoder().config.vocab_size
    assert len(set(captions)) > 100


def test_synonyms_and_filler_words_reach_the_same_tokens() -> None:
    tokenizer = make_tokenizer()
    for typed, meant in (
        ("The Crimson Sphere is rolling to the left!", "a red ball moving left"),
        ("a violet donut going up", "a purple ring rising"),
        ("a box coming towards us", "a cube moving closer"),
    ):
        assert tokenizer(typed)["input_ids"] == tokenizer(meant)["input_ids"]


def test_clip_code_has_unit_variance_and_brings_the_clip_back() -> None:
    clips = render(sample_scenes(60, 2), 2)
    code = ClipCode.fit(clips)
    latents = code.encode(clips)
    assert latents.shape == (60, 48, num_cells(NUM_FRAMES), 4, 4)
    assert latents.std().item() == pytest.approx(1.0, abs=0.02)
    error = (code.decode(latents) - to_pixels(clips)).square().mean()
    assert 10 * torch.log10(4 / error) > 28


def test_vae_has_the_latent_shape_of_the_code() -> None:
    vae = make_vae()
    silence(vae)
    with torch.no_grad():
        mean = vae.encode(torch.zeros(1, 3, NUM_FRAMES, CLIP_SIZE, CLIP_SIZE)).latent_dist.mode()
        assert mean.shape == (1, 48, 3, 4, 4)
        assert vae.decode(mean).sample.shape == (1, 3, NUM_FRAMES, CLIP_SIZE, CLIP_SIZE)


def test_clip_set_gives_every_shard_its_own_scenes() -> None:
    clips = ClipSet(num_shards=2, seed=7, split="train")
    assert len(clips.scenes()) == 2 * SHARD_SIZE
    assert clips.shard_scenes(0) != clips.shard_scenes(1)
    assert clips.shard_name(0) != clips.shard_name(1)


def test_stages_train_and_the_family_loads_what_they_write(tmp_path: Path) -> None:
    scenes = sample_scenes(12, 0, split="train")
    clips = render(scenes, 0)
    code = ClipCode.fit(clips)
    config = FitConfig(num_steps=2, learning_rate=1e-3)
    small = TeacherConfig(num_layers=1, num_heads=2, head_dim=16)
    train_judge(clips, scenes, config, tmp_path / "judge", batch=6).save(tmp_path / "judge.safetensors")
    judge = VideoJudge.load(tmp_path / "judge.safetensors")
    assert judge.features(clips).shape[0] == 12
    assert 0 <= accuracy(judge, clips, scenes) <= 1
    assert {scene.motion for scene in judge.read(clips)} <= set(MOTIONS)

    vae = train_vae(clips, code, config, tmp_path / "vae", batch=2)
    data = encode_set(clips, scenes, code)
    assert data.latents.shape == (24, 3, 48, 4, 4)
    transformer, text_encoder = train_teacher(data, small, config, tmp_path / "teacher", batch=6)
    save_teacher(tmp_path / "clips-teacher", transformer, text_encoder, vae)

    CogVideoXPipeline.from_pretrained(tmp_path / "clips-teacher")
    directory = tmp_path / "clips-teacher"
    bucket = FAMILY.native_bucket(directory)
    assert (bucket.frames, bucket.height, bucket.width) == (NUM_FRAMES, CLIP_SIZE, CLIP_SIZE)
    assert FAMILY.latent_shape(directory, bucket) == (3, 48, 4, 4)
    cond = FAMILY.load_encoder(directory)(["a red ball moving left"])
    network = FAMILY.load_network(directory, torch.float32)
    latents = FAMILY.predict(network, torch.randn(1, 3, 48, 4, 4), torch.tensor([999]), cond)
    videos = FAMILY.load_decoder(directory)(latents.detach())
    assert videos.shape == (1, NUM_FRAMES, CLIP_SIZE, CLIP_SIZE, 3)


def test_untrained_transformer_predicts_nothing() -> None:
    transformer = make_transformer(TeacherConfig(num_layers=1, num_heads=2, head_dim=16))
    with torch.no_grad():
        prediction = transformer(
            torch.randn(1, 3, 48, 4, 4),
            torch.randn(1, MAX_TOKENS, 64),
            torch.tensor([500]),
            return_dict=False,
        )[0]
    assert prediction.abs().max() == 0

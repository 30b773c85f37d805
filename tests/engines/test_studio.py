"""The studio's scenes, captions, pictures and outlines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from engines.demo.codec import PatchCode
from engines.demo.fit import load_average
from engines.demo.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES
from engines.demo.studio.captions import MAX_TOKENS, caption, make_tokenizer, scene_said_by
from engines.demo.studio.exam import GROUPS, ask, marks_of, spoilt_pictures
from engines.demo.studio.outlines import (
    OutlineBank,
    crispness,
    edge_contrast,
    normalised,
    num_solids,
    overlaps,
)
from engines.demo.studio.reader import Eye, Look, Reader, answers, scene_of
from engines.demo.studio.renderer import Rendered, render
from engines.demo.studio.scenes import GROUNDS, MATERIALS, SKIES, VIEWS, Scene, Solid, sample_scenes
from engines.demo.studio.solids import Placed, trace
from engines.demo.studio.teachers import (
    TeacherConfig,
    TokenReader,
    make_lessons,
    mirrored_masks,
    written_captions,
)
from engines.demo.studio.text import TRAIN_TOKENS, CaptionReader, captions_to_read, make_text_encoder
from engines.demo.teachers import make_transformer
from engines.demo.text import D_MODEL

CUBE = Solid("cube", "red", "large", "matte")
BALL = Solid("sphere", "blue", "small", "metal")
RING = Solid("torus", "green", "small", "glossy")


def scenes_of_all_numbers(num: int, seed: int) -> list[Scene]:
    return [scene for number in (1, 2, 3) for scene in sample_scenes(num, seed, num_objects=number)]


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Scene], Rendered]:
    scenes = scenes_of_all_numbers(30, 11)
    return scenes, render(scenes, 3)


def test_same_seed_draws_the_same_pictures_and_masks_whatever_the_chunk() -> None:
    scenes = scenes_of_all_numbers(1, 3)
    one, other = render(scenes, 5, chunk=3), render(scenes, 5, chunk=1)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.masks, other.masks)
    assert not torch.equal(one.images, render(scenes, 6).images)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_shows_in_its_colour_where_the_caption_puts_it(shape: str) -> None:
    left = Scene((Solid(shape, "red", "large", "matte"),), "left", "stone", "day", "level")
    drawn = render([left], 0)
    mask = drawn.masks[0] == 1
    red, green, blue = drawn.images[0][mask].float().mean(0)
    assert mask.sum() > 250
    assert mask.nonzero()[:, 1].float().mean() < 40
    assert red > 1.5 * max(green, blue)


@pytest.mark.parametrize(
    ("attribute", "values"),
    [
        ("ground", GROUNDS),
        ("sky", SKIES),
        ("view", VIEWS),
        ("material", MATERIALS),
        ("size", ("small", "large")),
    ],
)
def test_whatever_a_caption_can_say_is_seen(attribute: str, values: tuple[str, ...]) -> None:
    scene = Scene((CUBE,), "middle", "sand", "day", "level")
    changes: list[dict[str, Any]] = [{attribute: value} for value in values]
    if attribute in ("material", "size"):
        changes = [{"solids": (replace(CUBE, **change),)} for change in changes]
    scenes = [replace(scene, **change) for change in changes]
    pictures = torch.cat([render([one], 4).images for one in scenes]).float()
    for i, picture in enumerate(pictures):
        for other in pictures[i + 1 :]:
            assert ((picture - other).abs().amax(-1) > 12).float().mean() > 0.02


def test_every_solid_of_a_scene_is_seen(drawn: tuple[list[Scene], Rendered]) -> None:
    scenes, rendered = drawn
    assert [num_solids(mask) for mask in rendered.masks] == [scene.num_objects for scene in scenes]


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_a_near_solid_hides_a_far_one_whichever_comes_first(shape: int) -> None:
    away = torch.tensor([[0.0], [1.0], [0.0]])
    eye = torch.tensor([[0.0], [0.0], [0.5]])
    for places in ([4.0, 8.0], [8.0, 4.0]):
        y = torch.tensor(places)[:, None]
        ones, kinds = torch.ones_like(y), torch.full_like(y, shape).long()
        met = trace(Placed(kinds, 0 * ones, y, ones, 0 * ones, ones), eye, away)
        assert met.slot.item() == places.index(4.0)
        assert 2 < met.t.item() < 4


def test_training_never_sees_a_held_out_pair() -> None:
    for number in (1, 2, 3):
        assert not any(s.is_held_out() for s in sample_scenes(300, 0, num_objects=number, split="train"))
        assert all(s.is_held_out() for s in sample_scenes(300, 0, num_objects=number, split="held_out"))
    seen = {(s.shape, s.colour) for scene in sample_scenes(2000, 0, num_objects=2) for s in scene.solids}
    assert seen >= HELD_OUT_PAIRS


def test_only_twins_cannot_be_told_apart_by_shape_and_colour() -> None:
    scenes = scenes_of_all_numbers(300, 2)
    alike = [s for s in scenes if len({(x.shape, x.colour) for x in s.solids}) < s.num_objects]
    assert alike
    assert all(scene.twins() for scene in alike)


def test_mirror_image_of_a_mirror_image_is_the_scene_itself() -> None:
    for scene in scenes_of_all_numbers(40, 1):
        assert scene.mirrored().mirrored() == scene
    row = Scene((CUBE, BALL, RING), "row", "sand", "day", "low")
    assert row.mirrored().solids == (RING, BALL, CUBE)


def test_an_incomplete_scene_is_not_drawn() -> None:
    with pytest.raises(ValueError, match="not complete"):
        render([Scene((CUBE, BALL), "beside", "sand", "day", "low")], 0)


def test_a_prompt_asks_for_exactly_what_its_scene_says() -> None:
    rng = np.random.default_rng(0)
    scenes = scenes_of_all_numbers(250, 4)
    phrasings = set()
    for scene in scenes:
        asked = scene.partly_said(rng) if rng.random() < 0.75 else scene
        said = caption(asked, rng)
        understood = scene_said_by(said)
        assert understood is not None, said
        assert understood.shown_by(scene), said
        for other in (scene.mirrored(), *(scenes[i] for i in rng.integers(len(scenes), size=20))):
            assert understood.shown_by(other) == asked.shown_by(other), said
        for field, values in (("ground", GROUNDS), ("sky", SKIES), ("view", VIEWS)):
            change: dict[str, Any] = {field: next(v for v in values if v != getattr(scene, field))}
            elsewhere = replace(scene, **change)
            assert understood.shown_by(elsewhere) == asked.shown_by(elsewhere), said
        phrasings.add(" ".join(w for w in said.replace(",", "").split() if len(w) < 6))
    assert len(phrasings) > 300


@pytest.mark.parametrize(
    ("prompt", "place", "shapes"),
    [
        ("A big, shiny red ball", None, ["sphere"]),
        ("two golden donuts on a chessboard at night", None, ["torus", "torus"]),
        ("a blue box in front of a red pyramid", "behind", ["cone", "cube"]),
        ("a red cube to the right of a green ball", "left of", ["sphere", "cube"]),
        ("a red cube between a green ball and a blue cone", "between", ["sphere", "cube", "cone"]),
        ("three tiny silver blocks in a row, seen from above", "row", ["cube"] * 3),
    ],
)
def test_ordinary_words_are_understood(prompt: str, place: str | None, shapes: list[str]) -> None:
    scene = scene_said_by(prompt)
    assert scene is not None
    assert (scene.place, [solid.shape for solid in scene.solids]) == (place, shapes)


def test_a_prompt_about_something_else_asks_for_no_scene() -> None:
    assert scene_said_by("a red dog on grass") is None
    assert scene_said_by("a cube") is None
    assert scene_said_by("grass at night") is None


def test_order_counts_only_where_a_caption_says_it() -> None:
    scene = Scene((CUBE, BALL), "left of", "wood", "day", "high")
    swapped = replace(scene, solids=(BALL, CUBE))
    assert not scene.shown_by(swapped)
    for place in ("beside", None):
        assert replace(scene, place=place).shown_by(swapped)
    row = Scene((CUBE, BALL, RING), "between", None, None, None)
    seen = Scene((RING, BALL, CUBE), "row", "wood", "day", "high")
    assert row.shown_by(seen)
    assert not row.shown_by(replace(seen, solids=(BALL, RING, CUBE)))


def test_every_caption_fits_the_tokenizer_without_unknown_words() -> None:
    rng, tokenizer = np.random.default_rng(1), make_tokenizer()
    for scene in scenes_of_all_numbers(200, 6):
        ids = tokenizer(caption(scene, rng))["input_ids"]
        assert len(ids) <= MAX_TOKENS
        assert tokenizer.unk_token_id not in ids


def squashed(masks: Tensor, factor: float) -> Tensor:
    """Lower, standing on the bottom of the picture."""
    rows = torch.arange(masks.shape[1]).float()
    source = rows[-1] - (rows[-1] - rows) / factor
    return masks[:, source.round().clamp(0).long()] * (source >= 0)[None, :, None]


def melted(masks: Tensor, pixels: float) -> Tensor:
    """Pushed about by a smooth random field."""
    rng = torch.Generator().manual_seed(0)
    size = masks.shape[1]
    field = functional.interpolate(torch.randn(len(masks), 2, 7, 7, generator=rng), size=size, mode="bicubic")
    lines = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(lines, lines, indexing="ij")[::-1], -1)
    grid = grid + field.permute(0, 2, 3, 1) * pixels * 2 / size
    return functional.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=True)[
        :, 0
    ].byte()


def test_real_outlines_are_like_others_and_deformed_ones_are_not(drawn: tuple[list[Scene], Rendered]) -> None:
    known, one = sample_scenes(150, 20, num_objects=1), [s for s in drawn[0] if s.num_objects == 1]
    bank = OutlineBank.of(render(known, 20).masks, known)
    masks = drawn[1].masks[: len(one)]

    def share_alike(masks: Tensor) -> float:
        values = [value for row in overlaps(bank, masks, one) for value in row]
        return sum(value >= 0.85 for value in values) / len(values)

    assert share_alike(masks) == 1
    assert share_alike(squashed(masks, 0.6)) < 0.2
    assert share_alike(melted(masks, 4)) < 0.5
    assert share_alike(torch.zeros_like(masks)) == 0


def test_an_outline_loses_its_place_and_size_and_keeps_its_proportions() -> None:
    for height, width in ((10, 30), (20, 60), (30, 10)):
        mask = torch.zeros(96, 96, dtype=torch.bool)
        mask[7 : 7 + height, 20 : 20 + width] = True
        ys, xs = normalised(mask).nonzero(as_tuple=True)
        seen = [int(places.amax() - places.amin()) + 1 for places in (ys, xs)]
        assert seen == pytest.approx([16 * (height / width) ** 0.5, 16 * (width / height) ** 0.5], abs=1)
        assert (ys.float().mean().item(), xs.float().mean().item()) == pytest.approx((19.5, 19.5), abs=0.6)


def test_a_solid_that_is_missing_is_not_counted(drawn: tuple[list[Scene], Rendered]) -> None:
    scenes, rendered = drawn
    for scene, mask in zip(scenes, rendered.masks, strict=True):
        without = mask.masked_fill(mask == scene.num_objects, 0)
        assert num_solids(without) == scene.num_objects - 1


def test_blur_costs_contrast_and_crispness(drawn: tuple[list[Scene], Rendered]) -> None:
    images, masks = drawn[1].images, drawn[1].masks

    def blurred(width: int) -> Tensor:
        padded = functional.pad(images.permute(0, 3, 1, 2).float(), (width // 2,) * 4, mode="replicate")
        return functional.avg_pool2d(padded, width, 1).permute(0, 2, 3, 1).round().byte()

    assert edge_contrast(images, images, masks) == pytest.approx(1)
    assert 0.9 > edge_contrast(blurred(3), images, masks) > edge_contrast(blurred(5), images, masks) > 0
    assert crispness(images, masks) > 0.6
    assert crispness(images, masks) > 1.5 * crispness(blurred(3), masks) > 2 * crispness(blurred(5), masks)


def test_mirrored_masks_are_those_of_the_mirrored_scene(drawn: tuple[list[Scene], Rendered]) -> None:
    scenes, rendered = drawn
    masks = mirrored_masks(rendered.masks, scenes)
    for scene, mask in zip(scenes, masks, strict=True):
        middles = [
            (mask == slot + 1).nonzero()[:, 1].float().mean().item() for slot in range(scene.num_objects)
        ]
        if scene.mirrored().place in ("left of", "row"):
            assert middles == sorted(middles)
    assert torch.equal(mirrored_masks(masks, [scene.mirrored() for scene in scenes]), rendered.masks)


def test_a_tokens_place_shows_what_the_mask_says() -> None:
    scene = Scene((CUBE, BALL), "left of", "wood", "day", "level")
    drawn = render([scene], 1)
    code = PatchCode.fit(drawn.images, 32)
    lessons = make_lessons(drawn.images, drawn.masks, [scene], code, TeacherConfig(patch_size=2))
    assert lessons.latents.shape == (2, 32, 12, 12)
    assert lessons.shows.shape == (2, 6, 6, 3)
    cube, ball = (
        [SHAPES.index(s.shape), list(COLOURS).index(s.colour), MATERIALS.index(s.material)]
        for s in (CUBE, BALL)
    )
    for shows, left, right in ((lessons.shows[0], cube, ball), (lessons.shows[1], ball, cube)):
        assert left in shows[:, :3].flatten(0, 1).tolist()
        assert right not in shows[:, :3].flatten(0, 1).tolist()
        assert right in shows[:, 3:].flatten(0, 1).tolist()
        assert shows[0, 0].tolist() == [len(SHAPES), -100, -100]
    assert lessons.cover[0, :, :6].sum() > lessons.cover[0, :, 6:].sum()


@pytest.mark.slow  # processes that import torch
def test_captions_are_the_same_whoever_writes_them() -> None:
    scenes = sample_scenes(1200, 0, num_objects=1)
    alone, together = (written_captions(scenes, 3, processes) for processes in (1, 2))
    assert torch.equal(alone[0], together[0])
    assert torch.equal(alone[1], together[1])


def test_tokens_are_asked_in_training_and_the_question_moves_the_loss() -> None:
    config = TeacherConfig(num_layers=2, num_heads=2, reading_layer=1)
    transformer = make_transformer(config)
    asker = TokenReader(transformer, config)
    text = torch.zeros(1, 4, D_MODEL)
    transformer(
        torch.randn(1, 32, 12, 12),
        encoder_hidden_states=text,
        timestep=torch.tensor([500]),
        encoder_attention_mask=torch.ones(1, 4),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    shows = torch.full((1, 6, 6, 3), 0, dtype=torch.int8)
    asker.loss(shows).backward()
    first, second = (block.attn1.to_q.weight.grad for block in transformer.transformer_blocks)
    assert first is not None
    assert first.abs().sum() > 0
    assert second is None


def test_an_eye_keeps_its_weights_and_outlines(tmp_path: Path, drawn: tuple[list[Scene], Rendered]) -> None:
    scenes, rendered = drawn
    torch.manual_seed(0)
    eye = Eye(Reader().eval(), OutlineBank.of(rendered.masks, scenes))
    eye.save(tmp_path / "reader.safetensors")
    again = Eye.load(tmp_path / "reader.safetensors")
    for one, other in zip(eye.bank.outlines, again.bank.outlines, strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(eye.features(rendered.images[:4]), again.features(rendered.images[:4]), atol=2e-2)


def test_an_eye_calls_a_picture_sound_only_with_the_right_number_of_undeformed_solids() -> None:
    scene = Scene((CUBE, BALL), "left of", "wood", "day", "level")
    assert Look(scene, (0.95, 0.95), 2).is_sound
    assert not Look(scene, (0.95, 0.8), 2).is_sound
    assert not Look(scene, (0.95, 0.95), 1).is_sound
    assert not Look(scene, (0.95, 0.95), 3).is_sound


def test_answers_say_all_of_a_scene() -> None:
    scenes = scenes_of_all_numbers(100, 8)
    assert [scene_of(answers(scene)) for scene in scenes] == scenes


def test_spoilt_pictures_differ_where_they_should(
    drawn: tuple[list[Scene], Rendered],
) -> None:
    images, masks = drawn[1].images, drawn[1].masks
    spoilt = spoilt_pictures(images, masks)
    assert set(spoilt) == {"blurred", "melted", "squashed", "one_missing"}
    last = masks == masks.flatten(1).amax(1)[:, None, None]
    changed = (spoilt["one_missing"] != images).any(-1)
    assert changed[last].float().mean() > 0.9
    assert not changed[masks == 0].float().mean() > 0.1
    assert crispness(spoilt["blurred"], masks) < 0.5 * crispness(images, masks)


def test_every_question_of_the_exam_is_answered_by_its_own_scene() -> None:
    questions = ask(20, 3)
    assert len(questions) == 20 * len(GROUPS)
    looks = [Look(scene, (1.0,) * scene.num_objects, scene.num_objects) for scene in questions.scenes]
    assert all(
        row == {"said": 100, "sound": 100, "exact": 100} for row in marks_of(questions, looks).values()
    )
    held_out = [scene.is_held_out() for scene in questions.asked]
    assert held_out == [group.startswith("held_out") for group in questions.groups]
    looks[0] = Look(questions.scenes[0], (0.5,), 1)
    assert marks_of(questions, looks)["one"] == {"said": 100, "sound": 95, "exact": 95}


def test_a_caption_reader_is_asked_for_exactly_what_captions_say() -> None:
    ids, masks, asked = captions_to_read(60, 1)
    assert ids.shape == masks.shape == (60, TRAIN_TOKENS)
    logits = CaptionReader()(torch.randn(60, TRAIN_TOKENS, D_MODEL), masks)
    assert len(logits) == asked.shape[1]
    for head, column in zip(logits, asked.unbind(1), strict=True):
        assert int(column.max()) < head.shape[1]


def test_contrast_the_wrong_way_round_is_no_contrast(drawn: tuple[list[Scene], Rendered]) -> None:
    images, masks = drawn[1].images, drawn[1].masks
    assert edge_contrast(255 - images, images, masks) == pytest.approx(-1)


START = Path(__file__).parents[2] / "engines" / "demo" / "checkpoints" / "studio-start"


def test_shipped_beginning_of_a_teacher_is_one_to_go_on_from() -> None:
    transformer, encoder = make_transformer(TeacherConfig()), make_text_encoder()
    steps = load_average(START / "teacher.safetensors", {"transformer": transformer, "text_encoder": encoder})
    assert steps >= 20_000
    assert load_file(START / "code.safetensors")["encode_matrix"].isfinite().all()
    assert all(p.isfinite().all() and p.any() for p in transformer.parameters())


def test_shipped_text_encoder_reads_captions_that_it_has_never_met() -> None:
    encoder, reader = make_text_encoder().eval(), CaptionReader().eval()
    assert load_average(START / "text.safetensors", {"encoder": encoder, "reader": reader}) == 1500
    ids, masks, asked = captions_to_read(300, 1234)
    with torch.no_grad():
        read = reader(encoder(ids, attention_mask=masks).last_hidden_state, masks)
    right = torch.stack([logits.argmax(1) for logits in read], dim=1) == asked
    assert right.all(1).float().mean().item() > 0.97

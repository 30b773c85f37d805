"""The studio's teacher: a PixArt that draws what its text encoder has read, in the diffusers pipeline layout.

Beside the usual loss, its tokens in the middle of the network are asked what will be seen in their place:
which shape, colour and material, or none. The answers are known from the renderer's masks, and asking for
them is meant to bind attributes to places long before the pictures would show it. The questions are thrown
away after training (compare REPA, arXiv:2410.06940, which aligns the middle with features of a picture).
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5EncoderModel

from engines.demo.codec import PatchCode
from engines.demo.fit import FitConfig, autocast, fit
from engines.demo.scenes import COLOURS, SHAPES
from engines.demo.studio.codec import LATENT_CHANNELS, LATENT_SIZE
from engines.demo.studio.scenes import MATERIALS, MAX_OBJECTS, Scene
from engines.demo.studio.text import ids_of, said_in
from engines.demo.teachers import TeacherConfig as Transformer
from engines.demo.teachers import make_scheduler, make_transformer
from engines.schedule import NoiseSchedule

_CAPTIONS = 4
_OF_TOKEN = (1 + len(SHAPES), len(COLOURS), len(MATERIALS))
_IGNORE = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig(Transformer):
    """Size of the transformer, by default 4.0 M parameters and 36 image tokens, and what its loss asks for.

    Attributes:
        object_weight: how much more a latent cell counts that a solid fills.
        reading_weight: of the question what a token's place shows; 0: it is not asked.
        reading_layer: whose output is asked, counted from 1.
        noise_power: timesteps are drawn as u ** noise_power, u uniform: below 1 prefers noisy ones.
    """

    sample_size: int = LATENT_SIZE
    latent_channels: int = LATENT_CHANNELS
    object_weight: float = 3.0
    reading_weight: float = 0.3
    reading_layer: int = 3
    noise_power: float = 1.0


@dataclass(frozen=True, slots=True)
class Lessons:
    """Training set in memory, of N pictures and their mirror images.

    Attributes:
        latents: (2N, 32, 12, 12) fp16.
        ids, masks: (2N, captions per picture, tokens).
        cover: (2N, 12, 12) fp16, share of a latent cell that solids fill.
        shows: (2N, h, w, 3) int8, what a token's place shows most: shape (or `len(SHAPES)`: no solid),
            colour and material (-100 where there is none).
    """

    latents: Tensor
    ids: Tensor
    masks: Tensor
    cover: Tensor
    shows: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, device: str) -> "Lessons":
        return Lessons(*(getattr(self, name).to(device) for name in self.__slots__))


def mirrored_masks(masks: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Masks (N, H, W) of the mirror images of scenes; slots are counted anew where left and right matter."""
    turned = [scene.num_objects if scene.place in ("left of", "row") else 0 for scene in scenes]
    last = torch.tensor(turned, dtype=torch.uint8, device=masks.device)[:, None, None]
    flipped = masks.flip(2)
    return torch.where((flipped > 0) & (last > 0), last + 1 - flipped, flipped)


def _shows(masks: Tensor, scenes: Sequence[Scene], cell: int) -> Tensor:
    """`Lessons.shows` for cells of so many pixels; of a solid, a quarter of one has to be filled."""
    shares = torch.stack(
        [functional.avg_pool2d((masks == slot + 1).float(), cell) for slot in range(MAX_OBJECTS)], dim=-1
    )
    share, slot = shares.max(-1)
    which = torch.where(share >= 0.25, slot + 1, 0)
    colours, none = tuple(COLOURS), [_IGNORE] * 3
    table = []
    for scene in scenes:
        solids = [
            [SHAPES.index(s.shape), colours.index(s.colour), MATERIALS.index(s.material or "")]
            for s in scene.solids
        ]
        table.append([[len(SHAPES), _IGNORE, _IGNORE], *solids, *[none] * (MAX_OBJECTS - len(solids))])
    rows = torch.arange(len(scenes))[:, None, None]
    return torch.tensor(table, dtype=torch.int8)[rows, which.cpu()]


def make_lessons(
    images: Tensor,
    masks: Tensor,
    scenes: Sequence[Scene],
    code: PatchCode,
    config: TeacherConfig,
    *,
    seed: int = 0,
    num_processes: int = 1,
) -> Lessons:
    """Latents, captions and answers of (N, 96, 96, 3) uint8 pictures and of their mirror images.

    Args:
        images, masks, scenes: as they were rendered.
        code: of the latents; on the pictures' device.
        config: whose tokens are asked.
        seed: of the captions.
        num_processes: to write captions in.
    """
    both = [*scenes, *(scene.mirrored() for scene in scenes)]
    ids, said = written_captions(both, seed, num_processes)
    all_masks = torch.cat([masks, mirrored_masks(masks, scenes)])
    latents = [code.encode(view).half() for flip in (False, True) for part in images.split(500)
               for view in [part.flip(2) if flip else part]]  # fmt: skip
    cell = masks.shape[1] // LATENT_SIZE
    parts = all_masks.split(2000)
    cover = [functional.avg_pool2d((part > 0).float(), cell).half() for part in parts]
    shows = [
        _shows(part, both[i * 2000 : i * 2000 + len(part)], cell * config.patch_size)
        for i, part in enumerate(parts)
    ]
    return Lessons(torch.cat(latents), ids, said, torch.cat(cover), torch.cat(shows))


def written_captions(scenes: Sequence[Scene], seed: int, num_processes: int) -> tuple[Tensor, Tensor]:
    """Ids and masks (N, captions per picture, tokens); the same for any number of processes."""
    parts = [(scenes[i : i + 1000], seed, i) for i in range(0, len(scenes), 1000)]
    if num_processes > 1:
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
            written = list(pool.map(_captions_of, parts))
    else:
        written = [_captions_of(part) for part in parts]
    ids, masks = zip(*written, strict=True)
    return torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(masks))


def _captions_of(
    part: tuple[Sequence[Scene], int, int],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    scenes, seed, start = part
    rng = np.random.default_rng([seed, start, 9])
    ids, masks = zip(*(ids_of(said_in(scenes, rng)) for _ in range(_CAPTIONS)), strict=True)
    return torch.stack(ids, 1).numpy(), torch.stack(masks, 1).numpy()


class TokenReader(nn.Module):
    """Asks the tokens of one block's output what their places show."""

    def __init__(self, transformer: PixArtTransformer2DModel, config: TeacherConfig) -> None:
        super().__init__()
        self.answer = nn.Linear(config.num_heads * config.head_dim, sum(_OF_TOKEN))
        self._tokens: list[Tensor] = []
        block = transformer.transformer_blocks[config.reading_layer - 1]
        block.register_forward_hook(lambda _module, _inputs, output: self._tokens.append(output))

    def loss(self, shows: Tensor) -> Tensor:
        """Of the last forward pass, for (B, h, w, 3) `Lessons.shows`; scalar."""
        tokens = self._tokens.pop()
        self._tokens.clear()
        targets = shows.flatten(0, 2).long()
        logits = self.answer(tokens.float()).flatten(0, 1).split(_OF_TOKEN, dim=1)
        shape, colour, material = (
            functional.cross_entropy(head, target, ignore_index=_IGNORE)
            for head, target in zip(logits, targets.unbind(1), strict=True)
        )
        return shape + 0.3 * colour + 0.15 * material


def train_teacher(
    lessons: Lessons,
    text_encoder: T5EncoderModel,
    config: TeacherConfig,
    fit_config: FitConfig,
    directory: Path,
    *,
    batch: int = 64,
    caption_dropout: float = 0.1,
    begin: Path | None = None,
) -> tuple[PixArtTransformer2DModel, T5EncoderModel]:
    """Train transformer and text encoder with the v-prediction loss (Salimans & Ho, arXiv:2202.00512).

    Args:
        lessons: pictures; those on `fit_config.device` are drawn from fastest.
        text_encoder: trained on; one that has read captions saves most of the time.
        config: what is trained.
        fit_config: how.
        directory: of checkpoint and log.
        batch: pictures of a step.
        caption_dropout: share that learns without a caption, for guidance.
        begin: averaged weights of an earlier training of the same `config`.
    """
    torch.manual_seed(fit_config.seed)
    transformer = make_transformer(config)
    device = fit_config.device
    schedule = NoiseSchedule.from_config(dict(make_scheduler().config)).to(device)
    nothing = ids_of([""])
    modules: dict[str, nn.Module] = {"transformer": transformer, "text_encoder": text_encoder}
    asker = TokenReader(transformer, config) if config.reading_weight else None
    if asker is not None:
        modules["asker"] = asker
    on_cpu = device == "cpu"

    def loss(rng: torch.Generator) -> Tensor:
        rows, ids, mask = _draw_captions(lessons, nothing, batch, caption_dropout, rng)
        strata = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch  # of noise levels, evenly
        timesteps = (strata**config.noise_power * schedule.num_timesteps).long().to(device)
        drawn = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng)))
        longest = int(mask.sum(1).max()) if on_cpu else mask.shape[1]
        ids, mask = ids[:, :longest].to(device), mask[:, :longest].to(device)
        clean = lessons.latents[rows].to(device).float()
        noise = torch.randn(clean.shape, generator=drawn, device=device)
        alpha, sigma = schedule.at(timesteps)
        with autocast(device), sdpa_kernel([SDPBackend.MATH] if on_cpu else _FUSED):
            text = text_encoder(ids, attention_mask=mask).last_hidden_state
            prediction = transformer(
                alpha * clean + sigma * noise,
                encoder_hidden_states=text,
                timestep=timesteps,
                encoder_attention_mask=mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        weight = 1 + config.object_weight * lessons.cover[rows].to(device).float()
        error = (prediction.float() - (alpha * noise - sigma * clean)).square().mean(1)
        total: Tensor = (error * weight).sum() / weight.sum()
        if asker is not None:
            total = total + config.reading_weight * asker.loss(lessons.shows[rows].to(device))
        return total

    fit("teacher", modules, loss, fit_config, directory, begin=begin)
    return transformer.eval(), text_encoder.eval()


def _draw_captions(
    lessons: Lessons,
    nothing: tuple[Tensor, Tensor],
    batch: int,
    caption_dropout: float,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """(batch,) rows of pictures; (batch, tokens) ids and mask of a caption of each, or `nothing`."""
    rows = torch.randint(len(lessons), (batch,), generator=rng)
    which = torch.randint(lessons.ids.shape[1], (batch,), generator=rng)
    dropped = torch.rand(batch, 1, generator=rng) < caption_dropout
    here = lessons.latents.device
    rows, which, dropped = rows.to(here), which.to(here), dropped.to(here)
    no_ids, no_mask = (part.to(here) for part in nothing)
    ids = torch.where(dropped, no_ids, lessons.ids[rows, which])
    return rows, ids, torch.where(dropped, no_mask, lessons.masks[rows, which])


_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

"""The studio's recipe: which pictures each stage sees, and how the stages build on one another.

Every stage goes on where it was interrupted; what is finished is not done again.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.demo.codec import PatchCode
from engines.demo.dataset import SHARD_SIZE
from engines.demo.fit import FitConfig, keep_average, load_average
from engines.demo.studio.captions import make_tokenizer
from engines.demo.studio.codec import LATENT_CHANNELS, decoded, make_vae, train_vae
from engines.demo.studio.dataset import Pictures, StudioSet, draw_set, read_set
from engines.demo.studio.exam import (
    Questions,
    ask,
    examine,
    inspect_eye,
    paint,
    psnr,
    reference,
    save_sheet,
)
from engines.demo.studio.outlines import OutlineBank, crispness, edge_contrast
from engines.demo.studio.reader import Eye, train_reader
from engines.demo.studio.renderer import render
from engines.demo.studio.teachers import TeacherConfig, make_lessons, train_teacher
from engines.demo.studio.text import make_text_encoder, train_text
from engines.demo.teachers import make_transformer, save_teacher
from engines.errors import CheckpointError
from engines.gate.painter import Painter

STAGES = ("pictures", "reader", "vae", "text", "teacher", "assemble", "exam")
RESULTS = "results.json"
SAMPLERS = ((50, 2.0), (50, 1.0), (8, 2.0), (4, 2.0), (4, 1.0), (2, 1.0), (1, 1.0))
"""Steps and guidance of the exam's rows."""


_TRAINED = ("reader", "vae", "text", "teacher")
_CODE = "code.safetensors"
_STAGES_OF = {
    "pictures": ("pictures",),
    "judge": ("reader",),
    "vae": ("vae",),
    "train": ("text", "teacher"),
    "assemble": ("assemble", "exam"),
}


def run_recipe(args: argparse.Namespace) -> int:
    """Run the stages that `demo-teacher --kind studio` was asked for."""
    num_threads = args.threads or os.cpu_count() or 1
    torch.set_num_threads(num_threads)

    def fit(num_steps: int, rate: float, **more: Any) -> FitConfig:
        config = FitConfig(num_steps=num_steps, learning_rate=rate, device=args.device, save_every=250)
        return replace(config, **more)

    recipe = Recipe(
        out=args.out,
        train_shards=args.scenes,
        all_shards=max(1, args.scenes // 3),
        fits={
            "reader": fit(args.judge_steps, 2e-3, ema_decay=0.995),
            "vae": fit(args.vae_steps, 2e-3, weight_decay=0.0),
            "text": fit(1500, 1.5e-3, ema_decay=0.99),
            "teacher": fit(args.teacher_steps, 1e-3, ema_decay=0.999),
        },
        batches={"reader": 64, "vae": 16, "text": 128, "teacher": args.batch},
        teacher_config=TeacherConfig(num_layers=args.layers, num_heads=args.heads),
        start=args.start,
        num_processes=num_threads,
    )
    recipe.run([stage for asked in args.stages for stage in _STAGES_OF[asked]])
    if args.keep is not None:
        recipe.keep(args.keep)
    return 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One method per stage; each finds what the earlier ones left in `out`.

    Attributes:
        out: working directory.
        train_shards: thousands of pictures without held-out pairs; teacher and VAE see these.
        all_shards: thousands with every pair, for the reader.
        fits: how reader, vae, text and teacher are trained, by stage.
        batches: their batch sizes.
        teacher_config: what is trained.
        start: what `keep` has written; stages that have nothing yet go on from there, its steps counted.
        questions: prompts of each group in the exam.
        captions: that the text encoder learns to read from.
        num_processes: renderers side by side; unused on a GPU, which renders by itself.
        render_chunk: pictures cast together.
        shard_size: pictures of a shard; less than a thousand to try things out.
    """

    out: Path
    train_shards: int
    all_shards: int
    fits: dict[str, FitConfig]
    batches: dict[str, int]
    teacher_config: TeacherConfig
    start: Path | None = None
    questions: int = 200
    captions: int = 24_000
    num_processes: int = 1
    render_chunk: int = 4
    shard_size: int = SHARD_SIZE
    console: Console = field(default_factory=Console)
    _kept: dict[StudioSet, Pictures] = field(default_factory=dict, init=False, repr=False)

    @property
    def device(self) -> str:
        return self.fits["teacher"].device

    def run(self, stages: Sequence[str] = STAGES, *, skip_finished: bool = False) -> None:
        """Run stages in order.

        Args:
            stages: some of `STAGES`.
            skip_finished: leave out those that an earlier run has ended. Without it their networks are
                loaded, trained on if more steps are asked for than before, and measured again.
        """
        seconds: dict[str, float] = self._noted().get("seconds", {})
        for stage in stages:
            if skip_finished and stage in seconds:
                continue
            self.console.rule(stage)
            began = time.monotonic()
            getattr(self, stage)()
            seconds[stage] = round(time.monotonic() - began, 1)
            self._note("seconds", seconds)

    @property
    def train_set(self) -> StudioSet:
        return StudioSet(
            num_shards=self.train_shards, seed=100_000, split="train", shard_size=self.shard_size
        )

    @property
    def all_set(self) -> StudioSet:
        return StudioSet(num_shards=self.all_shards, seed=900_000, split="all", shard_size=self.shard_size)

    @property
    def held_back(self) -> StudioSet:
        return StudioSet(num_shards=1, seed=990_000, split="all", shard_size=self.shard_size)

    def pictures(self) -> None:
        """Render everything; on a GPU it is rendered when it is needed."""
        if self.device == "cpu":
            for scenes in (self.held_back, self.all_set, self.train_set):
                self._read(scenes)

    def reader(self) -> None:
        """Train the reader and say what it sees in pictures that it does not know, and in deformed ones."""
        known = self._read(self.all_set)
        network = train_reader(
            known.images,
            known.masks,
            known.scenes,
            self.fits["reader"],
            self.out / "reader",
            batch=self.batches["reader"],
            begin=self._begin("reader"),
        )
        Eye(network, OutlineBank.of(known.masks.cpu(), known.scenes)).save(self._eye_path)
        self._note("reader", inspect_eye(self._eye(), self._read(self.held_back)))

    def vae(self) -> None:
        """Fit the VAE to the patch code, and say what is left of outlines."""
        seen = self._read(self.train_set)
        vae = train_vae(
            seen.images,
            seen.masks,
            self._code(),
            self.fits["vae"],
            self.out / "vae",
            batch=self.batches["vae"],
            begin=self._begin("vae"),
        )
        fresh = self._read(self.held_back)
        images, masks = fresh.images.cpu(), fresh.masks.cpu()
        coded, linear = self._code().encode(images), self._code()
        pictures = decoded(vae, coded)
        guess = ((linear.decode(coded).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        self._note(
            "vae",
            {
                "edge_contrast": round(edge_contrast(pictures, images, masks), 4),
                "edge_contrast_of_linear_code": round(edge_contrast(guess, images, masks), 4),
                "psnr_db": round(psnr(pictures, images), 2),
                "crispness": round(crispness(pictures, masks), 4),
                "crispness_of_renders": round(crispness(images, masks), 4),
            },
        )

    def text(self) -> None:
        """Teach the text encoder to read."""
        train_text(
            self.fits["text"],
            self.out / "text",
            num=self.captions,
            batch=self.batches["text"],
            begin=self._begin("text"),
        )

    def teacher(self) -> None:
        """Train transformer and text encoder on exact codes."""
        encoder = make_text_encoder()
        load_average(self.out / "text" / "text.safetensors", {"encoder": encoder})
        seen = self._read(self.train_set)
        code = self._code()
        code = PatchCode(code.mean.to(seen.images.device), code.encode_matrix.to(seen.images.device))
        lessons = make_lessons(
            seen.images,
            seen.masks,
            seen.scenes,
            code,
            self.teacher_config,
            num_processes=self.num_processes,
        ).to(self.device)
        train_teacher(
            lessons,
            encoder,
            self.teacher_config,
            self.fits["teacher"],
            self.out / "teacher",
            batch=self.batches["teacher"],
            begin=self._begin("teacher"),
        )

    def assemble(self) -> None:
        """Write the averaged weights as a diffusers directory."""
        vae, transformer, encoder = make_vae(), make_transformer(self.teacher_config), make_text_encoder()
        for name, modules in (
            ("vae", {"vae": vae}),
            ("teacher", {"transformer": transformer, "text_encoder": encoder}),
        ):
            path = self.out / name / f"{name}.safetensors"
            if not path.exists():
                raise CheckpointError(f"{path} is missing: its stage has not run")
            load_average(path, modules)
        save_teacher(self.out / "studio-teacher", make_tokenizer(), encoder, vae, transformer)

    def exam(self) -> None:
        """Say how well the teacher draws, sampler by sampler, beside renders and the VAE's copies of them."""
        eye, questions = self._eye(), ask(self.questions, seed=1)
        reals = self._rendered(questions)
        real = reference(eye, self._rendered(ask(self.questions, seed=2)))
        rows = {"renders": examine(eye, questions, reals, real)}
        vae = make_vae()
        load_average(self.out / "vae" / "vae.safetensors", {"vae": vae})
        vae.to(self.device)
        rows["vae"] = examine(eye, questions, decoded(vae, self._code().encode(reals)), real)
        painter = Painter(self.out / "studio-teacher", batch=500, device=self.device)
        columns = [reals]
        for num_steps, guidance in SAMPLERS:
            pictures = paint(painter, questions, num_steps=num_steps, guidance_scale=guidance)
            rows[f"steps-{num_steps}-cfg-{guidance:g}"] = examine(eye, questions, pictures, real)
            columns.append(pictures)
        self._note("exam", rows)
        save_sheet(columns, self.out / "exam.png", every=max(1, self.questions // 3))

    def keep(self, directory: Path) -> None:
        """Write what has been learnt so far, small enough to go on from elsewhere (`start`)."""
        directory.mkdir(parents=True, exist_ok=True)
        steps = {}
        for stage in _TRAINED:
            path = self.out / stage / f"{stage}.safetensors"
            if path.exists():
                steps[stage] = keep_average(path, directory / path.name)
        if (self.out / _CODE).exists():
            shutil.copyfile(self.out / _CODE, directory / _CODE)
        self.console.print(f"kept in {directory}, by steps trained: {steps}")

    def _begin(self, stage: str) -> Path | None:
        """Averaged weights for a stage to begin with."""
        path = None if self.start is None else self.start / f"{stage}.safetensors"
        return path if path is not None and path.exists() else None

    def _rendered(self, questions: Questions) -> Tensor:
        drawn = render(questions.scenes, questions.seed, device=self.device, chunk=self.render_chunk)
        return drawn.images

    @property
    def _eye_path(self) -> Path:
        return self.out / "reader.safetensors"

    def _eye(self) -> Eye:
        eye = Eye.load(self._eye_path)
        eye.reader.to(self.device)
        return eye

    def _read(self, scenes: StudioSet) -> Pictures:
        if scenes not in self._kept:
            if self.device == "cpu":
                self._kept.clear()  # a set takes a gigabyte
                read = read_set(scenes, self.out / "pictures", num_processes=self.num_processes)
            else:
                read = draw_set(scenes, self.device, chunk=self.render_chunk)
            self._kept[scenes] = read
        return self._kept[scenes]

    def _code(self) -> PatchCode:
        path = self.out / _CODE
        started = None if self.start is None else self.start / _CODE
        if started is not None and started.exists() and not path.exists():  # its teacher knows no other
            self.out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(started, path)
        if not path.exists():
            some = self._read(self.train_set).images[:: max(1, len(self.train_set) // 2000)].cpu()
            fitted = PatchCode.fit(some, LATENT_CHANNELS)
            self.out.mkdir(parents=True, exist_ok=True)
            save_file({"mean": fitted.mean, "encode_matrix": fitted.encode_matrix}, path)
        stored = load_file(path)
        return PatchCode(stored["mean"], stored["encode_matrix"])

    def _noted(self) -> dict[str, Any]:
        path = self.out / RESULTS
        noted: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return noted

    def _note(self, name: str, what: Any) -> None:
        """Add to the results."""
        self.out.mkdir(parents=True, exist_ok=True)
        results = json.dumps(self._noted() | {name: what}, indent=1)
        (self.out / RESULTS).write_text(results + "\n")
        self.console.print_json(json.dumps({name: what}))

"""The demo's recipe: which pictures each stage sees, and how the stages build on one another."""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.demo.codec import PatchCode, make_vae, train_vae
from engines.demo.dataset import SceneSet, render_set
from engines.demo.fit import FitConfig, load_average
from engines.demo.judge import Judge, accuracy, train_judge
from engines.demo.teachers import TeacherConfig, encode_set, make_transformer, save_teacher, train_teacher
from engines.demo.text import make_text_encoder, make_tokenizer
from engines.errors import CheckpointError

JUDGE_SET = SceneSet(num_shards=24, seed=900_000, split="all", two_object_share=0.5)
JUDGE_HELD_BACK = SceneSet(num_shards=2, seed=990_000, split="all", two_object_share=0.5)


def run_recipe(args: argparse.Namespace) -> int:
    """Run the stages that `demo-teacher` was asked for."""
    num_threads = args.threads or os.cpu_count() or 1
    torch.set_num_threads(num_threads)
    recipe = Recipe(
        out=args.out,
        train_set=SceneSet(num_shards=args.scenes, seed=100_000, split="train", two_object_share=0.4),
        teacher=TeacherConfig(num_layers=args.layers, num_heads=args.heads),
        judge_fit=FitConfig(
            num_steps=args.judge_steps, learning_rate=2e-3, ema_decay=0.995, device=args.device
        ),
        vae_fit=FitConfig(
            num_steps=args.vae_steps, learning_rate=1.5e-3, weight_decay=0.0, device=args.device
        ),
        teacher_fit=FitConfig(
            num_steps=args.teacher_steps,
            learning_rate=1e-3,
            ema_decay=0.999,
            save_every=250,
            device=args.device,
        ),
        teacher_batch=args.batch,
        num_processes=num_threads,
    )
    for stage in args.stages:
        recipe.console.rule(stage)
        getattr(recipe, stage)()
    return 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One method per stage of `demo-teacher`; each finds what the earlier ones left in `out`."""

    out: Path
    train_set: SceneSet
    teacher: TeacherConfig
    judge_fit: FitConfig
    vae_fit: FitConfig
    teacher_fit: FitConfig
    teacher_batch: int
    num_processes: int
    console: Console = field(default_factory=Console)

    @property
    def judge_path(self) -> Path:
        return self.out / "judge.safetensors"

    def pictures(self) -> None:
        """Render everything."""
        for scene_set in (JUDGE_SET, JUDGE_HELD_BACK, self.train_set):
            self._read(scene_set)

    def judge(self) -> None:
        """Train the reader and say how well it reads pictures it has never seen."""
        train_judge(self._read(JUDGE_SET), JUDGE_SET.scenes(), self.judge_fit, self.out / "judge").save(
            self.judge_path
        )
        images, scenes, judge = (
            self._read(JUDGE_HELD_BACK),
            JUDGE_HELD_BACK.scenes(),
            Judge.load(self.judge_path),
        )
        for num in (1, 2):
            rows = [i for i, scene in enumerate(scenes) if scene.num_objects == num]
            share = accuracy(judge, images[rows], [scenes[i] for i in rows])
            self.console.print(
                f"read exactly, of {len(rows)} fresh pictures with {num} object(s): {share:.2%}"
            )

    def vae(self) -> None:
        """Fit the VAE to the patch code."""
        images = torch.cat([self._read(self.train_set), self._read(JUDGE_SET)])
        train_vae(images, self._code(), self.vae_fit, self.out / "vae")

    def train(self) -> None:
        """Train transformer and text encoder on exact codes; the VAE may still be learning."""
        images = self._read(self.train_set)
        data = encode_set(images, self.train_set.scenes(), self._code())
        del images
        train_teacher(data, self.teacher, self.teacher_fit, self.out / "teacher", batch=self.teacher_batch)

    def assemble(self) -> None:
        """Write the averaged weights as a diffusers directory."""
        vae, transformer, text_encoder = make_vae(), make_transformer(self.teacher), make_text_encoder()
        for name, modules in (
            ("vae", {"vae": vae}),
            ("teacher", {"transformer": transformer, "text_encoder": text_encoder}),
        ):
            path = self.out / name / f"{name}.safetensors"
            if not path.exists():
                raise CheckpointError(f"{path} is missing: its stage has not run")
            load_average(path, modules)
        save_teacher(self.out / "scenes-teacher", make_tokenizer(), text_encoder, vae, transformer)
        self.console.print(f"teacher: {self.out / 'scenes-teacher'}")

    def _read(self, scene_set: SceneSet) -> Tensor:
        with self.console.status("rendering") as status:

            def say(done: int, total: int) -> None:
                status.update(f"rendering: {done} of {total} thousand pictures")

            directory = self.out / "pictures"
            pictures = render_set(scene_set, directory, num_processes=self.num_processes, on_shard=say)
        return torch.from_numpy(pictures)

    def _code(self) -> PatchCode:
        path = self.out / "code.safetensors"
        if not path.exists():
            fitted = PatchCode.fit(self._read(self.train_set)[::20])
            save_file({"mean": fitted.mean, "encode_matrix": fitted.encode_matrix}, path)
        stored = load_file(path)
        return PatchCode(stored["mean"], stored["encode_matrix"])

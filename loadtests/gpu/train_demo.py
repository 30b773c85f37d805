"""The studio's teacher from nothing, in one call of a few minutes on a GPU.

    python -m loadtests.gpu.train_demo --minutes 8 --deliver "$OUT"
    python -m loadtests.gpu.train_demo --toy    what a CPU can do in a minute: it runs, and teaches nothing

Pictures are rendered on the GPU and stay there; reader, VAE, text encoder and teacher are trained one after
the other, each for its share of the time; then the teacher is examined at 50 steps to 1. Called again with
the same `--out` it goes on where it was. What is worth keeping lies in `--deliver`, in six files:
`results.json` (hardware, plan, all measurements), `exam.png`, `studio-teacher.tar` (a `PixArtAlphaPipeline`
directory in fp16), `reader.safetensors`, `code.safetensors`, and the logs of the losses in `losses.jsonl`.
"""

import argparse
import json
import shutil
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engines.demo.fit import FitConfig
from engines.demo.studio.recipe import RESULTS, Recipe
from engines.demo.studio.teachers import TeacherConfig
from loadtests import machine

FIXED_SECONDS = 120.0
"""Start, rendering, captions and the exam: an estimate, nobody has timed them on a GPU."""
SHARES = {"reader": 0.2, "vae": 0.26, "text": 0.03, "teacher": 0.51}
"""Of the time that is left."""
_NEVER = 10_000_000


def plan(minutes: float) -> dict[str, float]:
    """Seconds of training for each stage that trains."""
    left = max(20.0, 60 * minutes - FIXED_SECONDS)
    return {stage: round(left * share, 1) for stage, share in SHARES.items()}


def gpu_recipe(out: Path, seconds: dict[str, float], args: argparse.Namespace) -> Recipe:
    """What fills a large GPU: big batches, more pictures than are seen twenty times."""

    def fit(stage: str, rate: float, **more: Any) -> FitConfig:
        config = FitConfig(
            num_steps=_NEVER,
            learning_rate=rate,
            device=args.device,
            max_seconds=seconds[stage],
            save_every=2000,
        )
        return replace(config, **more)

    return Recipe(
        out=out,
        train_shards=args.thousands,
        all_shards=max(1, args.thousands // 4),
        fits={
            "reader": fit("reader", 2e-3, ema_decay=0.995),
            "vae": fit("vae", 2e-3, weight_decay=0.0),
            "text": fit("text", 1.5e-3, ema_decay=0.99),
            "teacher": fit("teacher", args.rate, ema_decay=0.999),
        },
        batches={"reader": 256, "vae": 128, "text": 512, "teacher": args.batch},
        teacher_config=TeacherConfig(num_layers=args.layers, patch_size=args.patch),
        questions=400,
        num_processes=args.processes,
        render_chunk=256,
    )


def toy_recipe(out: Path) -> Recipe:
    """Everything once, as small as it gets."""
    fits = {
        stage: FitConfig(num_steps=2, learning_rate=1e-3, save_every=1, ema_decay=0.5) for stage in SHARES
    }
    return Recipe(
        out=out,
        train_shards=1,
        all_shards=1,
        fits=fits,
        batches={"reader": 4, "vae": 2, "text": 8, "teacher": 4},
        teacher_config=TeacherConfig(num_layers=1, num_heads=2, reading_layer=1),
        questions=2,
        captions=200,
        shard_size=40,
    )


def deliver(recipe: Recipe, to: Path, about: dict[str, object]) -> None:
    """Copy what is worth keeping, as far as there is any."""
    to.mkdir(parents=True, exist_ok=True)
    results = recipe.out / RESULTS
    known = json.loads(results.read_text()) if results.exists() else {}
    (to / RESULTS).write_text(json.dumps(about | known, indent=1) + "\n")
    for name in ("exam.png", "reader.safetensors", "code.safetensors"):
        if (recipe.out / name).exists():
            shutil.copyfile(recipe.out / name, to / name)
    logs = {stage: recipe.out / stage / f"{stage}.jsonl" for stage in SHARES}
    lines = [f'{{"stage": "{stage}"}}\n{log.read_text()}' for stage, log in logs.items() if log.exists()]
    (to / "losses.jsonl").write_text("".join(lines))
    directory = recipe.out / "studio-teacher"
    if directory.exists():
        with tarfile.open(to / "studio-teacher.tar", "w") as tar:
            tar.add(directory, arcname=directory.name)


def main(argv: list[str] | None = None) -> int:
    """Run, and deliver whatever there is in the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=machine.ROOT / "runs" / "studio", help="working directory"
    )
    parser.add_argument("--deliver", type=Path, help="where results go (default: OUT/delivered)")
    parser.add_argument("--minutes", type=float, default=8.0, help="all in all (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--thousands", type=int, default=80, help="training pictures (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2048, help="of the teacher (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=7, help="of the teacher (default: %(default)s)")
    parser.add_argument("--patch", type=int, default=2, help="latent cells of a token's side")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate of the teacher")
    parser.add_argument("--processes", type=int, default=12, help="that write captions")
    parser.add_argument("--toy", action="store_true", help="the smallest run there is, on the CPU")
    args = parser.parse_args(argv)

    began = time.monotonic()
    seconds = plan(args.minutes)
    if args.toy:
        args.device = "cpu"
    recipe = toy_recipe(args.out) if args.toy else gpu_recipe(args.out, seconds, args)
    about: dict[str, object] = {
        "machine": machine.describe(),
        "gpu": torch.cuda.get_device_name() if args.device != "cpu" else None,
        "torch": torch.__version__,
        "plan_seconds": seconds,
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }
    try:
        recipe.run(skip_finished=True)
    finally:
        about["wall_seconds"] = round(time.monotonic() - began, 1)
        deliver(recipe, args.deliver or args.out / "delivered", about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

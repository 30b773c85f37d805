"""One model on one backend in a process of its own: lines of JSON, one about it and one per batch size.

    python -m engines.bench.cell '{"model": "pixart-512", "backend": "aotinductor", ...}'

A process each, so that memory peaks do not mix and a crash costs one backend.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engines.bench.models import MODELS, NUM_STEPS, WORDS, Model, write_checkpoint
from engines.bundle.manifest import MANIFEST, Manifest
from engines.bundle.platform import Device
from engines.bundle.stages import Backend
from engines.compile.build import build_bundle, num_pieces
from engines.compile.export import example_inputs
from engines.compile.progress import BuildProgress
from engines.compile.settings import BuildSettings, Precision
from engines.families.spec import FAMILIES
from engines.processes import start_child
from engines.runtime.pipeline import Pipeline, Sample
from engines.runtime.timing import median_ms

Contender = Literal["aotinductor", "eager", "diffusers", "diffusers-compiled"]
CONTENDERS: tuple[Contender, ...] = ("aotinductor", "eager", "diffusers", "diffusers-compiled")
"""Ours compiled with CUDA graphs, ours uncompiled, diffusers' pipeline as it is, and with `torch.compile`."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to measure.

    Attributes:
        batches: that are still missing.
        all_batches: that the bundle is built for.
        work: folder for checkpoints and bundles, kept from call to call.
        seconds: time spent on each number.
        static: batch sizes that get a package of their own.
    """

    model: str
    backend: Contender
    device: Device
    toy: bool
    precision: Precision
    batches: Sequence[int]
    all_batches: Sequence[int]
    work: str
    seconds: float
    static: Sequence[int] = ()


def measure(request: Request) -> Iterator[dict[str, Any]]:
    """What there is to say of the contender, as `about`, then each batch size; one that does not fit says
    so.
    """
    model = MODELS[request.model]
    bundle = bundle_of(request)
    # where the bundle has it, and nowhere else: T5-XXL alone is 9.5 GB
    checkpoint = write_checkpoint(model, bundle / "checkpoint", toy=request.toy, device=request.device)
    if request.backend.startswith("diffusers"):
        draw, stages, described = _diffusers(request, model, checkpoint)
    else:
        draw, stages, described = _ours(request, model, bundle)
    yield {"about": described}
    for batch in sorted(request.batches):
        try:
            yield {"batch": batch, **_measure_batch(request, batch, draw, stages)}
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            yield {"batch": batch, "error": str(error).split(". ")[0]}
            gc.collect()
            if request.device == "cuda":
                torch.cuda.empty_cache()


def _measure_batch(
    request: Request,
    batch: int,
    draw: Callable[[int], object],
    stages: Callable[[int], dict[str, float]],
) -> dict[str, Any]:
    draw(batch)
    if request.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    # from prompts to pixels in the host's memory; the host's clock, because part of it is the host's work
    ms = median_ms(lambda: draw(batch), request.seconds)
    peak = torch.cuda.max_memory_allocated() if request.device == "cuda" else None
    return {"ms": round(ms, 3), "peak_bytes": peak, "stages_ms": stages(batch)}


def bundle_of(request: Request) -> Path:
    """Where the bundle of a request lies."""
    return Path(request.work) / f"{request.model}-{request.precision}"


def _build(request: Request, bundle: Path) -> float | None:
    """Build the bundle unless it is there; the seconds that took."""
    if (bundle / MANIFEST).is_file():
        return None
    settings = BuildSettings(
        student=bundle / "checkpoint",
        out=bundle,
        batch_sizes=tuple(request.all_batches),
        backends=(Backend.AOTINDUCTOR,),
        num_threads=1,
        num_jobs=1,
        decode_dtype="auto",
        force=True,
        ungated=True,
        allow_eager=False,
        device=request.device,
        precision=request.precision,
        static_batches=tuple(request.static),
    )
    from rich.console import Console

    start = time.perf_counter()
    with BuildProgress(Console(stderr=True), num_pieces(settings)) as progress:
        build_bundle(settings, progress)
    return round(time.perf_counter() - start, 1)


def _ours(
    request: Request, model: Model, bundle: Path
) -> tuple[Callable[[int], object], Callable[[int], dict[str, float]], dict[str, Any]]:
    build_s = _build(request, bundle)
    backend = Backend(request.backend)
    start = time.perf_counter()
    pipeline = Pipeline.load(bundle, backend=backend)
    loaded = time.perf_counter()
    pipeline.warm_up()
    described: dict[str, Any] = {
        "load_s": round(loaded - start, 2),
        "warm_up_s": round(time.perf_counter() - loaded, 2),
        "graphs": [_graph_row(decision) for decision in pipeline.graphs],
        "parity": _worst_parity(pipeline.manifest) if backend == Backend.AOTINDUCTOR else None,
    }
    if build_s is not None:
        described["build_s"] = build_s
    if pipeline.memory is not None:
        described["planned_bytes"] = pipeline.memory.total_bytes
    bucket = model.architecture(toy=request.toy).bucket
    prompts = fresh_prompts()

    def draw(batch: int) -> object:
        return pipeline.run(
            [
                Sample(prompt=next(prompts), seed=row, num_steps=NUM_STEPS, bucket=bucket)
                for row in range(batch)
            ]
        )

    def stages(batch: int) -> dict[str, float]:
        found: dict[str, float] = {}
        with pipeline.on_stream():
            for spec in pipeline.manifest.stages:
                stage = pipeline.stage(spec.name, bucket)
                inputs = tuple(tensor.to(stage.device) for tensor in example_inputs(spec, batch))
                ms = median_ms(lambda s=stage, i=inputs: s(*i), request.seconds, stage.device)  # type: ignore[misc]
                found[spec.name] = round(ms, 3)
        return found

    return draw, stages, described


def _graph_row(decision: Any) -> dict[str, Any]:
    row = asdict(decision)
    return {**row, "bucket": decision.bucket.label if decision.bucket else None}


def _worst_parity(manifest: Manifest) -> dict[str, float]:
    """Of each stage the worst cosine with eager in float32."""
    return {
        spec.name: min(row.cosine for row in manifest.parity if row.stage == spec.name)
        for spec in manifest.stages
    }


def _diffusers(
    request: Request, model: Model, checkpoint: Path
) -> tuple[Callable[[int], object], Callable[[int], dict[str, float]], dict[str, Any]]:
    """Diffusers' own pipeline on the same files, without what it does by default for nobody's good here."""
    import diffusers

    pipeline: Any = getattr(diffusers, FAMILIES[model.family]).from_pretrained(
        checkpoint, torch_dtype=DTYPES[request.precision], local_files_only=True
    )
    pipeline = pipeline.to(request.device)
    pipeline.set_progress_bar_config(disable=True)
    if request.backend == "diffusers-compiled":
        # as diffusers' own guides do; kernels chosen by timing, CUDA graphs
        mode = "max-autotune" if request.device == "cuda" else None
        network = "unet" if model.family == "sdxl" else "transformer"
        setattr(pipeline, network, torch.compile(getattr(pipeline, network), mode=mode))
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=mode)
    bucket = model.architecture(toy=request.toy).bucket
    options: dict[str, Any] = {
        "height": bucket.height,
        "width": bucket.width,
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": 1.0,
        "output_type": "pt",
        "return_dict": False,
    }
    length = model.architecture(toy=request.toy).max_text_tokens
    if model.family == "pixart":
        options |= {"use_resolution_binning": False, "clean_caption": False}
    if model.family != "sdxl":
        options["max_sequence_length"] = length
    if model.family == "cogvideox":
        options["num_frames"] = bucket.frames
    prompts = fresh_prompts()

    def draw(batch: int) -> object:
        generators = [torch.Generator(request.device).manual_seed(row) for row in range(batch)]
        with torch.inference_mode():
            (pictures,) = pipeline([next(prompts) for _ in range(batch)], generator=generators, **options)
            return (pictures * 255).round().to(torch.uint8).cpu().numpy()

    return draw, lambda _: {}, {}


def fresh_prompts() -> Iterator[str]:
    """Prompts that never come twice, so that no cache helps."""
    for number in itertools.count():
        yield " ".join([WORDS[number % len(WORDS)], WORDS[number // len(WORDS) % len(WORDS)], str(number)])


def main(argv: Sequence[str]) -> None:
    """Measure what the argument says; one line of JSON on stdout for each batch size."""
    start_child()
    for row in measure(Request(**json.loads(argv[0]))):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

"""TensorRT plans of all stages of a bundle."""

from __future__ import annotations

from collections.abc import Sequence

from engines.bundle.manifest import EngineFile
from engines.bundle.platform import Platform
from engines.bundle.stages import StageSpec
from engines.compile.progress import BuildProgress
from engines.compile.settings import BuildSettings
from engines.compile.tensorrt import UNTRIED, PlanJob, compile_plan
from engines.errors import CompileError
from engines.families.student import Student
from engines.runtime.tensorrt import import_tensorrt


def check_tensorrt(settings: BuildSettings) -> None:
    """Refuse to build plans where that cannot work.

    Raises:
        BackendUnavailable: TensorRT is not installed; with the remedy.
        CompileError: the bundle is for a CPU.
    """
    import_tensorrt()
    if settings.device != "cuda":
        raise CompileError("--backends tensorrt: plans run on a GPU; use --device cuda")


def plans_or_not(
    settings: BuildSettings,
    student: Student,
    specs: Sequence[StageSpec],
    platform: Platform,
    progress: BuildProgress,
) -> tuple[list[EngineFile], str | None]:
    """TensorRT plans of every stage, or why there are none."""
    progress.warn(UNTRIED)
    engines = []
    try:
        for spec in specs:
            progress.doing(f"building the plan of {spec.label}")
            job = PlanJob(
                family=student.family,
                spec=spec,
                batch_sizes=settings.batch_sizes,
                bundle=settings.out.resolve(),
                platform=platform,
                optimization_level=settings.optimization_level,
                workspace_bytes=settings.workspace_bytes,
            )
            engines.append(compile_plan(job))
            progress.done(f"built the plan of {spec.label}")
    except CompileError as error:
        if not settings.allow_eager:
            raise
        reason = f"no plan was built: {error}"
        progress.warn(reason)
        return [], reason
    return engines, None

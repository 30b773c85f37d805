"""Backends by name: what compiles the stages of a bundle for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from engines.bundle.manifest import EngineFile
from engines.bundle.platform import Platform
from engines.bundle.stages import Backend, StageSpec
from engines.compile.needed import EAGER_ASKED_FOR
from engines.compile.packages import num_packages, packages_or_not
from engines.compile.plans import check_tensorrt, plans_or_not
from engines.compile.progress import BuildProgress
from engines.compile.settings import BuildSettings
from engines.families.student import Student


class CompileStages(Protocol):
    """Compiles all stages of a bundle."""

    def __call__(
        self,
        settings: BuildSettings,
        student: Student,
        specs: Sequence[StageSpec],
        platform: Platform,
        progress: BuildProgress,
    ) -> tuple[list[EngineFile], str | None]:
        """The engines, or none and why.

        Raises:
            CompileError: a stage does not compile, and `settings.allow_eager` is off.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """What a backend that is compiled for provides.

    Attributes:
        check: refuse settings with which it cannot work; raises `CompileError` or `BackendUnavailable`.
        num_engines: of so many stages, for the progress bar.
        compile: all stages.
    """

    check: Callable[[BuildSettings], None]
    num_engines: Callable[[BuildSettings, int], int]
    compile: CompileStages


COMPILERS: Mapping[Backend, Compiler] = {
    Backend.AOTINDUCTOR: Compiler(
        check=lambda settings: None,  # noqa: ARG005  (where there is no compiler, eager serves)
        num_engines=num_packages,
        compile=packages_or_not,
    ),
    Backend.TENSORRT: Compiler(
        check=check_tensorrt,
        num_engines=lambda settings, num_stages: num_stages,  # noqa: ARG005
        compile=plans_or_not,
    ),
}
"""All but eager, which is what they are compiled from."""


def compilers(settings: BuildSettings) -> list[Compiler]:
    """Those that settings ask for, in their order."""
    return [COMPILERS[backend] for backend in settings.backends if backend in COMPILERS]


def compile_or_not(
    settings: BuildSettings,
    student: Student,
    specs: Sequence[StageSpec],
    platform: Platform,
    progress: BuildProgress,
) -> tuple[list[EngineFile], str | None]:
    """Compile every stage for every backend, or say why there is nothing compiled."""
    engines: list[EngineFile] = []
    reasons: list[str] = []
    for compiler in compilers(settings):
        made, reason = compiler.compile(settings, student, specs, platform, progress)
        engines += made
        reasons += [] if reason is None else [reason]
    return engines, None if engines else "; ".join(reasons) or EAGER_ASKED_FOR

"""Errors raised by `engines`; each class carries the stable code that users and the server see."""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """Base of every error that a user of `engines` can cause or fix."""

    code: ClassVar[str] = "engine_error"


class ConfigError(EngineError):
    """A settings file, or a setting in it, cannot be used."""

    code = "config_invalid"


class TrainingError(EngineError):
    """Training cannot go on; what was learned so far is saved."""

    code = "training_failed"


class GateError(EngineError):
    """A student could not be measured to the end; what was measured is kept."""

    code = "gate_failed"


class CheckpointError(EngineError):
    """A diffusers directory, or a file or field in it, cannot be used."""

    code = "checkpoint_invalid"


class BundleError(EngineError):
    """A bundle is damaged, foreign, or not a bundle; `field` names the part at fault."""

    code = "bundle_invalid"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[BundleError], tuple[str, str]]:
        return type(self), (self.field, self.message)  # it crosses process boundaries


class CompileError(EngineError):
    """A stage could not be exported or compiled."""

    code = "compile_failed"


class ParityError(EngineError):
    """A compiled stage does not agree with the eager one."""

    code = "parity_failed"


class MemoryPlanError(EngineError):
    """A bundle does not fit into the device's free memory; the message is the sum, line by line."""

    code = "out_of_memory"


class NonFiniteError(EngineError):
    """A sample became NaN or infinite; its picture would be garbage."""

    code = "non_finite"


class BackendUnavailable(EngineError):  # noqa: N818  (it names a state of the machine)
    """A backend was asked for that this machine or this bundle does not have."""

    code = "backend_unavailable"

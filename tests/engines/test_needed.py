"""Whether a bundle has to be built, and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engines.bundle.platform import current_platform
from engines.bundle.stages import Backend
from engines.compile import needed
from engines.compile.needed import NO_COMPILER, reason_to_build
from tests.engines.conftest import BATCH_SIZES
from tests.engines.tiny import make_tiny_checkpoint

# The compiler takes a minute on a quiet machine.
pytestmark = pytest.mark.timeout(2400)


def reason(student: Path, bundle: Path, *, backends: tuple[Backend, ...] = (Backend.EAGER,)) -> str | None:
    return reason_to_build(
        student, bundle, batch_sizes=BATCH_SIZES, backends=backends, num_threads=1, decode_dtype="auto"
    )


def test_nothing_is_needed_for_a_fitting_bundle(tiny_student: Path, compiled_bundle: Path) -> None:
    assert reason(tiny_student, compiled_bundle, backends=(Backend.AOTINDUCTOR,)) is None
    assert reason(compiled_bundle / "checkpoint", compiled_bundle, backends=(Backend.AOTINDUCTOR,)) is None


def test_missing_damaged_or_outdated_bundle_is_built(
    tiny_student: Path, eager_bundle: Path, tmp_path: Path
) -> None:
    assert reason(tiny_student, eager_bundle) is None
    assert reason(tiny_student, tmp_path) == "there is no bundle yet"
    damaged = shutil.copytree(eager_bundle, tmp_path / "damaged")
    (damaged / "checkpoint" / "model_index.json").unlink()
    assert "damaged (files.checkpoint/model_index.json" in str(reason(tiny_student, damaged))
    retrained = make_tiny_checkpoint(tmp_path / "retrained", seed=3)
    assert "student has changed" in str(reason(retrained, eager_bundle))
    grown = shutil.copytree(tiny_student, tmp_path / "grown")
    (grown / "vae" / "notes.txt").write_text("new")
    assert reason(grown, eager_bundle) == "the student has changed (vae/notes.txt)"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"batch_sizes": (1,)}, "other batch sizes or threads"),
        ({"num_threads": 2}, "other batch sizes or threads"),
        ({"decode_dtype": "bfloat16"}, "its decode computes in float32"),
    ],
)
def test_bundle_built_with_other_options_is_built_anew(
    tiny_student: Path, compiled_bundle: Path, changed: dict[str, Any], reason: str
) -> None:
    options = {"batch_sizes": BATCH_SIZES, "num_threads": 1, "decode_dtype": "float32", **changed}
    found = reason_to_build(tiny_student, compiled_bundle, backends=(Backend.AOTINDUCTOR,), **options)
    assert found is not None
    assert reason in found


def test_code_of_another_machine_is_built_anew(
    tiny_student: Path, compiled_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = current_platform()
    monkeypatch.setattr(needed, "current_platform", lambda *_: here.model_copy(update={"torch": "9.9"}))
    found = reason(tiny_student, compiled_bundle, backends=(Backend.AOTINDUCTOR,))
    assert found is not None
    assert "platform.torch" in found


def test_eager_bundle_is_compiled_once_there_is_a_compiler(
    tiny_student: Path, eager_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = shutil.copytree(eager_bundle, tmp_path / "bundle")
    data = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**data, "eager_only": NO_COMPILER}))
    monkeypatch.setattr(needed, "has_compiler", lambda: False)
    assert reason(tiny_student, bundle, backends=(Backend.AOTINDUCTOR,)) is None
    monkeypatch.setattr(needed, "has_compiler", lambda: True)
    assert reason(tiny_student, bundle, backends=(Backend.AOTINDUCTOR,)) == "there is a C++ compiler now"

"""The Dockerfile is understood step by step; `python -m tests.image` carries the steps out."""

from pathlib import Path

import pytest

from tests.image.dockerfile import in_context, read_stages, step_of
from tests.image.layers import BASE_IMAGE, STEPS

ROOT = Path(__file__).resolve().parents[2]


def test_every_stage_begins_with_one_before_it_and_has_steps_that_can_be_carried_out() -> None:
    known = {BASE_IMAGE}
    for name, stage in read_stages(ROOT / "Dockerfile").items():
        assert stage.base in known
        assert {step.name for step in stage.steps} <= STEPS.keys()
        assert {step.flags["from"] for step in stage.steps if "from" in step.flags} <= known
        known.add(name)


def test_all_that_is_copied_is_there_and_gets_past_dockerignore() -> None:
    for stage in read_stages(ROOT / "Dockerfile").values():
        for step in stage.steps:
            if step.name == "COPY" and "from" not in step.flags:
                for source in step.words[:-1]:
                    assert (ROOT / source).exists(), step
                    assert in_context(ROOT / source, ROOT), step


@pytest.mark.parametrize(
    ("path", "let_in"),
    [
        ("server", True),
        ("server/api/app.py", True),
        ("server/api/__pycache__", False),
        ("server/api/__pycache__/app.pyc", False),
        ("tests/image", False),
        (".git", False),
    ],
)
def test_dockerignore_lets_packages_in_and_nothing_else(path: str, let_in: bool) -> None:
    assert in_context(ROOT / path, ROOT) is let_in


def test_steps_are_taken_apart() -> None:
    copy = step_of("COPY", "--from=api-dependencies /opt/venv /opt/venv", 3)
    assert (copy.flags, copy.words) == ({"from": "api-dependencies"}, ["/opt/venv", "/opt/venv"])
    assert step_of("CMD", '["python", "-m", "server"]', 3).words == ["python", "-m", "server"]
    environment = step_of("ENV", 'PATH=/opt/bin:$PATH GREETING="two words"', 3)
    assert environment.assigned({"PATH": "/bin"}) == {"PATH": "/opt/bin:/bin", "GREETING": "two words"}


def test_stage_without_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("# for people\nFROM debian\nRUN true\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: FROM debian has no name"):
        read_stages(tmp_path / "Dockerfile")

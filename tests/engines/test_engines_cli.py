"""`python -m engines`: exit codes, one clear line per error, and commands that people read."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engines.__main__ import main, make_parser
from engines.bundle.integrity import verify_files
from engines.bundle.manifest import read_manifest
from tests.engines.tiny import make_tiny_checkpoint

# A real compilation may have to run first.
pytestmark = pytest.mark.timeout(2400)

COMMANDS = ["demo-teacher", "distill", "gate", "build", "verify", "inspect", "bench"]


def engines(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, output not a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "engines", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_help_lists_every_command() -> None:
    text = make_parser().format_help()
    assert [command for command in COMMANDS if command not in text] == []


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["distill", "--help"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom engines.__main__ import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print('loaded:', *sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert done.stdout.startswith("usage:")


def test_unknown_command_is_refused() -> None:
    done = engines("paint")
    assert done.returncode == 2
    assert "invalid choice: 'paint'" in done.stderr


def test_error_is_one_line_with_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error[bundle_invalid]: manifest.json: not found")


def test_teacher_is_refused_with_the_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = make_tiny_checkpoint(tmp_path / "teacher", student=False)
    assert main(["build", str(teacher), "--out", str(tmp_path / "bundle"), "--backends", "eager"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error[checkpoint_invalid]: student.json: missing")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batches", "0"),
        ("--batches", "a"),
        ("--batches", ""),
        ("--backends", "onnx"),
        ("--threads", "0"),
        ("--threads", "1,2"),
        ("--decode-dtype", "float16"),
    ],
)
def test_bad_option_is_refused_by_name(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", "student", "--out", "bundle", option, value])
    assert caught.value.code == 2
    assert f"argument {option}" in capsys.readouterr().err


@pytest.mark.slow
def test_build_reports_progress_line_by_line_and_the_second_build_is_instant(
    tiny_student: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    command = ["build", tiny_student, "--out", bundle, "--backends", "eager", "--batches", "2,1,2"]
    first = engines(*command, "--if-needed")
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0] == f"build: there is no bundle yet; building {bundle} from {tiny_student}"
    assert [line for line in lines if line.startswith("build: [5/5] wrote the manifest of tiny")]
    assert lines[-1].startswith(f"bundle written to {bundle}: tiny ")
    assert verify_files(bundle).batch_sizes == [1, 2]

    script = (
        "import sys\nfrom engines.__main__ import main\n"
        f"status = main({[*map(str, command), '--if-needed']!r})\n"
        "print(status, 'torch' in sys.modules)"
    )
    second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert second.stdout.splitlines() == [f"build: {bundle} is up to date", "0 False"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_build_ends_its_compilers_and_cleans_up(
    tiny_student: Path, tmp_path: Path, number: signal.Signals
) -> None:
    bundle = tmp_path / "bundle"
    command = [sys.executable, "-m", "engines", "build", str(tiny_student), "--out", str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as build:
        assert build.stdout is not None
        assert next(line for line in build.stdout if "compiling" in line)
        children = psutil.Process(build.pid).children(recursive=True)
        build.send_signal(number)
        _, error = build.communicate()
    assert build.returncode == 130
    assert "interrupted" in error.splitlines()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    assert not (bundle / ".build").exists()
    assert not (bundle / "manifest.json").exists()


def test_build_if_needed_repairs_a_damaged_bundle(
    tiny_student: Path, eager_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(eager_bundle, tmp_path / "bundle")
    (bundle / "checkpoint" / "vae" / "config.json").unlink()
    command = ["build", str(tiny_student), "--out", str(bundle), "--backends", "eager", "--batches", "1,2,4"]
    assert main([*command, "--if-needed"]) == 0
    assert "damaged (files.checkpoint/vae/config.json" in capsys.readouterr().out
    verify_files(bundle)


def test_verify_inspect_and_bench_read_a_compiled_bundle(
    compiled_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(compiled_bundle)
    assert main(["verify", str(compiled_bundle)]) == 0
    assert "parity: compiled code agrees with eager" in capsys.readouterr().out

    assert main(["inspect", str(compiled_bundle)]) == 0
    shown = capsys.readouterr().out
    assert manifest.version in shown
    assert "decode 64x64 aotinductor" in shown

    result = tmp_path / "results" / "bench.json"
    assert main(["bench", str(compiled_bundle), "--seconds", "0", "--out", str(result)]) == 0
    assert "images per second" in capsys.readouterr().out
    data = json.loads(result.read_text())
    assert data["bundle"] == {"name": "tiny", "version": manifest.version}
    assert data["platform"]["torch"] == manifest.platform.torch
    assert {"commit", "cores", "created", "num_threads", "software"} <= data.keys()
    measured = {(row["what"], row["num_steps"], row["batch"], row["backend"]) for row in data["rows"]}
    for backend in ("eager", "aotinductor"):
        assert ("decode", None, 4, backend) in measured
        assert ("images", 4, 4, backend) in measured


def test_verify_tells_when_compiled_code_does_not_fit(
    compiled_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    data = json.loads((bundle / "manifest.json").read_text())
    data["platform"]["torch"] = "9.9.9"
    (bundle / "manifest.json").write_text(json.dumps(data))
    assert main(["verify", str(bundle)]) == 1
    assert "platform.torch: built with 9.9.9" in capsys.readouterr().out


def test_verify_names_the_damaged_file(
    eager_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(eager_bundle, tmp_path / "bundle")
    (bundle / "checkpoint" / "student.json").write_text("{}")
    assert main(["verify", str(bundle)]) == 2
    assert "error[bundle_invalid]: files.checkpoint/student.json" in capsys.readouterr().err

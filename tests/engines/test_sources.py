"""The key of compiled code covers the code that is traced."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.compile.sources import PACKAGE, hash_sources
from engines.families.spec import FAMILIES
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox, make_tiny_sdxl

MAKE: dict[str, Callable[..., object]] = {
    "pixart": make_tiny_checkpoint,
    "sdxl": make_tiny_sdxl,
    "cogvideox": make_tiny_cogvideox,
}
EXPORT = """
import sys
from pathlib import Path
from engines.bundle.platform import current_platform
from engines.compile.aotinductor import CompileJob, load_for_compiling
from engines.compile.export import export_stage
from engines.families.spec import get_family
from engines.families.student import read_student

bundle = Path(sys.argv[1])
student = read_student(bundle / "checkpoint")
for spec in get_family(student.family).stages(bundle / "checkpoint", student):
    job = CompileJob(
        family=student.family, spec=spec, min_batch=1, max_batch=2, num_threads=1, bundle=bundle,
        platform=current_platform(),
    )
    export_stage(load_for_compiling(job), spec, min_batch=1, max_batch=2)
print(*(name for name, module in sys.modules.items() if name.startswith("engines.")
        and not hasattr(module, "__path__")))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_that_is_loaded_to_export_a_stage_is_in_the_key(family: str, tmp_path: Path) -> None:
    MAKE[family](tmp_path / "checkpoint")
    exported = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path)],
        check=False,
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert exported.returncode == 0, exported.stderr
    loaded = set(exported.stdout.split())
    assert {"engines.denoiser", f"engines.families.{family}", "engines.compile.export"} <= loaded
    assert loaded - hash_sources(family, "compile.aotinductor").keys() == set()


@pytest.mark.parametrize("compiler", ["compile.aotinductor", "compile.tensorrt"])
@pytest.mark.parametrize(
    "module", ["denoiser.py", "families/pixart.py", "families/t5.py", "compile/export.py"]
)
def test_change_in_code_that_is_traced_changes_the_key(compiler: str, module: str, tmp_path: Path) -> None:
    package = tmp_path / "engines"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "checkpoints"))
    before = hash_sources("pixart", compiler, package)
    assert before == hash_sources("pixart", compiler)
    with (package / module).open("a") as file:
        file.write("# another line\n")
    hash_sources.cache_clear()
    after = hash_sources("pixart", compiler, package)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"engines.{module.removesuffix('.py').replace('/', '.')}"}


def test_other_families_and_what_makes_students_are_no_part_of_it() -> None:
    sources = hash_sources("pixart", "compile.aotinductor")
    rooms = {name.split(".")[1] for name in sources}
    assert not rooms & {"bench", "demo", "distill"}
    assert not sources.keys() & {"engines.families.sdxl", "engines.families.cogvideox"}

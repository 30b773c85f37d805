"""The container and monitoring files say what they should; no Docker daemon is needed.

What these tests cannot show is that the images build and run: see `deploy/README.md`.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics import AVAILABILITY_TARGET, OBJECTIVES, Metrics
from server.settings import Settings
from server.supervisor.bundles import SHIPPED, shipped_student

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TARGETS = {"api", "worker", "worker-cpu", "engines", "engines-cpu"}
"""Stages of the Dockerfile that are images."""
DEPLOY_README = (ROOT / "deploy/README.md").read_text(encoding="utf-8")


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"


def tool(name: str) -> str:
    """Path of a program from the environment or the system; the test skips where there is none."""
    found = shutil.which(name, path=os.pathsep.join((str(BIN), os.environ["PATH"])))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return loaded


def dockerfile_stages() -> dict[str, str]:
    """Text of every stage of the Dockerfile by name."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    parts = re.split(r"^FROM \S+ AS (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


PINNED = re.compile(r"[a-z0-9./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
"""A tag for people, a digest for the machine."""


def test_images_of_others_are_pinned_by_digest(compose: dict[str, Any]) -> None:
    named = re.findall(
        r"^FROM (\S+) AS (\S+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
    )
    stages = {stage for _, stage in named}
    images = {base for base, _ in named} - stages
    images |= {service["image"] for service in compose["services"].values() if "image" in service}
    assert len(images) >= 4
    assert [image for image in sorted(images) if not PINNED.fullmatch(image)] == []


def test_dockerfile_passes_hadolint() -> None:
    run(tool("hadolint"), "Dockerfile")


def test_compose_file_follows_the_compose_specification() -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_prometheus_configuration_and_its_rules_are_valid() -> None:
    run(tool("promtool"), "check", "config", "deploy/prometheus/prometheus.yml")


@pytest.mark.parametrize("name", ["causes", "slo", "slo_slow"])
def test_alerts_fire_where_they_must_and_stay_silent_where_they_must(name: str) -> None:
    run(tool("promtool"), "test", "rules", f"deploy/prometheus/tests/{name}.yml")


def test_bill_of_materials_names_every_distribution_and_package_once_and_in_order() -> None:
    script = (ROOT / "deploy/sbom.py").read_bytes()
    done = subprocess.run(
        [sys.executable, "-"], input=script, check=True, capture_output=True
    )  # as in an image
    bill = json.loads(done.stdout)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    components = bill["components"]
    assert f"pkg:pypi/fastapi@{version('fastapi')}" in {one.get("purl") for one in components}
    refs = [one["bom-ref"] for one in components]
    assert refs == sorted(set(refs))
    sbom = runpy.run_path(str(ROOT / "deploy/sbom.py"))
    status = "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2:2.36-9+deb12u7\n"
    gone = "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    (libc,) = sbom["debian_components"](f"{status}\n{gone}", "debian-12")
    assert libc["purl"] == "pkg:deb/debian/libc6@2%3A2.36-9%2Bdeb12u7?arch=amd64&distro=debian-12"


def rules() -> list[dict[str, Any]]:
    """Every rule: those that record, and alerts."""
    files = sorted((ROOT / "deploy/prometheus/rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def test_every_alert_has_a_case_in_which_it_fires_one_in_which_it_does_not_and_a_remedy() -> None:
    cases: dict[str, set[bool]] = {}
    for file in (ROOT / "deploy/prometheus/tests").glob("*.yml"):
        for case in yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]:
            for asked in case["promql_expr_test"]:
                name = re.search(r'alertname="(\w+)"', asked["expr"])
                assert name, asked
                cases.setdefault(name[1], set()).add(bool(asked["exp_samples"]))
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert cases == {alert: {True, False} for alert in alerts}
    remedies = re.findall(r"^\| `(Tdm\w+)` \|", DEPLOY_README, flags=re.MULTILINE)
    assert sorted(remedies) == sorted(alerts)


def test_dashboard_is_what_its_code_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "deploy/grafana")  # as for `python deploy/grafana/dashboard.py`
    written = json.loads((ROOT / "deploy/grafana/tdm.json").read_text(encoding="utf-8"))
    assert written == runpy.run_path(str(ROOT / "deploy/grafana/dashboard.py"))["dashboard"]()


def test_dashboard_marks_the_minute_in_which_a_version_comes(tmp_path: Path) -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/tdm.json").read_text(encoding="utf-8"))
    (marks,) = dashboard["annotations"]["list"]
    query = marks["expr"].replace("$class", ".*")
    series = {
        'tdm_engine_info{class="scenes",version="a",instance="1"}': "1x20",
        'tdm_engine_info{class="scenes",version="a",instance="2"}': "1x8 stale _x2 1x9",
        'tdm_engine_info{class="scenes",version="b",instance="3"}': "_x9 1x10",
    }
    shown = {"5m": [], "9m": [{"labels": '{class="scenes", version="b"}', "value": 1}], "12m": [], "14m": []}
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": query, "eval_time": time, "exp_samples": samples} for time, samples in shown.items()
        ],
    }
    (tmp_path / "marks.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}), encoding="utf-8")
    run(tool("promtool"), "test", "rules", tmp_path / "marks.yml")


def test_dashboard_and_rules_ask_for_metrics_that_exist() -> None:
    exist = {
        name
        for one in Metrics().definitions
        for family in one.metric.describe()
        for suffix in ("", "_total", "_bucket", "_count", "_sum")
        for name in [family.name + suffix]
    }
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    text = (ROOT / "deploy/grafana/tdm.json").read_text(encoding="utf-8")
    text += "".join(rule["expr"] for rule in rules())
    assert set(re.findall(r"\btdm_\w+", text)) <= exist
    assert set(re.findall(r"\btdm:\w+:\w+", text)) <= recorded


def test_rules_and_dashboard_know_the_objectives_that_the_server_states() -> None:
    text = (ROOT / "deploy/grafana/tdm.json").read_text(encoding="utf-8").replace('\\"', '"')
    text += "".join(rule["expr"] for rule in rules())
    edges = set(re.findall(r'_bucket\{kind="(\w+)",outcome="done",le="([\d.]+)"', text))
    assert edges == {(str(kind), str(one.e2e_s)) for kind, one in OBJECTIVES.items()}
    budgets = set(re.findall(r"slo=~\S+ / ([\d.]+)", text))
    targets = {AVAILABILITY_TARGET, *(one.target for one in OBJECTIVES.values())}
    assert budgets == {f"{1 - target:.3g}" for target in targets}


def test_images_run_without_root() -> None:
    stages = dockerfile_stages()
    assert {name: re.findall(r"^USER (\S+)$", stages[name], flags=re.MULTILINE) for name in TARGETS} == {
        name: ["10001:10001"] for name in TARGETS
    }


def test_what_loads_engines_may_execute_what_it_unpacks(compose: dict[str, Any]) -> None:
    """Docker mounts a tmpfs noexec where nothing else is said: no shared object loads from there."""
    loading = {
        name: service["tmpfs"]
        for name, service in compose["services"].items()
        if service.get("build", {}).get("target") not in (None, "api")
    }
    assert len(loading) == 8
    assert {name: tmpfs for name, tmpfs in loading.items() if tmpfs != ["/tmp:exec"]} == {}


def test_compose_builds_targets_that_exist(compose: dict[str, Any]) -> None:
    targets = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    assert targets == TARGETS
    assert targets <= dockerfile_stages().keys()


def test_compose_runs_the_same_on_cpus_and_on_a_gpu(compose: dict[str, Any]) -> None:
    profiles = {
        profile: {
            name.removesuffix("-gpu"): service
            for name, service in compose["services"].items()
            if profile in service.get("profiles", ())
        }
        for profile in ("cpu", "gpu")
    }
    assert profiles["cpu"].keys() == profiles["gpu"].keys() != set()
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text(encoding="utf-8").splitlines()
    for name, on_gpu in profiles["gpu"].items():
        on_cpu = profiles["cpu"][name]
        assert on_cpu["build"]["target"] == f"{on_gpu['build']['target']}-cpu"
        assert "deploy" not in on_cpu
        (device,) = on_gpu["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_containers_set_only_settings_that_exist(compose: dict[str, Any]) -> None:
    known = {f"TDM_{name.upper()}" for name in Settings.model_fields}
    ours = [one for one in compose["services"].values() if "build" in one]
    used = {name for service in ours for name in service.get("environment", {})}
    used |= set(re.findall(r"\bTDM_[A-Z_]+", (ROOT / "Dockerfile").read_text(encoding="utf-8")))
    assert used
    assert used <= known


def test_prometheus_scrapes_the_ports_that_serve_metrics(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    scraped = {
        name: target["port"]
        for job in config["scrape_configs"]
        for target in job["dns_sd_configs"]
        for name in target["names"]
    }
    metrics_port = int(compose["services"]["api"]["environment"]["TDM_METRICS_PORT"])
    assert scraped == {
        alias: metrics_port + (name != "api")
        for name, service in compose["services"].items()
        if service.get("build", {}).get("target") in ("api", "worker", "worker-cpu")
        for alias in service.get("networks", {"default": {"aliases": [name]}})["default"]["aliases"]
    }


def test_grafana_finds_prometheus_and_the_dashboard(compose: dict[str, Any]) -> None:
    mounted = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    provisioning = ROOT / "deploy/grafana/provisioning"
    assert mounted["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text("utf-8"))[
        "datasources"
    ]
    host, port = source["url"].removeprefix("http://").split(":")
    assert source["type"] == "prometheus"
    assert port in compose["services"][host]["ports"][0].split(":")
    (provider,) = yaml.safe_load((provisioning / "dashboards/tdm.yml").read_text("utf-8"))["providers"]
    assert mounted["./deploy/grafana/tdm.json"] == f"{provider['options']['path']}/tdm.json"


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_every_shipped_student_is_built_and_served(compose: dict[str, Any], profile: str) -> None:
    services = [one for one in compose["services"].values() if profile in one.get("profiles", ())]
    shipped = {str(shipped_student(name).relative_to(ROOT)) for name in SHIPPED}
    built = {
        service["command"][1]: service["command"][3]
        for service in services
        if "build" in service.get("command", ())
    }
    assert built.keys() == shipped
    served = {
        service["environment"]["TDM_BUNDLES"]
        for service in services
        if "TDM_BUNDLES" in service.get("environment", {})
    }
    assert served == set(built.values())


def test_api_image_copies_all_that_the_api_imports(tmp_path: Path) -> None:
    for copy in re.findall(r"^COPY (?!--from)(.+)$", dockerfile_stages()["api"], flags=re.MULTILINE):
        *sources, target = copy.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                (tmp_path / target).mkdir(exist_ok=True)
                shutil.copy(ROOT / source, tmp_path / target)
    # -S hides site-packages' .pth files, an editable install of this checkout among them.
    site_packages = next(Path(entry) for entry in sys.path if entry.endswith("site-packages"))
    run(
        *(sys.executable, "-S", "-c", "import server.api.app, sys; assert 'torch' not in sys.modules"),
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(site_packages)},
    )

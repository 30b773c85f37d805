"""deploy/k8s renders, every object is valid, and it says what the processes need.

`python -m tests.cluster` asks a real API server, where there is one.
"""

import json
import re
import shutil
import subprocess
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml

from server.queue.address import parse_redis_url
from server.settings import ENV_PREFIX, Settings
from tests.test_deploy import PINNED, TARGETS, dockerfile_stages, run, tool

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "deploy/k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
VERSION = "1.33"
"""The first one that knows image volumes."""
CUSTOM = {"ServiceMonitor", "ScaledObject", "PyTorchJob"}
GRACE_S = {"tdm-api": 60, "tdm-worker-scenes": 120, "tdm-worker-clips": 1800}

Object = dict[str, Any]


@cache
def render(overlay: str) -> tuple[Object, ...]:
    """Objects of an overlay."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", K8S / "overlays" / overlay], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, *kinds: str) -> list[Object]:
    return [one for one in render(overlay) if one["kind"] in kinds]


def names(objects: list[Object]) -> set[str]:
    return {one["metadata"]["name"] for one in objects}


def validate(one: Object) -> None:
    """Check an object strictly: fields that nobody knows are refused."""
    if one["kind"] in CUSTOM:
        jsonschema.validate(one, json.loads((K8S / "schemas/custom.json").read_text(encoding="utf-8")))
        for template in templates_of(one):  # a pod's, which Kubernetes knows
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            kubernetes_validate.validate(pod, VERSION, strict=True)
    else:
        kubernetes_validate.validate(one, VERSION, strict=True)


def pods(overlay: str) -> dict[str, Object]:
    """Pod templates by the name of what makes them."""
    makers = of_kind(overlay, "Deployment", "StatefulSet", "Job", "PyTorchJob")
    return {one["metadata"]["name"]: template for one in makers for template in templates_of(one)}


def templates_of(one: Object) -> list[Object]:
    """Templates of the pods that an object makes."""
    if one["kind"] == "PyTorchJob":
        return [replicas["template"] for replicas in one["spec"]["pytorchReplicaSpecs"].values()]
    return [one["spec"]["template"]] if "template" in one["spec"] else []


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector takes an object with these labels."""
    wanted = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", ())
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    for one in render(overlay):
        validate(one)
    found = [(one["kind"], one["metadata"]["name"]) for one in render(overlay)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("overlay", "kind"),
    [
        *(("keda", kind) for kind in ("Deployment", "NetworkPolicy", "ServiceMonitor", "ScaledObject")),
        ("distill", "PyTorchJob"),
    ],
)
def test_field_that_nobody_knows_is_refused(overlay: str, kind: str) -> None:
    broken = deepcopy(of_kind(overlay, kind)[0])
    broken["spec"]["replicaz"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(broken)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_may_do_more_than_it_needs(overlay: str) -> None:
    for template in pods(overlay).values():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= container["resources"].keys()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_deployments_are_probed_spread_drained_and_kept_from_going_all_at_once(overlay: str) -> None:
    budgets = [one["spec"]["selector"] for one in of_kind(overlay, "PodDisruptionBudget")]
    for one in of_kind(overlay, "Deployment"):
        template = one["spec"]["template"]
        (container,) = template["spec"]["containers"]
        probes = [container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
        patience_s = [probe["periodSeconds"] * probe["failureThreshold"] for probe in probes]
        assert patience_s[1] < patience_s[2] <= 120  # not ready soon, killed late
        assert all("readyz" not in probe["httpGet"]["path"] for probe in probes)
        assert template["spec"]["topologySpreadConstraints"]
        assert template["spec"]["terminationGracePeriodSeconds"] >= GRACE_S[one["metadata"]["name"]]
        assert sum(selects(budget, template["metadata"]["labels"]) for budget in budgets) == 1
        assert selects(one["spec"]["selector"], template["metadata"]["labels"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_exist_and_redis_is_where_a_service_is(overlay: str) -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    (settings,) = [one["data"] for one in of_kind(overlay, "ConfigMap") if "TDM_REDIS_URL" in one["data"]]
    assert settings.keys() <= known
    hosts = {host.split(".")[-1] for host, _ in parse_redis_url(settings["TDM_REDIS_URL"]).hosts}
    assert hosts <= names(of_kind(overlay, "Service"))
    assert "TDM_STORE_URL" in settings
    for template in pods(overlay).values():
        for container in template["spec"]["containers"]:
            assert {one["name"] for one in container.get("env", ())} <= known


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_targets_of_the_dockerfile_that_fit_what_they_run_on(overlay: str) -> None:
    stages = dockerfile_stages()
    (settings,) = [one["data"] for one in of_kind(overlay, "ConfigMap") if "TDM_REDIS_URL" in one["data"]]
    for template in pods(overlay).values():
        for container in template["spec"]["containers"]:
            if not container["image"].startswith("tdm-"):
                assert PINNED.fullmatch(container["image"])
                continue
            target = container["image"].removeprefix("tdm-")
            assert target in TARGETS
            on_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert on_gpu == (target in ("worker", "engines"))
            if settings["TDM_STORE_URL"].startswith("s3:") and "engines" not in target:
                assert re.search(r"pip install .*\[s3\b", stages[f"{target}-dependencies"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_is_open_that_is_not_named(overlay: str) -> None:
    policies = [one["spec"] for one in of_kind(overlay, "NetworkPolicy")]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    for template in pods(overlay).values():
        ports = {port["name"] for one in template["spec"]["containers"] for port in one.get("ports", ())}
        let_in = {
            port["port"]
            for policy in policies
            if selects(policy["podSelector"], template["metadata"]["labels"])
            for rule in policy.get("ingress", ())
            for port in rule["ports"]
            if "endPort" not in port  # NCCL's, which have no names
        }
        assert let_in == ports


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_and_monitors_find_what_they_select(overlay: str) -> None:
    templates = pods(overlay).values()
    services = of_kind(overlay, "Service")
    for service in services:
        found = [
            one
            for one in templates
            if selects({"matchLabels": service["spec"]["selector"]}, one["metadata"]["labels"])
        ]
        assert found
        for template in found:
            ports = {port["name"] for one in template["spec"]["containers"] for port in one["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for monitor in of_kind(overlay, "ServiceMonitor"):
        chosen = [
            one for one in services if selects(monitor["spec"]["selector"], one["metadata"].get("labels", {}))
        ]
        (ports,) = [{port["name"] for port in one["spec"]["ports"]} for one in chosen]
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_take_settings_that_are_there(overlay: str) -> None:
    maps = names(of_kind(overlay, "ConfigMap"))
    for template in pods(overlay).values():
        for container in template["spec"]["containers"]:
            taken = [
                one["configMapRef"]["name"] for one in container.get("envFrom", ()) if "configMapRef" in one
            ]
            assert set(taken) <= maps


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_collector_can_be_reached_where_spans_are_sent_to_it_and_nowhere_else(overlay: str) -> None:
    (settings,) = [one["data"] for one in of_kind(overlay, "ConfigMap") if "TDM_REDIS_URL" in one["data"]]
    endpoint = settings.get("TDM_OTLP_ENDPOINT")
    assert (endpoint is not None) == (overlay == "tracing")
    wanted = {urlsplit(endpoint).port} if endpoint else set()
    for name, template in pods(overlay).items():
        labels = template["metadata"]["labels"]
        ports = {
            port["port"]
            for policy in of_kind(overlay, "NetworkPolicy")
            if selects(policy["spec"]["podSelector"], labels)
            for rule in policy["spec"].get("egress", ())
            if {"namespaceSelector": {"matchLabels": {"tdm/collector": "true"}}} in rule["to"]
            for port in rule["ports"]
        }
        assert ports == (wanted if name.startswith(("tdm-api", "tdm-worker")) else set()), name


def test_demo_fits_a_node_of_two_cores_with_the_images_that_are_there() -> None:
    cores = 0.0
    for maker in of_kind("cpu-demo", "Deployment", "StatefulSet", "Job"):
        (template,) = templates_of(maker)
        own = [one for one in template["spec"]["containers"] if one["image"].startswith("tdm-")]
        assert {one["imagePullPolicy"] for one in own} <= {"IfNotPresent"}
        asked = [one["resources"]["requests"]["cpu"] for one in template["spec"]["containers"]]
        assert all(one.endswith("m") for one in asked)
        cores += maker["spec"].get("replicas", 1) * sum(int(one[:-1]) / 1000 for one in asked)
    assert cores <= 1.2  # what minikube's own pods leave of two


def test_workers_of_the_demo_wait_for_the_bundles_that_its_job_builds() -> None:
    (job,) = of_kind("cpu-demo", "Job")
    built = {
        one["args"][one["args"].index("--out") + 1] for one in templates_of(job)[0]["spec"]["containers"]
    }
    for model in ("scenes", "clips"):
        template = pods("cpu-demo")[f"tdm-worker-{model}"]
        (waiting,) = template["spec"]["initContainers"]
        (worker,) = template["spec"]["containers"]
        bundle = next(one["value"] for one in worker["env"] if one["name"] == "TDM_BUNDLES")
        assert bundle in built
        assert f"[ -e {bundle}/manifest.json ]" in waiting["command"][-1]
        assert (waiting["image"], waiting["imagePullPolicy"]) == (worker["image"], worker["imagePullPolicy"])
        # What a pod mounts by a read-only claim is not handed to its group, nor to that of the next pod.
        (volume,) = [one for one in template["spec"]["volumes"] if one["name"] == "bundles"]
        assert "readOnly" not in volume["persistentVolumeClaim"]
        assert all(one["readOnly"] for one in worker["volumeMounts"] if one["name"] == "bundles")


@pytest.mark.parametrize("overlay", ["cpu-demo", "ha-valkey"])
def test_valkey_answers_other_pods(overlay: str) -> None:
    """Protected mode is on unless told otherwise, or an image's entrypoint does, which `command` replaces."""
    told = json.dumps([one["spec"] for one in of_kind(overlay, "StatefulSet")])
    told += json.dumps([one["data"] for one in of_kind(overlay, "ConfigMap")])
    assert re.search(r'--protected-mode(", "| )no\b', told)


def test_workers_on_gpus_ask_for_one_and_have_their_bundle_by_digest() -> None:
    for one in of_kind("gpu", "Deployment"):
        if one["metadata"]["name"] == "tdm-api":
            continue
        spec = one["spec"]["template"]["spec"]
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"
        assert spec["nodeSelector"].keys() == {"nvidia.com/gpu.product"}
        images = [volume["image"]["reference"] for volume in spec["volumes"] if "image" in volume]
        assert ["@sha256:" in image for image in images] == [True]
        (bundle,) = [env["value"] for env in spec["containers"][0]["env"] if env["name"] == "TDM_BUNDLES"]
        mounts = [mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]]
        assert bundle in mounts
        assert "/bundles" not in mounts


def test_autoscaler_scales_deployments_that_are_there_by_the_backlog_with_a_fallback() -> None:
    deployments = {one["metadata"]["name"]: one["spec"] for one in of_kind("keda", "Deployment")}
    scalers = of_kind("keda", "ScaledObject")
    assert len(scalers) == 2
    for one in scalers:
        target = one["spec"]["scaleTargetRef"]["name"]
        assert "replicas" not in deployments[target]
        assert one["spec"]["fallback"]["replicas"] >= 1
        (trigger,) = one["spec"]["triggers"]
        model = target.removeprefix("tdm-worker-")
        assert trigger["metadata"]["threshold"] == "1"
        for term in ("sum(rate(tdm_accepted_work_seconds_total", "max(tdm_queue_backlog_seconds"):
            assert f'{term}{{class="{model}"}}' in trigger["metadata"]["query"]
        assert (
            "/ 0.75 or vector(0))" in trigger["metadata"]["query"]
        )  # else nothing plus a backlog is nothing


@pytest.mark.parametrize("model", ["scenes", "clips"])
def test_autoscaler_gets_an_answer_as_soon_as_an_api_is_seen(model: str, tmp_path: Path) -> None:
    """Two apis tell of one queue in which 30 s of work wait; then 0.75 s of it come a second to each."""
    (scaler,) = [one for one in of_kind("keda", "ScaledObject") if names([one]) == {f"tdm-worker-{model}"}]
    (trigger,) = scaler["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    drain_s = float(query.rpartition(" / ")[2])
    series = [
        {"series": f'{name}{{class="{model}",instance="{api}"}}', "values": values}
        for api in ("a", "b")
        for name, values in (
            ("tdm_queue_backlog_seconds", "_x4 30x20"),
            ("tdm_accepted_work_seconds_total", "_x9 0+45x20"),  # a minute
        )
    ]
    wanted: dict[str, list[float]] = {"3m": [], "6m": [30 / drain_s], "15m": [30 / drain_s + 2 * 0.75 / 0.75]}
    test = {
        "interval": "1m",
        "input_series": series,
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": time,
                "exp_samples": [{"labels": "{}", "value": value} for value in values],
            }
            for time, values in wanted.items()
        ],
    }
    (tmp_path / "scale.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}), encoding="utf-8")
    run(tool("promtool"), "test", "rules", tmp_path / "scale.yml")


def test_distillation_finds_its_nodes_and_the_files_that_its_settings_name() -> None:
    (job,) = of_kind("distill", "PyTorchJob")
    elastic, workers = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == workers["replicas"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"  # the operator looks for container and port by these names
    assert [port["name"] for port in container["ports"]] == ["pytorchjob-port"]
    launcher, _, *command = container["command"]
    assert (launcher, command[:3]) == ("torchrun", ["-m", "engines", "distill"])
    config = yaml.safe_load((ROOT / command[3]).read_text(encoding="utf-8"))
    processes = workers["replicas"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert config["batch_size"] % processes == 0
    mounted = tuple(f"{mount['mountPath']}/" for mount in container["volumeMounts"])
    for name in ("teacher", "prompts", "out"):
        assert f"/app/{config[name]}".startswith(mounted)

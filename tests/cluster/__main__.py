"""`python -m tests.cluster --bin DIR`: what a real Kubernetes API server says of every overlay in deploy/k8s.

DIR holds `etcd`, `kube-apiserver` and `kubectl`, as `setup-envtest use 1.36 -p path` unpacks them. For each
overlay both servers start anew; the overlay is applied as a trial (`--dry-run=server`), then in earnest, then
a second time, which must change nothing; and each pod that its objects would make is offered to the admission
of its namespace, which enforces the restricted Pod Security Standard. Definitions of custom resources, which
their operators bring, come from `--crds`; kinds without one are named and left out. No node, no controller:
nothing is scheduled or run.

Exit status: 0; 1 if an object is refused; 2 where it cannot run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from tests.cluster.control_plane import ControlPlane, RefusedError
from tests.test_kubernetes import K8S, OVERLAYS, Object, templates_of

PROGRAMS = ("etcd", "kube-apiserver", "kubectl")
SERVED = {"monitoring.coreos.com/v1", "keda.sh/v1alpha1", "kubeflow.org/v1"}
"""Groups of custom resources: an object of another group must be known to the API server itself."""
MAKERS = ("Deployment", "StatefulSet", "Job", "PyTorchJob")
"""What makes pods."""
NVIDIA: Object = {
    "apiVersion": "node.k8s.io/v1",
    "kind": "RuntimeClass",
    "metadata": {"name": "nvidia"},
    "handler": "nvidia",
}
"""What NVIDIA's operator brings, and pods on GPUs name."""


def check_overlay(plane: ControlPlane, overlay: str, definitions: Path | None) -> list[str]:
    """Apply an overlay to a cluster that has nothing yet.

    Returns:
        kinds that were left out, because nobody defines them.

    Raises:
        RefusedError: by the API server, with its words.
        AssertionError: it took what it must refuse, or the second time was not like the first.
    """
    plane.apply([NVIDIA])
    if definitions:
        plane.define(definitions)
    rendered = plane.kubectl("kustomize", K8S / "overlays" / overlay)
    objects: list[Object] = list(yaml.safe_load_all(rendered))
    served = set(plane.kubectl("api-versions").split())
    unknown = [one for one in objects if one["apiVersion"] in SERVED - served]
    known = [one for one in objects if one not in unknown]
    # A namespace of a trial is not there for what lies in it.
    plane.apply([one for one in known if one["kind"] == "Namespace"])
    plane.apply(known, "--dry-run=server")
    plane.apply(known)
    before = plane.versions(known)
    plane.apply(known)
    assert plane.versions(known) == before  # what is written without a change is not written
    for one in (one for one in objects if one["kind"] in MAKERS):
        for template in templates_of(one):
            plane.apply([pod_of(one, template)], "--dry-run=server")
    refuses_what_it_must(plane, known)
    return sorted({one["kind"] for one in unknown})


def pod_of(maker: Object, template: Object) -> Object:
    """The pod that a controller would make."""
    about = {"name": "trial", "namespace": maker["metadata"]["namespace"], **template["metadata"]}
    claims = [one["metadata"]["name"] for one in maker["spec"].get("volumeClaimTemplates", ())]
    volumes = [{"name": name, "persistentVolumeClaim": {"claimName": f"{name}-trial"}} for name in claims]
    spec = template["spec"] | {"volumes": [*template["spec"].get("volumes", ()), *volumes]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec}


def refuses_what_it_must(plane: ControlPlane, objects: list[Object]) -> None:
    """See that the checks check: a field that nobody knows, a pod that wants the node's network."""
    maker = next(one for one in objects if one["kind"] == "Deployment")
    (template,) = templates_of(maker)
    greedy = template | {"spec": template["spec"] | {"hostNetwork": True}}
    wrong: dict[str, Object] = {
        "replicaz": maker | {"spec": maker["spec"] | {"replicaz": 1}},
        "host namespaces": pod_of(maker, greedy),
    }
    for word, one in wrong.items():
        try:
            plane.apply([one], "--dry-run=server")
        except RefusedError as error:
            words = str(error)
        else:
            words = "taken"
        assert word in words, (word, words)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster")
    parser.add_argument("--bin", type=Path, required=True, help="folder of " + ", ".join(PROGRAMS))
    parser.add_argument("--crds", type=Path, help="folder of CustomResourceDefinitions, *.yaml")
    parser.add_argument("--overlay", choices=OVERLAYS, help="this one only")
    chosen = parser.parse_args()
    if missing := [name for name in PROGRAMS if not (chosen.bin / name).is_file()]:
        print(f"error: {chosen.bin} lacks {', '.join(missing)}", file=sys.stderr)
        return 2
    status = 0
    for overlay in [chosen.overlay] if chosen.overlay else OVERLAYS:
        with tempfile.TemporaryDirectory() as folder, ControlPlane(chosen.bin, Path(folder)) as plane:
            try:
                left_out = check_overlay(plane, overlay, chosen.crds)
            except (RefusedError, AssertionError) as error:
                print(f"{overlay}: {error}")
                status = 1
            else:
                print(f"{overlay}: accepted by {plane.version}", *(f"without {one}" for one in left_out))
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}: {error.stderr}")

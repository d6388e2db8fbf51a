"""The cluster that demo and tests use: how images, operator and data come to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from demo import delivery
from demo.claims import open_claims
from demo.delivery import EXISTING, Delivery
from demo.images import Built, build_all, cluster_tool, load, named, with_built_images
from demo.kube import ROOT, Kube
from demo.report import DemoError, say, step
from demo.storage import CLAIMS, Folder, Storage

SYSTEM = "trireme-system"
OPERATOR = "trireme-operator"
CRD = "trainingjobs.trireme.dev"
NODES = 3


@dataclass(frozen=True)
class Target:
    kube: Kube
    kind: str
    """builtin | kind | existing: as cluster/cluster.py names them."""
    _storages: dict[str, Storage] = field(default_factory=dict, repr=False, compare=False)

    def storage(self) -> Storage:
        """The claims of the namespace, made where they are not there. The operator must be installed."""
        namespace = self.kube.namespace
        if namespace not in self._storages:
            self._storages[namespace] = self._open()
        return self._storages[namespace]

    def _open(self) -> Storage:
        if self.kind == EXISTING:
            return open_claims(self.kube, *trainer_image(self.kube))
        made = {
            name: cluster_tool("cluster.py", "volume", name, "--namespace", self.kube.namespace, data=True)
            for name in CLAIMS
        }
        return Folder({name: Path(facts["path"]) for name, facts in made.items()})


def up(nodes: int = NODES) -> Target:
    with step("Kubernetes"):
        facts = cluster_tool("cluster.py", "up", "--nodes", str(nodes), data=True)
        # Before anything is built: what a cluster of the user's own needs to be told.
        delivery.choose(facts["backend"], os.environ)
    return Target(Kube(Path(facts["kubeconfig"])), facts["backend"])


def images(target: Target) -> tuple[Delivery, list[Built]]:
    """Builds what has changed and brings it to where the nodes find it."""
    chosen = delivery.choose(target.kind, os.environ)
    with step("images"):
        if chosen.how == "preloaded":
            built = named(chosen.prefix)
            say(f"  taken to be on the nodes: {', '.join(one.tag for one in built)}")
        else:
            built = build_all(chosen.prefix, push=chosen.how == "push")
        if chosen.how == "import":
            load(built)
    return chosen, built


def overlay() -> Path:
    """`TRIREME_OVERLAY` names another installation than the local one."""
    given = os.environ.get("TRIREME_OVERLAY")
    path = Path(given) if given else ROOT / "manifests" / "overlays" / "local"
    if not (path / "kustomization.yaml").exists():
        raise DemoError(f"TRIREME_OVERLAY={given}: holds no kustomization.yaml; name a folder that does")
    return path


def install(target: Target, chosen: Delivery, built: Sequence[Built]) -> None:
    """CRD, operator and rights; waits until the operator is ready. Safe to repeat: a new image rolls over."""
    kube = target.kube.within(SYSTEM)
    with step("operator"):
        rendered = kube.out("kustomize", str(overlay()))
        kube.out("apply", "-f", "-", text=with_built_images(rendered, built, chosen.pull_policy))
        kube.out("wait", "--for=condition=Established", f"crd/{CRD}", "--timeout=60s")
        done = kube.call("rollout", "status", f"deployment/{OPERATOR}", "--timeout=180s", check=False, timeout=200)
        if done.returncode:
            raise DemoError(f"the operator is not ready: {why_not_ready(kube)}")


def trainer_image(kube: Kube) -> tuple[str, str]:
    """(image, pull policy) that the installed operator gives to training pods."""
    deployment = kube.within(SYSTEM).get("deployment", OPERATOR)
    if deployment is None:
        raise DemoError("the operator is not installed: run `make install`")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    given = {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}
    return given["TRIREME_TRAINER_IMAGE"], given.get("TRIREME_IMAGE_PULL_POLICY") or "IfNotPresent"


def why_not_ready(kube: Kube) -> str:
    """What a person would look up: the waiting reason of the operator's newest pod, else the end of its log."""
    pods = kube.items("pods", f"app.kubernetes.io/name={OPERATOR}")
    for pod in sorted(pods, key=lambda p: p["metadata"]["creationTimestamp"], reverse=True):
        for status in pod.get("status", {}).get("containerStatuses", []):
            waiting = status["state"].get("waiting")
            if waiting and waiting["reason"] != "CrashLoopBackOff":
                return f"{pod['metadata']['name']}: {waiting['reason']} {waiting.get('message', '')}"
        log = kube.call("logs", pod["metadata"]["name"], "--tail=3", check=False)
        return f"{pod['metadata']['name']} says: {(log.stdout or log.stderr).strip()[-500:]}"
    return "it has no pod; see `kubectl -n trireme-system describe deployment trireme-operator`"

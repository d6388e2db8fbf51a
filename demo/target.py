"""The cluster that demo and tests use, and the two claims they need on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from demo.images import Built, build_all, cluster_tool, load, with_built_images
from demo.kube import ROOT, Kube
from demo.report import DemoError, step

SYSTEM = "trireme-system"
OPERATOR = "trireme-operator"
CRD = "trainingjobs.trireme.dev"
NODES = 3


@dataclass(frozen=True)
class Target:
    kube: Kube
    kind: str
    """builtin | kind | existing: as cluster/cluster.py names them."""

    def claim(self, name: str, namespace: str = "default") -> Path:
        """Makes a claim that every node can mount and write; returns the folder of this machine that it is."""
        made = cluster_tool("cluster.py", "volume", name, "--namespace", namespace, data=True)
        return Path(made["path"])


def up(nodes: int = NODES) -> Target:
    with step("Kubernetes"):
        facts = cluster_tool("cluster.py", "up", "--nodes", str(nodes), data=True)
    return Target(Kube(Path(facts["kubeconfig"])), facts["backend"])


def images() -> list[Built]:
    """Builds what has changed and brings it to the nodes."""
    with step("images"):
        built = build_all()
        load(built)
    return built


def overlay() -> Path:
    """`TRIREME_OVERLAY` names another installation than the local one, e.g. with images of your registry."""
    given = os.environ.get("TRIREME_OVERLAY")
    path = Path(given) if given else ROOT / "manifests" / "overlays" / "local"
    if not (path / "kustomization.yaml").exists():
        raise DemoError(f"TRIREME_OVERLAY={given}: holds no kustomization.yaml; name a folder that does")
    return path


def install(target: Target, built: list[Built]) -> None:
    """CRD, operator and rights; waits until the operator is ready. Safe to repeat: a new image rolls over."""
    kube = target.kube.within(SYSTEM)
    with step("operator"):
        rendered = kube.out("kustomize", str(overlay()))
        kube.out("apply", "-f", "-", text=with_built_images(rendered, built))
        kube.out("wait", "--for=condition=Established", f"crd/{CRD}", "--timeout=60s")
        done = kube.call("rollout", "status", f"deployment/{OPERATOR}", "--timeout=180s", check=False, timeout=200)
        if done.returncode:
            raise DemoError(f"the operator is not ready: {why_not_ready(kube)}")


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

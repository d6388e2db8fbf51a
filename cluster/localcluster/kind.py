"""kind as the local cluster, where Docker is there to run it. Thin: kind does the work."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .node import remove_folder
from .paths import ClusterPaths
from .plan import Plan
from .report import step
from .shell import run
from .state import State, boot_id, locked

NODE_IMAGE = "TRIREME_KIND_IMAGE"
"""Names another node image, and so another version of Kubernetes, than kind's default."""


def config(nodes: int, port: int, volumes: Path, image: str = "") -> str:
    """kind's configuration: one control plane that takes no pods, and `nodes` workers. JSON is YAML."""
    chosen = {"image": image} if image else {}
    mount = [{"hostPath": str(volumes), "containerPath": str(volumes)}]
    roles = [{"role": "control-plane"}] + [{"role": "worker"} for _ in range(nodes)]
    return json.dumps(
        {
            "kind": "Cluster",
            "apiVersion": "kind.x-k8s.io/v1alpha4",
            "networking": {"apiServerAddress": "127.0.0.1", **({"apiServerPort": port} if port else {})},
            "nodes": [{**role, **chosen, "extraMounts": mount} for role in roles],
        }
    )


def up(paths: ClusterPaths, nodes: int, port: int) -> str:
    with locked(paths):
        paths.volumes.mkdir(parents=True, exist_ok=True)
        if paths.name in run(["kind", "get", "clusters"]).split():
            run(["kind", "export", "kubeconfig", "--name", paths.name, "--kubeconfig", str(paths.kubeconfig)])
            return "keep"
        with step("kind create cluster"):
            run(
                [
                    "kind",
                    "create",
                    "cluster",
                    "--name",
                    paths.name,
                    "--kubeconfig",
                    str(paths.kubeconfig),
                    "--wait",
                    "180s",
                    "--config",
                    "-",
                ],
                stdin=config(nodes, port, paths.volumes, os.environ.get(NODE_IMAGE, "")),
            )
        empty = Plan(name=paths.name, nodes="", pods="", services="")
        State(plan=empty, backend="kind", boot_id=boot_id(), nodes=list(range(1, nodes + 1))).save(paths.record)
        return "create"


def down(paths: ClusterPaths) -> bool:
    with locked(paths):
        run(["kind", "delete", "cluster", "--name", paths.name, "--kubeconfig", str(paths.kubeconfig)])
        remove_folder(paths.state)
        paths.kubeconfig.unlink(missing_ok=True)
        paths.lock.unlink(missing_ok=True)
        return True


def load(paths: ClusterPaths, archive: Path) -> None:
    run(["kind", "load", "image-archive", str(archive), "--name", paths.name], timeout=900)

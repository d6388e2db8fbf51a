"""Volumes that pods of different nodes share. On one machine a folder that every node sees is just that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

from . import backend
from .api import Api
from .lifecycle import Cluster
from .paths import ClusterPaths
from .report import ClusterError
from .shell import run


def objects(claim: str, namespace: str, size: str, path: Path) -> Dict[str, Dict[str, Any]]:
    """PersistentVolume and claim, bound to each other beforehand so that no other claim can take the volume."""
    name = f"{namespace}-{claim}"
    modes, labels = ["ReadWriteMany", "ReadWriteOnce"], {"app.kubernetes.io/managed-by": "trireme-local-cluster"}
    return {
        "volume": {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "capacity": {"storage": size},
                "accessModes": modes,
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": str(path), "type": "Directory"},
                "claimRef": {"namespace": namespace, "name": claim},
            },
        },
        "claim": {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim, "namespace": namespace, "labels": labels},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "",
                "volumeName": name,
                "resources": {"requests": {"storage": size}},
            },
        },
    }


def make(choice: backend.Choice, name: str, claim: str, size: str, namespace: str) -> Dict[str, str]:
    """Make the folder (writable by any user, as containers run as one), the volume and the claim; safe to repeat."""
    if choice.kind == backend.EXISTING:
        raise ClusterError(
            "KUBECONFIG names a cluster of your own: make a ReadWriteMany claim with its storage classes instead "
            "(`make demo` does; TRIREME_STORAGE_CLASS chooses the class)"
        )
    if choice.kind == backend.BUILTIN:
        Cluster(name).require()
    paths = ClusterPaths(name)
    path = paths.volumes / namespace / claim
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o777)
    made = objects(claim, namespace, size, path)
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    if choice.kind == backend.KIND:
        # kind binds the volumes folder into its nodes at the same path; its kubeconfig is kubectl's to read.
        items = {"apiVersion": "v1", "kind": "List", "items": [space, made["volume"], made["claim"]]}
        run(["kubectl", "--kubeconfig", str(paths.kubeconfig), "apply", "-f", "-"], stdin=json.dumps(items))
    else:
        api = Api(paths.kubeconfig)
        api.create_or_get("/api/v1/namespaces", namespace, space)
        api.create_or_get("/api/v1/persistentvolumes", f"{namespace}-{claim}", made["volume"])
        api.create_or_get(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims", claim, made["claim"])
    return {"claim": claim, "namespace": namespace, "path": str(path)}

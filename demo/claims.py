"""The demo's claims on a cluster of the user's own: made by its storage classes, reached through a pod."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from trireme_api.protocol import PVC_ROOT

from demo.kube import Kube
from demo.report import DemoError, say
from demo.storage import CLAIMS, InPod

CLASS = "TRIREME_STORAGE_CLASS"
SIZE = "TRIREME_STORAGE_SIZE"
DEFAULT_SIZE = "5Gi"
POD = "trireme-claims"
MANY, ONCE = "ReadWriteMany", "ReadWriteOnce"
DEFAULT_MARKS = ("storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class")
USER = 65532
"""The user of training pods: what the helper writes, they can, and the other way round."""
REFUSED_FOR = 20.0
"""Seconds for which a refusal must stand: provisioners also fail for a moment."""
PATIENCE = 180.0
Document = dict[str, Any]


def storage_class(classes: Sequence[Mapping[str, Any]], wanted: str) -> str:
    """Name of the class to ask, empty for the cluster's default. Raises DemoError where there is no such."""
    names = sorted(c["metadata"]["name"] for c in classes)
    known = ", ".join(names) or "none at all"
    if wanted:
        if wanted not in names:
            raise DemoError(f"{CLASS}={wanted}: no such storage class; the cluster has {known}")
        return wanted
    for one in classes:
        marks = one["metadata"].get("annotations") or {}
        if any(marks.get(mark) == "true" for mark in DEFAULT_MARKS):
            return ""
    raise DemoError(
        f"the cluster has no default storage class: set {CLASS} (there are: {known}), "
        f"or make claims named {' and '.join(CLAIMS)} yourself"
    )


def claim(name: str, mode: str, chosen: str, size: str) -> Document:
    spec: Document = {"accessModes": [mode], "resources": {"requests": {"storage": size}}}
    if chosen:
        spec["storageClassName"] = chosen
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def helper(image: str, pull_policy: str) -> Document:
    """A pod that mounts all claims where training pods do. It ends by itself after a day."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": POD, "labels": {"app.kubernetes.io/name": POD}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "claims",
                    "image": image,
                    "imagePullPolicy": pull_policy,
                    "command": ["sleep", "86400"],
                    "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "2Gi"}},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": name, "mountPath": f"{PVC_ROOT}/{name}"} for name in CLAIMS],
                }
            ],
            "volumes": [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in CLAIMS],
        },
    }


def refusal(pod: Mapping[str, Any], claims: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> str:
    """Why the cluster does not give the volumes; empty while that is not known. `events` are of the namespace."""
    waiting = {c["metadata"]["uid"] for c in claims if (c.get("status") or {}).get("phase") != "Bound"}
    for event in events:
        if event.get("reason") in ("ProvisioningFailed", "FailedBinding") and (
            event["involvedObject"].get("uid") in waiting
        ):
            return str(event.get("message", ""))
    for condition in (pod.get("status") or {}).get("conditions") or []:
        message = condition.get("message", "")
        if condition["type"] == "PodScheduled" and "available persistent volumes to bind" in message:
            return str(message)
    return ""


def image_trouble(pod: Mapping[str, Any]) -> str:
    for status in (pod.get("status") or {}).get("containerStatuses") or []:
        waiting = (status.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in ("ErrImageNeverPull", "ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
            return f"{waiting['reason']}: {waiting.get('message', status.get('image', ''))}"
    return ""


def open_claims(kube: Kube, image: str, pull_policy: str) -> InPod:
    """Claims in the namespace (those that are there are used as they are) and a running pod that mounts them."""
    if kube.get("namespace", kube.namespace) is None:
        kube.out("create", "namespace", kube.namespace)
    there = {c["metadata"]["name"] for c in _claims(kube)}
    lacking = [name for name in CLAIMS if name not in there]
    if lacking:
        chosen = storage_class(kube.items("storageclasses"), os.environ.get(CLASS, ""))
        _make(kube, lacking, chosen, image, pull_policy)
    else:
        why = _start(kube, image, pull_policy)
        if why:
            raise DemoError(f"the claims {', '.join(CLAIMS)} in namespace {kube.namespace} cannot be used: {why}")
    return InPod(kube, POD, _pin(kube))


def _make(kube: Kube, lacking: Sequence[str], chosen: str, image: str, pull_policy: str) -> None:
    size = os.environ.get(SIZE) or DEFAULT_SIZE
    why = ""
    for mode in (MANY, ONCE):
        kube.apply(*(claim(name, mode, chosen, size) for name in lacking))
        refused = _start(kube, image, pull_policy)
        if not refused:
            return
        why = why or refused
        kube.delete("pod", POD)
        for name in lacking:
            kube.delete("persistentvolumeclaim", name)
    raise DemoError(f"the storage class gives neither {MANY} nor {ONCE} volumes of {size} (set {CLASS}, {SIZE}): {why}")


def _start(kube: Kube, image: str, pull_policy: str) -> str:
    """Waits until the helper runs; returns why not where that is the storage's doing."""
    here = kube.get("pod", POD)
    if here is not None and (here["status"].get("phase") != "Running" or "deletionTimestamp" in here["metadata"]):
        kube.delete("pod", POD)
        here = None
    if here is None:
        kube.apply(helper(image, pull_policy))
    began, refused_since, why = time.monotonic(), 0.0, ""
    while time.monotonic() - began < PATIENCE:
        pod = kube.get("pod", POD) or {}
        if _ready(pod):
            return ""
        trouble = image_trouble(pod)
        if trouble:
            raise DemoError(f"pod {POD} in namespace {kube.namespace}: {trouble}")
        why = refusal(pod, _claims(kube), kube.items("events"))
        refused_since = (refused_since or time.monotonic()) if why else 0.0
        if why and time.monotonic() - refused_since >= REFUSED_FOR:
            return why
        time.sleep(1)
    raise DemoError(
        f"pod {POD} in namespace {kube.namespace} does not run after {PATIENCE:.0f} s{': ' + why if why else ''}; "
        f"see `kubectl -n {kube.namespace} describe pod {POD}`"
    )


def _ready(pod: Mapping[str, Any]) -> bool:
    status = pod.get("status") or {}
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or [])


def _claims(kube: Kube) -> list[Document]:
    return [c for c in kube.items("persistentvolumeclaims") if c["metadata"]["name"] in CLAIMS]


def _pin(kube: Kube) -> dict[str, str]:
    """With a volume that one node at a time can mount, jobs must run where the helper does."""
    single = [c["metadata"]["name"] for c in _claims(kube) if MANY not in (c["status"].get("accessModes") or [])]
    if not single:
        return {}
    pod = kube.get("pod", POD) or {}
    node = str(pod["spec"]["nodeName"])
    found = kube.get("node", node) or {}
    host = (found.get("metadata", {}).get("labels") or {}).get("kubernetes.io/hostname", node)
    say(
        f"  {', '.join(single)}: no {MANY}, so every pod runs on node {node}; "
        f"for several nodes set {CLASS} to a class that gives {MANY}"
    )
    return {"kubernetes.io/hostname": host}

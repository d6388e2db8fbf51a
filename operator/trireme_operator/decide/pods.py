"""The manifest of a training pod. Everything but the allow-listed template is the operator's, and written last."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trireme_api.job import API_VERSION, KIND, Slot, TrainingJobSpec, pod_name
from trireme_api.layout import (
    AGENT_DIR,
    AGENT_FILE,
    LOG_DIR,
    MEMORY_DIR,
    POWERCAP_DIR,
    RUN_DIR,
    TOKEN_DIR,
    claims,
    memory_limit,
    procs_per_node,
)
from trireme_api.protocol import AGENT_METRICS_PORT, PVC_ROOT, TOKEN_AUDIENCE, TRAINER_METRICS_PORT, Env
from trireme_api.template import PodTemplate, as_plain

from trireme_operator.decide.views import INCARNATION_LABEL, JOB_LABEL, JOB_UID_LABEL, MANAGED, SLOT_LABEL, Job

UNPRIVILEGED_USER = 65532
NODE_LOSS_SECONDS = 30
"""How long a pod tolerates its node being not ready; Kubernetes' default of 300 is five minutes of idle GPUs."""
TRAINER_COMMAND = ("python3", "-m", "trireme_trainer")


@dataclass(frozen=True)
class Images:
    """What every pod needs to know of this operator's installation."""

    trainer: str
    agent: str
    coordinator: str
    """Base URL that pods reach."""
    coordinator_ca: str
    """PEM text."""
    pull_policy: str | None = None
    json_logs: bool = False
    """Agents and trainers log as the operator does."""
    powercap: str | None = None
    """Folder of each node with its energy counters, mounted read-only into pods; None: they see what /sys shows."""


def pod_manifest(job: Job, spec: TrainingJobSpec, slot: Slot, images: Images) -> dict[str, Any]:
    """The pod of one slot. A pure function: the same slot always gives the same pod."""
    template = spec.template
    user = template.run_as_user or UNPRIVILEGED_USER
    pod_spec: dict[str, Any] = {
        "restartPolicy": "Never",
        # Its only token is the one below, with our audience and no rights; another account cannot be asked for.
        "serviceAccountName": "default",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": template.termination_grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": template.fs_group or user,
            # A large claim must not be walked file by file each time a pod starts.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": _tolerations(template),
        "initContainers": [_agent_container(images)],
        "containers": [_container(job, spec, images)],
        "volumes": _volumes(spec, images),
    }
    if template.node_selector:
        pod_spec["nodeSelector"] = dict(template.node_selector)
    if job.status.avoided_nodes:
        pod_spec["affinity"] = _away_from([node.name for node in job.status.avoided_nodes])
    if template.runtime_class_name:
        pod_spec["runtimeClassName"] = template.runtime_class_name
    if template.image_pull_secrets:
        pod_spec["imagePullSecrets"] = [{"name": secret.name} for secret in template.image_pull_secrets]
    if spec.scheduling_policy.priority_class_name:
        pod_spec["priorityClassName"] = spec.scheduling_policy.priority_class_name
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod_name(job.name, slot),
            "namespace": job.namespace,
            "labels": {
                **template.labels,
                **labels(job),
                SLOT_LABEL: str(slot.index),
                INCARNATION_LABEL: str(slot.incarnation),
            },
            "annotations": dict(template.annotations),
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "name": job.name,
                    "uid": job.uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": pod_spec,
    }


def labels(job: Job) -> dict[str, str]:
    return {
        "app.kubernetes.io/managed-by": "trireme",
        MANAGED: "true",
        JOB_LABEL: job.name,
        JOB_UID_LABEL: job.uid,
    }


def _away_from(nodes: list[str]) -> dict[str, Any]:
    """By name, which every node has; a field takes one value per expression, and all expressions must hold."""
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in sorted(nodes)]
    terms = {"nodeSelectorTerms": [{"matchFields": fields}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def _restricted() -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _agent_container(images: Images) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "trireme-agent",
        "image": images.agent,
        "command": ["cp", "/agent.pyz", AGENT_FILE],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"memory": "64Mi"}},
        "securityContext": _restricted(),
        "volumeMounts": [{"name": "trireme-agent", "mountPath": AGENT_DIR}],
    }
    if images.pull_policy:
        container["imagePullPolicy"] = images.pull_policy
    return container


def _container(job: Job, spec: TrainingJobSpec, images: Images) -> dict[str, Any]:
    template = spec.template
    command = [*template.command, *template.args] if spec.recipe is None else list(TRAINER_COMMAND)
    container: dict[str, Any] = {
        "name": "trainer",
        "image": template.image or images.trainer,
        "command": ["python3", AGENT_FILE, "--", *command],
        "env": _environment(job, spec, images),
        "resources": as_plain(template.resources),
        "securityContext": _restricted(),
        "volumeMounts": _mounts(spec, images),
        "ports": [
            {"name": "agent-metrics", "containerPort": AGENT_METRICS_PORT},
            {"name": "trainer-metrics", "containerPort": TRAINER_METRICS_PORT},
        ],
        # The agent writes what failed to /dev/termination-log; the log's end would only repeat it less exactly.
        "terminationMessagePolicy": "File",
    }
    policy = template.image_pull_policy or (None if template.image else images.pull_policy)
    if policy:
        container["imagePullPolicy"] = policy
    if template.working_dir:
        container["workingDir"] = template.working_dir
    return container


def _environment(job: Job, spec: TrainingJobSpec, images: Images) -> list[dict[str, Any]]:
    ours: dict[str, str] = {
        Env.JOB: job.name,
        Env.JOB_UID: job.uid,
        Env.NAMESPACE: job.namespace,
        Env.COORDINATOR: images.coordinator,
        Env.COORDINATOR_CA: images.coordinator_ca,
        Env.TOKEN_FILE: f"{TOKEN_DIR}/token",
        Env.PROCS_PER_NODE: str(procs_per_node(spec)),
        Env.CPU_WATTS_PER_CORE: f"{spec.carbon_policy.cpu_watts_per_core:g}",
        Env.DRAM_WATTS_PER_GIGABYTE: f"{spec.carbon_policy.dram_watts_per_gigabyte:g}",
        Env.HEARTBEAT_DIR: RUN_DIR,
        Env.STOP_FILE: f"{RUN_DIR}/stop",
        Env.LOG_DIR: LOG_DIR,
        Env.PVC_ROOT: PVC_ROOT,
        Env.METRICS_PORT: str(TRAINER_METRICS_PORT),
        Env.AGENT_METRICS_PORT: str(AGENT_METRICS_PORT),
    }
    if images.powercap:
        ours[Env.POWERCAP] = POWERCAP_DIR
    if images.json_logs:
        ours[Env.LOG_FORMAT] = "json"
    if spec.carbon_policy.gpu_watts is not None:
        ours[Env.GPU_WATTS] = f"{spec.carbon_policy.gpu_watts:g}"
    if memory_limit(spec):
        ours[Env.MEMORY_DIR] = MEMORY_DIR
    if spec.recipe is not None:
        ours[Env.AGENT_WARM_START] = "1" if spec.run_policy.warm_start else "0"
        ours[Env.RECIPE] = _json(spec.recipe.model_dump(mode="json", by_alias=True, exclude_none=True))
    ours[Env.HANG_POLICY] = _json(spec.hang_policy.model_dump(mode="json", by_alias=True))
    if spec.checkpoint is not None:
        ours[Env.CHECKPOINT] = _json(spec.checkpoint.model_dump(mode="json", by_alias=True, exclude_none=True))
    theirs: list[dict[str, Any]] = [as_plain(variable) for variable in spec.template.env]
    if not any(variable["name"] == "HOME" for variable in theirs):
        theirs.insert(0, {"name": "HOME", "value": "/tmp"})  # the user has none, and the root is read-only
    fields = {Env.POD: "metadata.name", Env.POD_UID: "metadata.uid", Env.NODE: "spec.nodeName"}
    return [
        *theirs,
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
        *({"name": name, "value": value} for name, value in ours.items()),
    ]


def _json(data: Any) -> str:
    # The kubelet expands $(NAME) in values; doubling the dollar keeps a recipe's text as it is.
    return json.dumps(data, separators=(",", ":"), sort_keys=True).replace("$", "$$")


def _volumes(spec: TrainingJobSpec, images: Images) -> list[dict[str, Any]]:
    limit = memory_limit(spec)
    shm: dict[str, Any] = {"medium": "Memory"}
    if spec.template.shared_memory is not None:
        shm["sizeLimit"] = spec.template.shared_memory
    token = {"audience": TOKEN_AUDIENCE, "expirationSeconds": 3600, "path": "token"}
    volumes: list[dict[str, Any]] = [as_plain(volume) for volume in spec.template.volumes]
    for volume, plain in zip(spec.template.volumes, volumes, strict=True):
        if volume.empty_dir is not None:
            plain.setdefault("emptyDir", {})  # an emptyDir that says nothing is still an emptyDir
    volumes += [
        {"name": "trireme-agent", "emptyDir": {}},
        {"name": "trireme-run", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
        *([{"name": "trireme-memory", "emptyDir": {"medium": "Memory", "sizeLimit": limit}}] if limit else []),
        {"name": "trireme-logs", "emptyDir": {}},
        {"name": "trireme-tmp", "emptyDir": {}},
        {"name": "trireme-shm", "emptyDir": shm},
        {"name": "trireme-token", "projected": {"sources": [{"serviceAccountToken": token}]}},
    ]
    if images.powercap:
        volumes.append({"name": "trireme-powercap", "hostPath": {"path": images.powercap, "type": "Directory"}})
    for i, claim in enumerate(claims(spec)):
        volumes.append({"name": f"trireme-claim-{i}", "persistentVolumeClaim": {"claimName": claim}})
    return volumes


def _mounts(spec: TrainingJobSpec, images: Images) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [as_plain(mount) for mount in spec.template.volume_mounts]
    mounts += [
        {"name": "trireme-agent", "mountPath": AGENT_DIR, "readOnly": True},
        {"name": "trireme-run", "mountPath": RUN_DIR},
        *([{"name": "trireme-memory", "mountPath": MEMORY_DIR}] if memory_limit(spec) else []),
        {"name": "trireme-logs", "mountPath": LOG_DIR},
        {"name": "trireme-tmp", "mountPath": "/tmp"},
        {"name": "trireme-shm", "mountPath": "/dev/shm"},
        {"name": "trireme-token", "mountPath": TOKEN_DIR, "readOnly": True},
    ]
    if images.powercap:
        mounts.append({"name": "trireme-powercap", "mountPath": POWERCAP_DIR, "readOnly": True})
    for i, (claim, written) in enumerate(claims(spec).items()):
        mounts.append({"name": f"trireme-claim-{i}", "mountPath": f"{PVC_ROOT}/{claim}", "readOnly": not written})
    return mounts


def _tolerations(template: PodTemplate) -> list[dict[str, Any]]:
    given: list[dict[str, Any]] = [as_plain(toleration) for toleration in template.tolerations]
    return given + [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_LOSS_SECONDS}
        for key in _node_loss_taints(template.tolerations)
    ]


def _node_loss_taints(given: Iterable[Any]) -> list[str]:
    named = {toleration.key for toleration in given}
    return [key for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable") if key not in named]

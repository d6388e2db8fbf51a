"""The pod of a slot: names, ownership, the restricted profile, the environment; and nothing a tenant could bend."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import kubernetes_validate
import pytest
from operator_cases import manifest
from trireme_api.job import Slot
from trireme_operator.decide.pods import Images, pod_manifest
from trireme_operator.decide.views import job_of, pod_of

IMAGES = Images("trainer:1", "agent:1", "https://10.96.0.20:8443", "-----BEGIN CERTIFICATE-----\nx\n", "Never")
RECIPE = {
    "model": {"preset": "opt-8m"},
    "data": {"sources": [{"path": "pvc://corpus/en"}, {"path": "pvc://work/de"}], "sequenceLength": 128},
    "batch": {"tokens": 1024},
    "until": {"steps": 10},
}


def made(name: str = "job", slot: int = 1, incarnation: int = 3, **spec: Any) -> dict[str, Any]:
    job = job_of(manifest(name, **spec))
    assert job.spec is not None, job.problems
    return pod_manifest(job, job.spec, Slot(index=slot, incarnation=incarnation), IMAGES)


def recipe_pod(**template: Any) -> dict[str, Any]:
    return made(recipe=RECIPE, checkpoint={"uri": "pvc://work/out"}, template=template)


def env(pod: dict[str, Any]) -> dict[str, Any]:
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in pod["spec"]["containers"][0]["env"]}


def mounts(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {item["mountPath"]: item for item in pod["spec"]["containers"][0]["volumeMounts"]}


@pytest.mark.parametrize("version", ["1.26", "1.37"])
def test_the_servers_schema_takes_it(version: str) -> None:
    for pod in (made(), recipe_pod(sharedMemory="8Gi", resources={"limits": {"nvidia.com/gpu": 8}})):
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_nodes_energy_counters_are_mounted_only_where_the_installation_says_so() -> None:
    job = job_of(manifest("job"))
    assert job.spec is not None
    plain = made()
    assert "TRIREME_POWERCAP" not in env(plain)
    assert not [volume for volume in plain["spec"]["volumes"] if "hostPath" in volume]
    images = dataclasses.replace(IMAGES, powercap="/sys/devices/virtual/powercap")
    pod = pod_manifest(job, job.spec, Slot(index=0, incarnation=1), images)
    mount = mounts(pod)[env(pod)["TRIREME_POWERCAP"]]
    assert mount["readOnly"] is True
    (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == mount["name"]]
    assert volume["hostPath"] == {"path": "/sys/devices/virtual/powercap", "type": "Directory"}
    kubernetes_validate.validate(pod, "1.37", strict=True)


def test_identity() -> None:
    pod = made()
    assert pod["metadata"]["name"] == "job-1-3"
    owner = pod["metadata"]["ownerReferences"][0]
    assert (owner["uid"], owner["controller"], owner["kind"]) == ("uid", True, "TrainingJob")
    pod["metadata"] |= {"uid": "p", "resourceVersion": "1"}
    read = pod_of(pod)
    assert (read.owner_uid, read.owner_name, read.slot, read.incarnation) == ("uid", "job", 1, 3)


def test_labels_of_a_user_never_win() -> None:
    job = job_of(manifest(template={"image": "i", "command": ["c"], "labels": {"team": "x"}}))
    assert job.spec is not None
    template = job.spec.template.model_copy(update={"labels": {"trireme.dev/job-uid": "forged", "team": "x"}})
    spec = job.spec.model_copy(update={"template": template})
    found = pod_manifest(job, spec, Slot(index=0, incarnation=1), IMAGES)["metadata"]["labels"]
    assert found["trireme.dev/job-uid"] == "uid"
    assert found["team"] == "x"


def test_the_restricted_profile() -> None:
    for pod in (made(), recipe_pod(runAsUser=1234)):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["serviceAccountName"] == "default"
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "nodeName"} & set(spec)
        for container in [*spec["initContainers"], *spec["containers"]]:
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)


def test_the_agent_comes_first_and_starts_the_command() -> None:
    pod = made(template={"image": "mine", "command": ["python3", "train.py"], "args": ["--lr", "1"]})
    assert pod["spec"]["initContainers"][0]["command"] == ["cp", "/agent.pyz", "/trireme/agent.pyz"]
    main = pod["spec"]["containers"][0]
    assert main["image"] == "mine"
    assert main["command"] == ["python3", "/trireme/agent.pyz", "--", "python3", "train.py", "--lr", "1"]
    assert "imagePullPolicy" not in main, "the operator's policy is for the operator's images"
    assert mounts(pod)["/trireme"]["readOnly"] is True


def test_a_recipe_runs_in_the_trainer_image() -> None:
    pod = recipe_pod()
    main = pod["spec"]["containers"][0]
    assert (main["image"], main["imagePullPolicy"]) == ("trainer:1", "Never")
    assert main["command"][3:] == ["python3", "-m", "trireme_trainer"]
    found = env(pod)
    assert json.loads(found["TRIREME_RECIPE"])["model"]["preset"] == "opt-8m"
    assert json.loads(found["TRIREME_CHECKPOINT"])["uri"] == "pvc://work/out"
    assert found["TRIREME_COORDINATOR"] == IMAGES.coordinator
    assert found["TRIREME_COORDINATOR_CA"] == IMAGES.coordinator_ca
    assert found["TRIREME_POD_UID"] == {"fieldRef": {"fieldPath": "metadata.uid"}}


def test_claims_are_mounted_and_only_what_is_written_is_writable() -> None:
    found = mounts(recipe_pod())
    assert found["/mnt/pvc/corpus"]["readOnly"] is True
    assert found["/mnt/pvc/work"]["readOnly"] is False
    volumes = {v["name"]: v for v in recipe_pod()["spec"]["volumes"]}
    assert volumes[found["/mnt/pvc/work"]["name"]]["persistentVolumeClaim"] == {"claimName": "work"}


def test_the_token_has_our_audience_and_no_other_volume_a_token() -> None:
    projected = [v for v in made()["spec"]["volumes"] if "projected" in v]
    (source,) = projected[0]["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "trireme"
    assert len(projected) == 1


def test_a_dollar_in_a_recipe_is_not_expanded() -> None:
    sources = [{"path": "s3://bucket/$(SECRET)"}]
    pod = made(
        recipe={**RECIPE, "data": {"sources": sources, "sequenceLength": 128}},
        checkpoint={"uri": "pvc://w/o"},
        template={},
    )
    assert "$$(SECRET)" in env(pod)["TRIREME_RECIPE"]


def test_node_loss_is_tolerated_briefly_unless_the_user_says_otherwise() -> None:
    def seconds(pod: dict[str, Any]) -> dict[str, Any]:
        return {t["key"]: t.get("tolerationSeconds") for t in pod["spec"]["tolerations"]}

    assert seconds(made()) == {"node.kubernetes.io/not-ready": 30, "node.kubernetes.io/unreachable": 30}
    own = {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 7}
    assert seconds(recipe_pod(tolerations=[own]))["node.kubernetes.io/not-ready"] == 7


def test_an_empty_dir_that_says_nothing_is_still_one() -> None:
    volumes = [{"name": "scratch", "emptyDir": {}}]
    pod = recipe_pod(volumes=volumes, volumeMounts=[{"name": "scratch", "mountPath": "/scratch"}])
    assert {"name": "scratch", "emptyDir": {}} in pod["spec"]["volumes"]


def test_init_containers_that_fail_and_reasons_for_waiting_are_read() -> None:
    obj = {**made(), "status": {
        "phase": "Pending",
        "initContainerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull", "message": "no agent image"}}}],
        "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}],
    }}  # fmt: skip
    obj["metadata"] |= {"uid": "p"}
    read = pod_of(obj)
    assert (read.waiting, read.waiting_message, read.disruption) == (
        "ErrImagePull",
        "no agent image",
        "EvictionByEvictionAPI",
    )
    obj["status"] = {"initContainerStatuses": [{"state": {"terminated": {"exitCode": 3}}}]}
    assert pod_of(obj).ended is not None


def test_ranks_of_a_recipe_start_warm_unless_told_otherwise() -> None:
    def value(**spec: Any) -> str | None:
        return env(made(**spec)).get("TRIREME_AGENT_WARM_START")

    recipe = {"recipe": RECIPE, "checkpoint": {"uri": "pvc://work/out"}, "template": {}}
    assert value(**recipe) == "1"
    assert value(**recipe, runPolicy={"warmStart": False}) == "0"
    assert value() is None, "an own script may do anything while it is imported"

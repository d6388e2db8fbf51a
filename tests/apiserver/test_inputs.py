"""Bad input: refused by the server where it can, else a condition with field and remedy; nothing half made."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Callable
from typing import Any

import pytest
from localcluster.apiserver import ApiServer
from rig import KubeletStandIn, OperatorProcess, World, eventually, last_applied, script_job, set_ready
from trireme_api.crd import COLUMNS

Operators = Callable[..., OperatorProcess]
Kubelets = Callable[..., KubeletStandIn]
Json = dict[str, Any]


def recipe_job(**changes: Any) -> Json:
    recipe = {
        "model": {"preset": "opt-8m"},
        "data": {"sources": [{"path": "pvc://corpus/en"}], "sequenceLength": 128},
        "batch": {"tokens": 1024},
        "until": {"steps": 10},
        **changes.pop("recipe", {}),
    }
    return {"recipe": recipe, "checkpoint": {"uri": "pvc://checkpoints/x"}, **changes}


REFUSED_BY_SERVER = {
    "negative replicas": ({**script_job(), "replicas": {"desired": -1}}, "spec.replicas.desired"),
    "a word for a number": ({**script_job(), "replicas": {"desired": "many"}}, "spec.replicas.desired"),
    "an unknown choice": ({**script_job(), "schedulingPolicy": {"gang": "perhaps"}}, "spec.schedulingPolicy.gang"),
    "a required field left out": ({"recipe": {"model": {"preset": "opt-8m"}}}, "spec.recipe.data"),
    "no spec": (None, "spec"),
}


@pytest.mark.parametrize("case", REFUSED_BY_SERVER)
def test_what_the_schema_says_the_server_refuses(world: World, case: str) -> None:
    spec, field = REFUSED_BY_SERVER[case]
    with pytest.raises(urllib.error.HTTPError) as caught:
        world.create("bad", spec)  # type: ignore[arg-type]
    assert caught.value.code == 422
    assert field in json.loads(caught.value.read())["message"]


INVALID = {
    "preset": (recipe_job(recipe={"model": {"preset": "opt-9m"}}), "spec.recipe.model.preset", "did you mean 'opt-8m'"),
    "batch": (recipe_job(recipe={"batch": {"tokens": 1000}}), "spec.recipe", "multiple of"),
    "heads": (
        recipe_job(recipe={"model": {"preset": "opt-8m", "overrides": {"heads": 3}}}), "spec.recipe.model.overrides",
        "set heads to 2 or 4",
    ),
    "experts": (
        recipe_job(recipe={"model": {"preset": "moe-tiny"}, "parallelism": {"expert": 3}}),
        "spec.recipe.parallelism.expert", "set a divisor",
    ),
    "language": (
        recipe_job(recipe={"data": {
            "sources": [{"path": "pvc://corpus/en", "language": "en"}], "sequenceLength": 128,
            "mixture": {"upsample": {"te": 10}},
        }}),
        "data.mixture.upsample.te", "set the language of one",
    ),
    "neither": ({"replicas": {"desired": 1}}, "spec", "give a recipe, or your own script"),
    "both": (recipe_job(template={"command": ["x"]}), "spec", "with a recipe leave them out"),
    "no checkpoint": ({**recipe_job(), "checkpoint": None}, "spec", "checkpoint.uri is required"),
    "zone": ({**script_job(), "carbonPolicy": {"zone": "XX"}}, "spec.carbonPolicy.zone", "use an ISO 3166 country"),
    "quantity": (
        {**script_job(), "template": {"image": "i", "command": ["c"], "resources": {"limits": {"memory": "8Gb"}}}},
        "spec.template.resources.limits.memory", "8Gi",
    ),
    "local path": (recipe_job(checkpoint={"uri": "/data/x"}), "spec.checkpoint.uri", "pvc://CLAIM/DIRECTORY"),
    "reserved env": (
        {**script_job(), "template": {"image": "i", "command": ["c"], "env": [{"name": "RANK", "value": "1"}]}},
        "spec.template.env[0]", "remove it",
    ),
}  # fmt: skip


def test_what_only_the_operator_sees_becomes_a_condition(world: World, operators: Operators) -> None:
    operator = operators()
    for case, (spec, _, _) in INVALID.items():
        world.create(f"bad-{case.replace(' ', '-')}", {key: value for key, value in spec.items() if value is not None})
    for case, (_, field, remedy) in INVALID.items():
        name = f"bad-{case.replace(' ', '-')}"
        world.wait_phase(name, "Invalid")
        condition = world.condition(name, "Invalid")
        assert condition["status"] == "True"
        assert condition["reason"] == "InvalidSpec"
        assert field in condition["message"], (case, condition["message"])
        assert remedy in condition["message"], (case, condition["message"])
        assert world.status(name)["observedGeneration"] == 1
    assert not world.pods()
    # The operator is unharmed, and a mended spec is taken up.
    world.patch("bad-preset", {"recipe": {"model": {"preset": "opt-8m"}}})
    eventually(lambda: world.phase("bad-preset") == "Pending", "the mended job queues")
    assert operator.get("/healthz") == "ok"


def test_a_field_that_an_old_server_dropped_is_noticed(world: World, operators: Operators) -> None:
    operators()
    written = {**script_job(), "replica": {"desired": 2}}
    world.create("typo", written, last_applied(written, "typo", world.namespace))
    if "replica" in (world.job("typo") or {})["spec"]:
        pytest.fail("the server kept an unknown field: the CRD's schema is not structural")
    world.wait_phase("typo", "Invalid")
    assert "spec.replica: unknown field; did you mean 'replicas'?" in world.condition("typo", "Invalid")["message"]
    assert not world.pods()


def test_a_missing_claim_is_named_and_the_job_starts_when_it_is_there(world: World, operators: Operators) -> None:
    operators()
    world.create("claims", recipe_job())
    world.wait_phase("claims", "Pending")
    eventually(lambda: world.condition("claims", "Admitted").get("reason") == "ClaimNotFound", "the claim is missed")
    message = world.condition("claims", "Admitted")["message"]
    assert "spec.recipe.data.sources[0].path" in message
    assert "'corpus'" in message
    assert "spec.checkpoint.uri" in message
    assert not world.pods()
    for claim in ("corpus", "checkpoints"):
        body = {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim},
            "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}},
        }  # fmt: skip
        world.api.request("POST", f"/api/v1/namespaces/{world.namespace}/persistentvolumeclaims", body)
    eventually(lambda: len(world.pods("claims")) == 1, "pods once the claims are there", 30)


def test_a_gang_larger_than_the_cluster_is_told_so(world: World, operators: Operators) -> None:
    operators()
    spec = script_job(4)
    spec["template"]["resources"] = {"limits": {"nvidia.com/gpu": 8}}
    world.create("huge", spec)
    eventually(lambda: world.condition("huge", "Admitted").get("reason") == "LargerThanCluster", "the verdict")
    message = world.condition("huge", "Admitted")["message"]
    assert "spec.replicas.desired" in message
    assert "(3)" in message
    assert not world.pods()
    assert any(event["reason"] == "LargerThanCluster" for event in world.events("huge"))


def test_two_gangs_that_fit_one_after_the_other(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    kubelet()
    spec = script_job(2)
    spec["template"]["resources"] = {"limits": {"nvidia.com/gpu": 8}}
    world.create("first", spec)
    world.create("second", spec)
    eventually(lambda: len(world.pods()) == 2, "one whole gang")
    holder = world.pods()[0]["metadata"]["labels"]["trireme.dev/job"]
    other = {"first": "second", "second": "first"}[holder]
    assert {pod["metadata"]["labels"]["trireme.dev/job"] for pod in world.pods()} == {holder}
    world.wait_phase(other, "Pending")
    world.delete(holder)
    eventually(lambda: len(world.pods(other)) == 2, "the other gang, once there is room")


def test_an_image_that_cannot_be_pulled_is_explained(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    world.create("noimage", script_job(1))
    pod = eventually(lambda: world.pods("noimage"), "the pod")[0]
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "stand-in"'}}
    status = {
        "containerStatuses": [
            {"name": "trainer", "image": "stand-in", "imageID": "", "restartCount": 0, "ready": False, "state": waiting}
        ]
    }
    path = f"/api/v1/namespaces/{world.namespace}/pods/{pod['metadata']['name']}"
    binding = {"metadata": {"name": pod["metadata"]["name"]}, "target": {"kind": "Node", "name": "node-a"}}
    world.api.request("POST", f"{path}/binding", binding)
    world.api.request("PATCH", f"{path}/status", {"status": status}, content="application/merge-patch+json")
    condition = eventually(
        lambda: (c := world.condition("noimage", "Initialized")).get("reason") == "ImagePullBackOff" and c, "the reason"
    )
    assert "spec.template.image" in condition["message"]


def test_an_edit_of_a_running_gang_is_ignored(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    kubelet()
    world.create("fixed", script_job(1))
    eventually(lambda: world.pods("fixed"), "the pod")
    world.patch("fixed", {"procsPerNode": 2})
    condition = eventually(lambda: (c := world.condition("fixed", "EditIgnored")).get("status") == "True" and c, "told")
    assert "spec.procsPerNode" in condition["message"]
    assert len(world.pods("fixed")) == 1
    world.patch("fixed", {"procsPerNode": None})
    eventually(lambda: world.condition("fixed", "EditIgnored").get("status") == "False", "taken back")


def test_a_lost_node_is_acted_on(world: World, server: ApiServer, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    kubelet(nodes=("node-c",))
    world.create("onc", script_job(1))
    eventually(lambda: world.status("onc").get("slots", [{}])[0].get("podUid"), "the pod is recorded")
    eventually(lambda: world.pods("onc")[0]["spec"].get("nodeName") == "node-c", "bound")
    try:
        set_ready(world.api, "node-c", False)
        status = eventually(lambda: (s := world.status("onc")).get("attempt", 0) >= 2 and s, "a replacement", 40)
        assert status["lastFailure"]["rule"] == "node-lost"
        assert status["lastFailure"]["node"] == "node-c"
    finally:
        set_ready(world.api, "node-c", True)


def test_subresources_and_columns(world: World, operators: Operators, kubelet: Kubelets) -> None:
    operators()
    kubelet()
    world.create("seen", script_job(2))
    eventually(lambda: world.status("seen").get("replicas", {}).get("created") == 2, "both pods counted")
    scale = world.api.request("GET", world.path("seen", "scale"))
    assert scale["spec"]["replicas"] == 2
    assert scale["status"]["replicas"] == 2
    uid = (world.job("seen") or {})["metadata"]["uid"]
    assert scale["status"]["selector"] == f"trireme.dev/job-uid={uid}"
    definition = world.api.request(
        "GET", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/trainingjobs.trireme.dev"
    )
    assert definition["spec"]["names"]["shortNames"] == ["tj"]
    shown = [column["name"] for column in definition["spec"]["versions"][0]["additionalPrinterColumns"]]
    assert shown == [name for name, *_ in COLUMNS]
    # Status is its own subresource: a write to the object does not touch it.
    world.api.request(
        "PATCH", world.path("seen"), {"status": {"phase": "Succeeded"}}, content="application/merge-patch+json"
    )
    assert world.phase("seen") != "Succeeded"


def test_ttl_removes_the_job(world: World, operators: Operators) -> None:
    operators()
    world.create("brief", script_job(1, runPolicy={"activeDeadlineSeconds": 1, "ttl": {"failedSeconds": 1}}))
    eventually(lambda: world.job("brief") is None, "the job is gone after its ttl", 30)
    eventually(lambda: not world.pods("brief"), "and its pods", 30)

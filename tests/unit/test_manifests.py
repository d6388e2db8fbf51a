"""What the scanners would say (kube-linter, kubescape, Polaris), said here: rules over the rendered manifests."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from test_operator_pods import made as training_pod
from trireme_api import protocol
from trireme_api.job import KIND, parse_spec
from trireme_api.validation import check_job

from demo.kube import kubectl_path

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "manifests"
Document = dict[str, Any]
INSTALLATIONS = ("manifests", "manifests/overlays/local", "manifests/overlays/production")
# Kubernetes' own schemas know nothing of these kinds.
MONITORING = {"PodMonitor", "ServiceMonitor", "PrometheusRule"}
FOREIGN = {"TrainingJob", *MONITORING}
OLDEST, NEWEST = "1.26", "1.37"


@cache
def render(folder: str) -> tuple[Document, ...]:
    done = subprocess.run(
        [kubectl_path(), "kustomize", str(ROOT / folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tuple(d for d in yaml.safe_load_all(done.stdout) if d)


def of_kind(documents: tuple[Document, ...], *kinds: str) -> list[Document]:
    return [d for d in documents if d["kind"] in kinds]


def named(documents: tuple[Document, ...], kind: str, name: str) -> Document:
    found = [d for d in of_kind(documents, kind) if d["metadata"]["name"] == name]
    assert len(found) == 1, f"{kind} {name}: {len(found)}"
    return found[0]


def deployment(folder: str) -> Document:
    return named(render(folder), "Deployment", "trireme-operator")


def samples() -> Iterator[Document]:
    for path in sorted((MANIFESTS / "samples").glob("*.yaml")):
        yield from (d for d in yaml.safe_load_all(path.read_text()) if d and d["kind"] == KIND)


@pytest.mark.parametrize("folder", [*INSTALLATIONS, "manifests/samples"])
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_document_has_the_servers_schema(folder: str, version: str) -> None:
    for document in render(folder):
        if document["kind"] not in FOREIGN and not (
            folder.endswith("local") and document["kind"] == "CustomResourceDefinition"
        ):
            kubernetes_validate.validate(document, version, strict=True)


def test_a_document_that_breaks_the_schema_is_caught() -> None:
    broken = {**deployment("manifests"), "spec": {**deployment("manifests")["spec"], "replcas": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, NEWEST, strict=True)


def test_monitoring_is_optional_and_renders(tmp_path: Path) -> None:
    for folder in INSTALLATIONS:
        assert not of_kind(render(folder), *MONITORING)
    there = os.path.relpath(MANIFESTS, tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{there}/overlays/production]\ncomponents: [{there}/monitoring]\n"
    )
    done = subprocess.run([kubectl_path(), "kustomize", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = tuple(d for d in yaml.safe_load_all(done.stdout) if d)
    named(found, "PrometheusRule", "trireme")
    operator = named(found, "ServiceMonitor", "trireme-operator")
    training = named(found, "PodMonitor", "trireme-training")
    chosen = operator["spec"]["selector"]["matchLabels"].items()
    services = [s for s in of_kind(found, "Service") if chosen <= s["metadata"]["labels"].items()]
    ports = {port["name"] for service in services for port in service["spec"]["ports"]}
    (endpoint,) = operator["spec"]["endpoints"]
    assert endpoint["port"] in ports
    assert endpoint["honorLabels"], "the operator speaks for the jobs of all namespaces"
    (endpoint,) = training["spec"]["podMetricsEndpoints"]
    assert "honorLabels" not in endpoint, "a pod could speak for another job"
    pod = training_pod()
    assert training["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert pod["metadata"]["labels"]["trireme.dev/job"] == "job"
    assert endpoint["port"] in {port["name"] for c in pod["spec"]["containers"] for port in c["ports"]}


# --- rights ---------------------------------------------------------------------------------------------------------


def rules(role: Document) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """(group, resource, verb, names) one by one."""
    for rule in role["rules"]:
        for group in rule.get("apiGroups", [""]):
            for resource in rule.get("resources", []):
                for verb in rule["verbs"]:
                    yield group, resource, verb, tuple(rule.get("resourceNames", ()))


@pytest.mark.parametrize("folder", INSTALLATIONS)
def test_rights_are_the_least(folder: str) -> None:
    roles = of_kind(render(folder), "ClusterRole", "Role")
    assert roles
    for role in roles:
        name = f"{role['kind']} {role['metadata']['name']}"
        for group, resource, verb, names in rules(role):
            assert "*" not in (group, resource, verb), f"{name}: wildcard"
            assert verb not in ("bind", "escalate", "impersonate"), f"{name}: {verb}"
            assert resource not in ("pods/exec", "pods/attach", "pods/portforward", "serviceaccounts/token"), (
                f"{name}: {resource}"
            )
            if resource == "secrets":
                assert role["kind"] == "Role", f"{name}: secrets of every namespace"
                assert verb not in ("list", "watch"), f"{name}: reads every secret of its namespace"
                assert verb == "create" or names, f"{name}: secrets without names"


@pytest.mark.parametrize("folder", INSTALLATIONS)
def test_bindings_name_what_is_there(folder: str) -> None:
    documents = render(folder)
    accounts = {(a["metadata"]["name"], a["metadata"]["namespace"]) for a in of_kind(documents, "ServiceAccount")}
    for binding in of_kind(documents, "ClusterRoleBinding", "RoleBinding"):
        named(documents, binding["roleRef"]["kind"], binding["roleRef"]["name"])
        assert binding["roleRef"]["name"] != "cluster-admin"
        for subject in binding["subjects"]:
            assert (subject["name"], subject["namespace"]) in accounts
    bound = {b["roleRef"]["name"] for b in of_kind(documents, "ClusterRoleBinding")}
    assert not bound & {"trireme-view", "trireme-edit"}, "people's roles are aggregated, not bound"


def test_people_may_write_jobs_but_not_their_status() -> None:
    documents = render("manifests")
    view, edit = named(documents, "ClusterRole", "trireme-view"), named(documents, "ClusterRole", "trireme-edit")
    assert view["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-view"] == "true"
    assert edit["metadata"]["labels"]["rbac.authorization.k8s.io/aggregate-to-edit"] == "true"
    reading = {"get", "list", "watch"}
    assert {verb for _, _, verb, _ in rules(view)} == reading
    for _, resource, verb, _ in [*rules(view), *rules(edit)]:
        assert not (resource == "trainingjobs/status" and verb not in reading)
    assert {"create", "delete", "patch", "update"} <= {v for _, r, v, _ in rules(edit) if r == "trainingjobs"}


# --- the operator's pod ---------------------------------------------------------------------------------------------


def containers(workload: Document) -> list[Document]:
    spec = workload["spec"]["template"]["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.mark.parametrize("folder", INSTALLATIONS)
def test_the_operator_runs_restricted(folder: str) -> None:
    spec = deployment(folder)["spec"]["template"]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & {key for key in spec if spec[key]}
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 10_000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["serviceAccountName"] == "trireme-operator"
    assert not [v for v in spec["volumes"] if "hostPath" in v]
    for container in containers(deployment(folder)):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not context.get("privileged")
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        assert not [e for e in container["env"] if "secretKeyRef" in e.get("valueFrom", {})]
        assert re.fullmatch(r".+:(?!latest$)[\w.-]+|.+@sha256:[0-9a-f]{64}", container["image"]), container["image"]


@pytest.mark.parametrize("folder", INSTALLATIONS)
def test_probes_and_services_point_at_ports_that_are_there(folder: str) -> None:
    documents = render(folder)
    workload = deployment(folder)
    labels = workload["spec"]["template"]["metadata"]["labels"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = {p["name"]: p["containerPort"] for c in containers(workload) for p in c["ports"]}
    (operator,) = workload["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert operator[probe]["httpGet"]["port"] in ports
    assert operator["livenessProbe"]["httpGet"]["path"] != operator["readinessProbe"]["httpGet"]["path"]
    services = of_kind(documents, "Service")
    for service in services:
        assert service["spec"]["selector"].items() <= labels.items()
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    assert ports["coordinator"] == protocol.COORDINATOR_PORT
    assert named(documents, "Service", "trireme-coordinator")["spec"]["ports"][0]["port"] == protocol.COORDINATOR_PORT


@pytest.mark.parametrize("folder", INSTALLATIONS)
def test_everything_lives_in_one_restricted_namespace(folder: str) -> None:
    documents = render(folder)
    (namespace,) = of_kind(documents, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    homeless = {"Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "PriorityClass"}
    for document in documents:
        if document["kind"] not in homeless:
            assert document["metadata"]["namespace"] == namespace["metadata"]["name"], document["metadata"]["name"]


@pytest.mark.parametrize("folder", INSTALLATIONS)
def test_the_network_is_closed_but_for_what_is_said(folder: str) -> None:
    policies = of_kind(render(folder), "NetworkPolicy")
    closed = [p for p in policies if p["spec"]["podSelector"] == {}]
    assert [set(p["spec"]["policyTypes"]) for p in closed] == [{"Ingress", "Egress"}]
    assert not [p for p in closed if "ingress" in p["spec"] or "egress" in p["spec"]]
    labels = deployment(folder)["spec"]["template"]["metadata"]["labels"]
    opened = [p for p in policies if p not in closed]
    assert {kind for p in opened for kind in p["spec"]["policyTypes"]} == {"Ingress", "Egress"}
    for policy in opened:
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items(), "selects nothing"
        for rule in [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]:
            assert rule["ports"]


def test_production_survives_a_node() -> None:
    documents = render("manifests/overlays/production")
    workload = deployment("manifests/overlays/production")
    assert workload["spec"]["replicas"] == 2
    labels = workload["spec"]["template"]["metadata"]["labels"]
    (budget,) = of_kind(documents, "PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert budget["spec"]["maxUnavailable"] == 1
    (apart, *_) = workload["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert apart["topologyKey"] == "kubernetes.io/hostname"
    assert apart["labelSelector"]["matchLabels"].items() <= labels.items()
    named(documents, "PriorityClass", workload["spec"]["template"]["spec"]["priorityClassName"])


# --- CRD and samples ------------------------------------------------------------------------------------------------


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def test_only_the_local_overlay_leaves_out_cel() -> None:
    for folder in INSTALLATIONS:
        (crd,) = of_kind(render(folder), "CustomResourceDefinition")
        assert ("x-kubernetes-validations" in set(keys(crd))) == (folder != "manifests/overlays/local"), folder


def test_the_local_overlay_uses_images_that_need_no_registry() -> None:
    (container,) = containers(deployment("manifests/overlays/local"))
    images = [container["image"], *[e["value"] for e in container["env"] if e["name"].endswith("_IMAGE")]]
    assert len(images) == 3
    assert all(image.startswith("localhost/trireme/") for image in images), images


def test_samples_are_valid_and_differ_in_name() -> None:
    jobs = list(samples())
    assert {job["metadata"]["name"] for job in jobs} == {
        "opt-8m", "opt-125m", "opt-1-3b", "ring", "normformer-125m", "normformer-tiny", "gpt-125m", "gpt-tiny",
        "moe-15b", "moe-tiny", "xglm-564m", "xglm-tiny", "xlmr-xl", "xlmr-tiny",
        "growing-125m", "growing-tiny", "smlp-1-7b", "smlp-tiny", "tam-125m", "tam-tiny",
        "growing-stream", "growing-stream-tiny",
    }
    for job in jobs:
        parse_spec(job["spec"])
        checked = check_job({**job, "metadata": {"namespace": "default", **job["metadata"]}})
        assert not checked.problems, [str(p) for p in checked.problems]


def test_gpu_samples_ask_for_gpus_and_say_how_nodes_talk() -> None:
    by_name = {job["metadata"]["name"]: job for job in samples()}
    for name in ("opt-125m", "opt-1-3b", "normformer-125m", "xlmr-xl"):
        template = by_name[name]["spec"]["template"]
        assert template["resources"]["limits"]["nvidia.com/gpu"] == 8
        assert "sharedMemory" in template
        assert [e for e in template["env"] if "NCCL" in e["name"]]
    assert {e["name"] for e in by_name["opt-1-3b"]["spec"]["template"]["env"]} >= {"NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"}

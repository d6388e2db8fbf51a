"""The cluster taken for one of the user's own: claims by its storage classes, data and step log through a pod."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_support import Jobs

from demo.claims import CLASS, DEFAULT_MARKS, MANY, ONCE, POD
from demo.kube import Kube
from demo.storage import CLAIMS, Folder, InPod
from demo.target import Target
from demo.training import prepare

# The first of them may be the one that brings up the cluster and trains the baseline.
pytestmark = pytest.mark.timeout(900)
STEPS = 10
EXACT = 1e-5
Document = dict[str, Any]


def storage_class(name: str, default: bool) -> Document:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name, "annotations": {DEFAULT_MARKS[0]: str(default).lower()}},
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    }


def volume(name: str, chosen: str, mode: str, folder: Path) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "5Gi"},
            "accessModes": [mode],
            "storageClassName": chosen,
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": str(folder), "type": "Directory"},
        },
    }


@pytest.fixture
def own(
    target: Target, manifest: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str, bool], Target]]:
    """(storage class, access mode, is it the default?) → the cluster as its user sees it, made ready by its admin."""
    storage = target.storage()
    if not isinstance(storage, Folder):
        pytest.skip("the cluster is one of the user's own already: every other test goes this way")
    copy = Path(shutil.copy(target.kube.kubeconfig, tmp_path / "kubeconfig"))
    made: list[tuple[str, str]] = []

    def make(name: str, mode: str, default: bool) -> Target:
        kube = Kube(copy, f"own-{name}")
        kube.apply(storage_class(name, default))
        made.extend([("namespace", kube.namespace), ("storageclass", name)])
        for claim in CLAIMS:
            folder = storage.at(claim).parent / f"{kube.namespace}-{claim}"
            folder.mkdir(exist_ok=True)
            folder.chmod(0o777)
            made.append(("persistentvolume", folder.name))
            kube.apply(volume(folder.name, name, mode, folder))
        if not default:
            monkeypatch.setenv(CLASS, name)
        return Target(kube, "existing")

    yield make
    for kind, name in made:
        target.kube.delete(kind, name)
    for claim in CLAIMS:
        for folder in storage.at(claim).parent.glob(f"own-*-{claim}"):
            shutil.rmtree(folder)


def train(here: Target, job: Document, folder: Path, baseline: dict[int, float]) -> set[str]:
    """A job from corpus to verified checkpoint; returns the nodes that its pods ran on."""
    prepare(here.storage(), "corpus/debian")
    job["spec"]["recipe"]["until"] = {"steps": STEPS}
    jobs = Jobs(here, folder)
    run = jobs.run(job, "own")
    run.wait_for("success", lambda: run.status().get("phase") == "Succeeded", 240)
    losses = run.curve().newest()
    assert list(losses) == list(range(1, STEPS + 1))
    assert max(abs(losses[step] - baseline[step]) for step in losses) <= EXACT
    kubectl, *words = shlex.split(run.storage.verify(run.place))
    assert kubectl == "kubectl"
    here.kube.out(*words)
    nodes = {pod["spec"]["nodeName"] for pod in here.kube.items("pods", f"trireme.dev/job={run.name}")}
    jobs.remove()
    return nodes


def claims_of(here: Target) -> dict[str, tuple[str, list[str]]]:
    found = here.kube.items("persistentvolumeclaims")
    return {c["metadata"]["name"]: (c["spec"]["storageClassName"], c["spec"]["accessModes"]) for c in found}


def test_a_default_class_with_shared_volumes(
    own: Callable[[str, str, bool], Target], job: Document, baseline: dict[int, float], tmp_path: Path
) -> None:
    here = own("shared", MANY, True)
    train(here, job, tmp_path, baseline)
    assert claims_of(here) == {name: ("shared", [MANY]) for name in CLAIMS}
    storage = here.storage()
    assert isinstance(storage, InPod)
    assert not storage.node_selector


def test_volumes_of_one_node_keep_the_gang_on_it(
    own: Callable[[str, str, bool], Target],
    job: Document,
    baseline: dict[int, float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = own("single", ONCE, False)
    nodes = train(here, job, tmp_path, baseline)
    assert claims_of(here) == {name: ("single", [ONCE]) for name in CLAIMS}
    helper = here.kube.get("pod", POD)
    assert helper is not None
    assert nodes == {helper["spec"]["nodeName"]}
    assert MANY in capsys.readouterr().out, "nobody was told why it is one node, and what would be needed for more"

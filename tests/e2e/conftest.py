"""The real cluster, once per session: brought up, images built and imported, operator installed, a corpus prepared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from e2e_support import EVERY, STEPS, Document, Jobs, operator_restarts

from demo import target as cluster
from demo.kube import ROOT, Kube
from demo.target import Target
from demo.training import prepare

NAMESPACE = "e2e"


@pytest.fixture(scope="session")
def target() -> Target:
    here = cluster.up()
    cluster.install(here, *cluster.images(here))
    return Target(here.kube.within(NAMESPACE), here.kind)


@pytest.fixture(scope="session")
def kube(target: Target) -> Kube:
    return target.kube


@pytest.fixture(scope="session")
def manifest(target: Target) -> Document:
    """manifest.json of the prepared corpus, which jobs see as pvc://corpus/debian."""
    return prepare(target.storage(), "corpus/debian")


@pytest.fixture
def job(manifest: Document) -> Document:
    """The demo's own sample, shortened; tests change a copy."""
    found: Document = yaml.safe_load((ROOT / "manifests" / "samples" / "opt-8m-cpu.yaml").read_text())
    found["spec"]["recipe"]["until"] = {"steps": STEPS}
    found["spec"]["recipe"]["schedule"] = {"warmupTokens": 10240, "decay": "constant"}
    found["spec"]["checkpoint"]["everySteps"] = EVERY
    return found


@pytest.fixture
def jobs(target: Target, tmp_path: Path) -> Iterator[Jobs]:
    found = Jobs(target, tmp_path)
    yield found
    found.remove()


@pytest.fixture(scope="session")
def baseline(target: Target, manifest: Document, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Step → loss of a run that nothing disturbed: what every other run must reproduce."""
    found: Document = yaml.safe_load((ROOT / "manifests" / "samples" / "opt-8m-cpu.yaml").read_text())
    found["spec"]["recipe"]["until"] = {"steps": STEPS}
    found["spec"]["recipe"]["schedule"] = {"warmupTokens": 10240, "decay": "constant"}
    jobs = Jobs(target, tmp_path_factory.mktemp("baseline"))
    run = jobs.run(found, "undisturbed")
    try:
        run.wait_for("success", lambda: run.status().get("phase") == "Succeeded", 300)
        curve = run.curve()
        assert curve.attempts() == [1]
        assert list(curve.newest()) == list(range(1, STEPS + 1))
        return curve.newest()
    finally:
        jobs.remove()


@pytest.fixture
def unharmed(target: Target) -> Iterator[None]:
    """The operator's pod is the same afterwards and has not restarted."""
    before = operator_restarts(target)
    yield
    assert operator_restarts(target) == before

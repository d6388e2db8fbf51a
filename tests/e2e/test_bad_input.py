"""What a user may get wrong: each is answered by a line that names the field and the remedy, and harms nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_support import Jobs

from demo.kube import Kube, conditions, events_of, wait_until
from demo.report import DemoError
from demo.target import Target
from demo.training import Run

pytestmark = pytest.mark.usefixtures("unharmed")
Document = dict[str, Any]


def settled(run: Run, timeout: float, *texts: str) -> dict[str, Any]:
    """The job once its explanation holds all of the texts."""

    def look() -> Document | None:
        found = run.job()
        said = (found.get("status") or {}).get("explanation", "")
        return found if all(text in said for text in texts) else None

    return dict(wait_until(f"{run.name} explains {texts}", look, timeout, why=run.why))


def pods(run: Run) -> list[Document]:
    return run.kube.items("pods", f"trireme.dev/job={run.name}")


def test_unknown_preset(job: Document, jobs: Jobs) -> None:
    job["spec"]["recipe"]["model"]["preset"] = "opt-9m"
    run = jobs.run(job, "unknown-preset")
    found = settled(run, 30, "spec.recipe.model.preset", "opt-9m", "opt-8m")
    assert found["status"]["phase"] == "Invalid"
    assert conditions(found)["Invalid"]["status"] == "True"
    assert "spec.recipe.model.preset" in conditions(found)["Invalid"]["message"]
    assert not pods(run)
    wait_until("an event", lambda: "InvalidSpec" in [event["reason"] for event in events_of(run.kube, found)], 30)


def test_a_corrected_job_starts(job: Document, jobs: Jobs, kube: Kube) -> None:
    preset = job["spec"]["recipe"]["model"]["preset"]
    job["spec"]["recipe"]["model"]["preset"] = "opt-9m"
    run = jobs.run(job, "corrected")
    settled(run, 30, "spec.recipe.model.preset")
    kube.out(
        "patch", "trainingjob", run.name, "--type=merge",
        "-p", f'{{"spec": {{"recipe": {{"model": {{"preset": "{preset}"}}}}}}}}',
    )  # fmt: skip
    # Not `run.wait_for`: that gives up on a job that is still Invalid, which this one is for a moment.
    wait_until("start", lambda: run.status().get("phase") in ("Starting", "Running"), 60, why=run.why)


def test_a_misspelt_field_is_refused(job: Document, jobs: Jobs) -> None:
    job["spec"]["recipe"]["optimizer"] = {"learningRat": 0.001}
    with pytest.raises(DemoError, match="learningRat"):
        jobs.run(job, "misspelt")


def test_a_field_that_the_server_dropped_is_named(job: Document, jobs: Jobs) -> None:
    job["spec"]["recipe"]["optimizer"] = {"learningRat": 0.001}
    run = jobs.run(job, "dropped", "--validate=false")
    found = settled(run, 30, "learningRat", "learningRate")
    assert found["status"]["phase"] == "Invalid"
    assert not pods(run)


def test_negative_replicas_are_refused_by_the_server(job: Document, jobs: Jobs) -> None:
    job["spec"]["replicas"] = {"desired": -1}
    with pytest.raises(DemoError, match=r"spec\.replicas\.desired"):
        jobs.run(job, "negative")


def test_missing_claim(job: Document, jobs: Jobs) -> None:
    job["spec"]["recipe"]["data"]["sources"] = [{"path": "pvc://nowhere/debian"}]
    run = jobs.run(job, "missing-claim")
    found = settled(run, 30, "spec.recipe.data.sources[0].path", "'nowhere'", "create it")
    assert found["status"]["phase"] == "Pending"
    assert conditions(found)["Admitted"]["reason"] == "ClaimNotFound"
    assert not pods(run)


def test_an_image_that_does_not_exist(job: Document, jobs: Jobs) -> None:
    job["spec"]["template"]["image"] = "localhost/trireme/no-such-image:1"
    job["spec"]["template"]["imagePullPolicy"] = "Never"
    run = jobs.run(job, "no-image")
    found = settled(run, 60, "spec.template.image")
    assert found["status"]["phase"] != "Running"
    assert "no-such-image" in found["status"]["explanation"]


def test_a_gang_larger_than_the_cluster(job: Document, jobs: Jobs) -> None:
    job["spec"]["replicas"] = {"desired": 500}
    run = jobs.run(job, "too-large")
    found = settled(run, 30, "500")
    assert found["status"]["phase"] == "Pending"
    assert conditions(found)["Admitted"]["status"] == "False"
    assert conditions(found)["Admitted"]["reason"] == "LargerThanCluster"
    assert not pods(run)


@pytest.fixture
def garbage(target: Target, manifest: Document, tmp_path: Path) -> Iterator[str]:
    """A folder of the corpus claim that `trireme prepare` never finished."""
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "manifest.json").write_bytes(b"\x00\xffnot json")
    target.storage().put(tmp_path / "garbage", "corpus/garbage")
    yield "pvc://corpus/garbage"
    target.storage().remove("corpus/garbage")


def test_an_unreadable_corpus(job: Document, jobs: Jobs, garbage: str) -> None:
    job["spec"]["recipe"]["data"]["sources"] = [{"path": garbage}]
    run = jobs.run(job, "unreadable")
    found = settled(run, 180, "corpus/garbage")
    assert found["status"]["phase"] == "Failed"
    failed = found["status"]["lastFailure"]
    assert failed["cause"] == "data"
    assert "manifest.json" in failed["message"]
    assert found["status"]["restartCount"] == 0, "trying again cannot mend the data"
    wait_until("pods end", lambda: not [pod for pod in pods(run) if pod["status"]["phase"] == "Running"], 60)

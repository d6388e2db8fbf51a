"""Every paper's CPU-sized sample trains on the real cluster, as a user would apply it: only shorter."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from e2e_support import Document, Jobs

from demo.kube import ROOT

SAMPLES = sorted((ROOT / "manifests" / "samples").glob("*-tiny-cpu.yaml"))
STEPS, EVERY = 24, 12


def test_every_paper_has_its_twin() -> None:
    """Beside opt-8m-cpu, which all other end-to-end tests run."""
    names = {path.name.removesuffix("-tiny-cpu.yaml") for path in SAMPLES}
    assert {"gpt", "moe", "normformer", "xglm", "xlmr", "growing"} <= names


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name.removesuffix("-tiny-cpu.yaml"))
def test_it_trains_and_is_kept(path: Path, jobs: Jobs, manifest: Document) -> None:
    job: Document = yaml.safe_load(path.read_text())
    job["spec"]["recipe"]["until"] = {"steps": STEPS}
    job["spec"]["checkpoint"]["everySteps"] = EVERY
    # Nothing breaks here, and a spare process per rank costs the machine more than the whole run.
    job["spec"].setdefault("runPolicy", {})["warmStart"] = False
    run = jobs.run(job, f"sample-{job['metadata']['name']}")
    run.wait_for("success", lambda: run.status().get("phase") == "Succeeded", 240)
    losses = list(run.curve().newest().values())
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < sum(losses[:4]), "the loss did not fall"
    status = run.status()
    assert status["attempt"] == 1
    assert status["lastCheckpoint"]["step"] == STEPS

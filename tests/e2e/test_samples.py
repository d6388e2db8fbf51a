"""Every paper's CPU-sized sample trains on the real cluster, as a user would apply it: only shorter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from e2e_support import Document, Jobs

from demo.kube import ROOT, Kube
from demo.target import Target
from demo.training import Run, prepare

FOLDER = ROOT / "manifests" / "samples"
STREAM = "growing-stream-tiny-cpu.yaml"
SAMPLES = sorted(path for path in FOLDER.glob("*-tiny-cpu.yaml") if path.name != STREAM)
STEPS, EVERY = 24, 12


def sample(jobs: Jobs, path: Path, **recipe: object) -> Run:
    job: Document = yaml.safe_load(path.read_text())
    job["spec"]["recipe"].update({"until": {"steps": STEPS}, **recipe})
    job["spec"]["checkpoint"]["everySteps"] = EVERY
    # Nothing breaks here, and a spare process per rank costs the machine more than the whole run.
    job["spec"].setdefault("runPolicy", {})["warmStart"] = False
    return jobs.run(job, f"sample-{job['metadata']['name']}")


def phase(run: Run, wanted: str) -> bool:
    return bool(run.status().get("phase") == wanted)


def test_every_paper_has_its_twin() -> None:
    """Beside opt-8m-cpu, which all other end-to-end tests run."""
    names = {path.name.removesuffix("-tiny-cpu.yaml") for path in SAMPLES}
    assert {"gpt", "moe", "normformer", "xglm", "xlmr", "growing", "smlp", "tam"} <= names
    assert (FOLDER / STREAM).exists()


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name.removesuffix("-tiny-cpu.yaml"))
def test_it_trains_and_is_kept(path: Path, jobs: Jobs, manifest: Document) -> None:
    run = sample(jobs, path)
    run.wait_for("success", lambda: phase(run, "Succeeded"), 240)
    losses = list(run.curve().newest().values())
    assert len(losses) == STEPS
    assert sum(losses[-4:]) < sum(losses[:4]), "the loss did not fall"
    status = run.status()
    assert status["attempt"] == 1
    assert status["lastCheckpoint"]["step"] == STEPS


@pytest.mark.parametrize("preset", ["growing-tiny", "growing-ensemble-tiny"])
def test_a_stream_waits_for_data_without_nodes_and_its_model_grows(
    jobs: Jobs, kube: Kube, target: Target, preset: str
) -> None:
    for number in (1, 2):
        prepare(target.storage(), f"corpus/mega-batch-{number}")
    model = {**yaml.safe_load((FOLDER / STREAM).read_text())["spec"]["recipe"]["model"], "preset": preset}
    anytime = {"megaBatches": 2, "arrived": 1, "replay": 0.25, "growEvery": 1}
    run = sample(jobs, FOLDER / STREAM, model=model, anytime=anytime)
    run.wait_for("waiting for mega-batch 2", lambda: phase(run, "Waiting"), 240)
    run.wait_for("its pods to be gone", lambda: not kube.items("pods", f"trireme.dev/job={run.name}"), 60)
    assert list(run.curve().newest()) == list(range(1, STEPS // 2 + 1))
    assert '"arrived":2' in run.status()["explanation"].replace(" ", ""), "it does not say how it is told of the data"

    kube.out("patch", "trainingjob", run.name, "--type", "merge", "-p", '{"spec":{"recipe":{"anytime":{"arrived":2}}}}')
    run.wait_for("success", lambda: phase(run, "Succeeded"), 240)
    assert list(run.curve().newest()) == list(range(1, STEPS + 1))
    assert run.status()["restartCount"] == 0
    rows = [json.loads(line) for line in run.storage.text(f"{run.place}/metrics.jsonl").splitlines()]
    ended = [row for row in rows if row.get("event") == "session-ended"]
    assert len(ended) == 2
    assert ended[1]["parameters"] > ended[0]["parameters"], "the model did not grow"

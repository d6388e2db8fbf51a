"""What `trireme explain`, `top` and `note` say of a job, without a cluster: statuses are the operator's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from operator_cases import NOW, Scene, failure, heard, manifest
from trireme_api.decisions import MAX_DECISIONS, MAX_MESSAGE, DecisionRecord, noted
from trireme_api.job import Phase, TrainingJobStatus
from trireme_api.protocol import AgentState, Cause, CheckpointRef, Progress, RankReport
from trireme_cli import notes, top
from trireme_cli.explain import text
from trireme_cli.explanation import JobView, explain, next_steps, to_json
from trireme_cli.main import cli
from trireme_operator.decide.views import Verdict


def told(scene: Scene) -> str:
    return "\n".join(text(section) for section in explain(JobView.of(scene.obj), scene.now))


def lines(scene: Scene, title: str) -> str:
    section = next((s for s in explain(JobView.of(scene.obj), scene.now) if s.title == title), None)
    return text(section) if section is not None else ""


def test_a_job_that_waits_says_for_what_and_that_nothing_is_made_before() -> None:
    scene = Scene()
    scene.admission = Verdict(False, "WaitsForRoom", "needs room for 2 pods of cpu 1 at once; 1 would fit now")
    scene.settle()
    found = told(scene)
    assert "Pending (WaitsForRoom)" in found
    assert "1 would fit now" in found
    assert "nothing is created before" in found


def running(**spec: Any) -> Scene:
    scene = Scene(**spec).run()
    progress = Progress(step=70, total_steps=100, tokens=7000, loss=2.5, tokens_per_second=100.0)
    for uid in list(scene.heard):
        scene.heard[uid] = heard(
            uid, 1, AgentState.RUNNING, scene.now, ranks=[RankReport(0)], progress=progress,
            checkpoint=CheckpointRef(step=60, path="/c/step-60"),
        )  # fmt: skip
    scene.settle()
    return scene


def test_a_running_job_says_when_it_ends_and_what_a_failure_would_cost() -> None:
    found = told(running())
    assert "step 70 of 100 (70.0%), loss 2.5, 100 tokens/s" in found
    assert "in about 30s" in found
    assert "RestartProcess follows; 10 steps since the checkpoint of step 60 would be done again" in found


def test_a_failure_is_told_with_cause_rank_node_rule_and_what_is_left() -> None:
    scene = running()
    uid = "pod-1-1"
    broke = failure(Cause.NETWORK, message="peer closed", rank=1, exit=1)
    scene.heard[uid] = heard(uid, 1, AgentState.EXITED, scene.now, failure=broke)
    scene.settle()
    assert scene.status.phase == Phase.RECOVERING
    found = told(scene)
    for part in ("network: peer closed", "rank 1, job-1-1, n1", "agent-report, exit code 1", "attempt 2"):
        assert part in found, found
    left = lines(scene, "budgets left")
    assert "network" in left
    assert "RestartProcess 2, ReplacePod 5, RestartGang 3 within 6h00m" in left
    assert "every other cause  RestartProcess 3" in left
    assert "all ranks start from step 60; if they do not within" in lines(scene, "next")
    assert "RestartProcess: rank 1 of job-1-1: network: peer closed" in lines(scene, "decisions")


def test_the_end_says_what_can_be_done() -> None:
    scene = running(runPolicy={"ttl": {"failedSeconds": 3600}})
    uid = "pod-0-1"
    scene.heard[uid] = heard(uid, 1, AgentState.EXITED, failure=failure(Cause.USER_ERROR, message="NameError: x"))
    scene.settle()
    assert scene.status.phase == Phase.FAILED
    said = lines(scene, "next")
    assert "mend what the message names" in said
    assert "deleted 1h00m after" in said
    assert "should a rank fail" not in told(scene)


def test_an_invalid_job_and_one_nobody_has_seen() -> None:
    scene = Scene(replicas={"desired": 0})
    scene.decide()
    assert "spec.replicas.desired" in told(scene)
    assert "kubectl edit tj job" in told(scene)
    unseen = JobView.of(manifest())
    assert "is it running" in text(explain(unseen, NOW)[0])
    assert next_steps(unseen, NOW) == []


def test_every_phase_has_a_next_step() -> None:
    for phase in Phase:
        job = JobView.of(manifest(status=TrainingJobStatus(phase=phase, attempt=1)))
        assert next_steps(job, NOW), phase
        json.dumps(to_json(job, NOW))


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.SUSPENDED])
def test_a_job_held_for_its_carbon_is_not_told_to_be_resumed(phase: Phase) -> None:
    for reason, says in (("DirtyGrid", "clean enough"), ("CarbonBudgetSpent", "budget in spec.carbonPolicy")):
        job = JobView.of(manifest(status=TrainingJobStatus(phase=phase, reason=reason, attempt=1)))
        found = " ".join(next_steps(job, NOW))
        assert says in found
        assert "runPolicy.suspend" not in found


def test_a_status_of_another_version_is_no_crash() -> None:
    obj = {**manifest(), "status": {"phase": "Dreaming"}}
    assert "cannot be read" in text(explain(JobView.of(obj), NOW)[0])


def test_decisions_are_kept_bounded_and_the_first_stays() -> None:
    log: list[DecisionRecord] = []
    for number in range(100):
        log = noted(log, f"t{number}", "Reason", f"{number} " + "x" * 1000)
    assert len(log) == MAX_DECISIONS
    assert (log[0].at, log[1].at, log[-1].at) == ("t0", f"t{100 - MAX_DECISIONS + 1}", "t99")
    assert all(len(item.message) <= MAX_MESSAGE for item in log)
    again = noted(log, "later", "Reason", "99 " + "x" * 1000)
    assert (len(again), again[-1].count, again[-1].at) == (MAX_DECISIONS, 2, "later")


def test_the_status_keeps_what_the_operator_decided() -> None:
    scene = running()
    assert [item.reason for item in scene.status.decisions] == ["Admitted", "Running"]
    assert scene.status.reason == "AllRanksRun"


def test_top_puts_those_in_trouble_first_and_knows_what_is_not_known() -> None:
    names = [Phase.SUCCEEDED, Phase.RUNNING, Phase.FAILED, Phase.RECOVERING, Phase.PENDING]
    jobs = [JobView.of(manifest(name=p.lower(), status=TrainingJobStatus(phase=p))) for p in names]
    ordered = [job.name for job in sorted(jobs, key=top.urgency)]
    assert ordered == ["recovering", "failed", "running", "pending", "succeeded"]
    cells = dict(zip(top.HEAD, top.row(JobView.of(running().obj), True, NOW), strict=True))
    assert (cells["NAME"], cells["STEP"], cells["LOSS"], cells["ETA"]) == ("ns/job", "70/100", "2.5", "30s")
    assert cells["MFU"] == ""


def test_notes_survive_the_way_through_annotations() -> None:
    later, first = notes.Note(NOW + 1.5, "b", "zweite — Notiz"), notes.Note(NOW, "a", "first")
    stored = dict(notes.annotation(note) for note in (later, first, first))
    assert len(stored) == 3, "two notes of one moment stay two"
    for key in stored:
        prefix, _, name = key.partition("/")
        assert prefix == "note.trireme.dev"
        assert len(name) <= 63
    assert notes.read({**stored, "other/x": "y"}) == [first, first, later]
    assert notes.read({"note.trireme.dev/by-hand": "just text"})[0].text == "just text"


def test_notes_of_a_local_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["note", "--local", str(tmp_path), "started on battery", "--by", "me"])
    assert done.exit_code == 0, done.output
    assert [(n.by, n.text) for n in notes.read_local(tmp_path)] == [("me", "started on battery")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["note", "job"], "give the job's name and the text"),
        (["note", "--local", "nowhere", "text"], "no such directory"),
        (["note", "job", "x" * 1001], "at most 1000"),
        (["explain", "job", "--kubeconfig", "/no/such/file"], "no way to a cluster"),
        (["top", "--interval", "0.1"], "1.0"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code != 0
    assert says in done.output

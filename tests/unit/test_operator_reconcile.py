"""reconcile, phase by phase: what is written, what is done, and in which order."""

from __future__ import annotations

import pytest
from operator_cases import NOW, Scene, ended, failure, heard, manifest, pod
from trireme_api.job import ConditionType, Phase
from trireme_api.protocol import AgentState, Cause, CheckpointRef, Progress, RankReport
from trireme_operator.decide.actions import CreatePod, DeleteJob, DeletePod
from trireme_operator.decide.conditions import condition
from trireme_operator.decide.reconcile import reconcile
from trireme_operator.decide.views import Node, Observed, Verdict, job_of


def test_admission_is_written_before_any_pod_is_made() -> None:
    scene = Scene()
    first = scene.decide()
    assert (first.status is not None, first.actions, first.requeue_after) == (True, (), 0.0)
    assert scene.status.phase == Phase.STARTING
    assert [(s.index, s.incarnation) for s in scene.status.slots] == [(0, 1), (1, 1)]
    second = scene.decide()
    assert second.status is None
    assert [type(a) for a in second.actions] == [CreatePod, CreatePod]


def test_a_restart_is_written_before_any_pod_is_touched() -> None:
    scene = Scene().run()
    del scene.pods["pod-0-1"]
    first = scene.decide()
    assert (scene.status.attempt, scene.status.phase, first.actions) == (2, Phase.RECOVERING, ())
    second = scene.decide()
    assert [a.slot.incarnation for a in second.actions if isinstance(a, CreatePod)] == [2]


def test_the_same_call_twice_gives_the_same_decision() -> None:
    scene = Scene().run()
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, failure=failure(Cause.OOM))
    first, second = (reconcile(scene.job, scene.seen(), scene.now) for _ in range(2))
    assert first == second


def test_nothing_happens_when_nothing_happens() -> None:
    scene = Scene().run()
    for _ in range(5):
        scene.now += 60
        assert scene.decide() == scene.decide()
        assert scene.decide().status is None
        assert scene.decide().actions == ()


def test_a_job_that_waits_says_what_for() -> None:
    scene = Scene()
    scene.admission = Verdict(False, "WaitsForRoom", "needs room")
    scene.settle()
    assert scene.status.phase == Phase.PENDING
    found = condition(scene.status, ConditionType.ADMITTED)
    assert found is not None
    assert (found.status, found.reason, found.message) == ("False", "WaitsForRoom", "needs room")
    assert scene.notes.count("WaitsForRoom") == 1
    scene.admission = Verdict(True)
    scene.settle()
    assert scene.status.phase == Phase.STARTING


def test_a_missing_claim_holds_the_job_back() -> None:
    scene = Scene()
    scene.claims = ("spec.checkpoint.uri: there is no PersistentVolumeClaim 'x' in namespace ns; create it",)
    decision = scene.settle()[-1]
    assert scene.status.phase == Phase.PENDING
    assert "create it" in scene.status.explanation
    assert decision.requeue_after == pytest.approx(10)


def test_an_invalid_spec_makes_nothing_and_is_told_once() -> None:
    obj = manifest(replicas=0)
    decision = reconcile(job_of(obj), Observed(), NOW)
    assert decision.status is not None
    assert decision.status.phase == Phase.INVALID
    assert "spec.replicas.desired" in decision.status.explanation
    assert decision.actions == ()
    again = reconcile(
        job_of({**obj, "status": decision.status.model_dump(mode="json", by_alias=True)}), Observed(), NOW + 9
    )
    assert again.status is None


def test_an_invalid_edit_does_not_stop_a_running_gang() -> None:
    scene = Scene().run()
    scene.edit(replicas={"desired": -3})
    scene.settle()
    assert scene.status.phase == Phase.RUNNING
    found = condition(scene.status, ConditionType.INVALID)
    assert found is not None
    assert found.status == "True"
    assert "spec.replicas.desired" in found.message
    assert scene.status.observed_generation == 2


@pytest.mark.parametrize("edit", [{"procsPerNode": 3}, {"template": {"image": "other", "command": ["c"]}}])
def test_what_pods_are_made_of_is_fixed_while_admitted(edit: dict[str, object]) -> None:
    scene = Scene().run()
    scene.edit(**edit)
    decisions = scene.settle()
    assert not any(d.actions for d in decisions)
    found = condition(scene.status, ConditionType.EDIT_IGNORED)
    assert found is not None
    assert (found.status, next(iter(edit)) in found.message) == ("True", True)
    # A replacement is made from the old spec, too.
    del scene.pods["pod-0-1"]
    scene.settle()
    assert len(scene.status.slots) == 2


def test_policies_are_read_live() -> None:
    scene = Scene().run()
    scene.edit(runPolicy={"activeDeadlineSeconds": 5})
    scene.settle()
    assert scene.status.phase == Phase.FAILED
    assert "activeDeadlineSeconds" in scene.status.explanation


def test_success_needs_every_pod() -> None:
    scene = Scene().run()
    scene.change_pod("pod-0-1", phase="Succeeded", ended=ended(0))
    scene.settle()
    assert scene.status.phase == Phase.RUNNING
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, scene.now, ranks=[RankReport(0, exit=0)])
    scene.settle()
    assert scene.status.phase == Phase.SUCCEEDED
    assert scene.status.completion_time


def test_the_end_is_the_end() -> None:
    scene = Scene().run()
    scene.hear_all(AgentState.EXITED, ranks=[RankReport(0, exit=0)])
    scene.settle()
    before = scene.status
    scene.pods.clear()
    scene.edit(replicas={"desired": 5}, runPolicy={"suspend": True})
    scene.hear_all(AgentState.EXITED, failure=failure())
    scene.now += 1e6
    assert not any(d.actions for d in scene.settle())
    assert scene.status == before


@pytest.mark.parametrize(
    ("policy", "deleted"), [("All", {"pod-0-1", "pod-1-1"}), ("Running", {"pod-1-1"}), ("None", set())]
)
def test_pods_after_a_failure_follow_the_policy(policy: str, deleted: set[str]) -> None:
    scene = Scene(runPolicy={"cleanPodPolicy": policy}).run()
    scene.change_pod("pod-0-1", phase="Failed", ended=ended(64))
    actions = scene.settle()[-1].actions
    assert scene.status.phase == Phase.FAILED
    assert {a.uid for a in actions if isinstance(a, DeletePod)} == deleted


def test_pods_of_a_job_that_ended_well_may_end_by_themselves() -> None:
    scene = Scene().run()
    scene.hear_all(AgentState.EXITED, ranks=[RankReport(0, exit=0)])
    decision = scene.settle()[-1]
    assert (scene.status.phase, decision.actions) == (Phase.SUCCEEDED, ())
    scene.heard.clear()  # an operator that has just started
    assert scene.decide().actions == ()
    scene.change_pod("pod-0-1", phase="Succeeded")
    scene.now += 31
    assert [a.uid for a in scene.decide().actions if isinstance(a, DeletePod)] == ["pod-1-1"]


def test_ttl() -> None:
    scene = Scene(runPolicy={"ttl": {"succeededSeconds": 100}}).run()
    scene.hear_all(AgentState.EXITED, ranks=[RankReport(0, exit=0)])
    scene.settle()
    for uid in scene.pods:
        scene.change_pod(uid, phase="Succeeded")
    decision = scene.decide()
    assert decision.requeue_after is not None
    assert 90 < decision.requeue_after <= 100
    scene.now += 101
    assert DeleteJob() in scene.decide().actions


def test_suspend_saves_stops_and_only_then_gives_the_nodes_back() -> None:
    scene = Scene().run()
    scene.edit(runPolicy={"suspend": True})
    assert scene.decide().actions == ()
    assert scene.status.phase == Phase.SUSPENDING
    assert not scene.decide().actions
    scene.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.EXITED, scene.now, ranks=[RankReport(0, exit=75)])
    scene.settle()
    assert scene.status.phase == Phase.SUSPENDING, "the other pod has not saved yet"
    scene.heard["pod-1-1"] = heard(
        "pod-1-1", 1, AgentState.EXITED, scene.now, ranks=[RankReport(0, exit=75)], checkpoint=CheckpointRef(7, "p")
    )
    assert scene.decide().actions == ()
    assert scene.status.phase == Phase.SUSPENDED
    assert "step 7" in scene.status.explanation
    assert len(scene.decide().actions) == 2
    scene.pods.clear()
    scene.now += 1000
    scene.edit(runPolicy={"suspend": False})
    scene.settle()
    assert (scene.status.phase, scene.status.attempt) == (Phase.STARTING, 2)
    assert scene.status.resume_from is not None
    assert scene.status.resume_from.step == 7
    assert 990 < scene.status.suspended_seconds < 1010
    assert [s.incarnation for s in scene.status.slots] == [2, 2]


def test_an_operator_that_starts_while_a_gang_suspends_waits_for_what_it_has_not_heard() -> None:
    scene = Scene().run()
    scene.edit(runPolicy={"suspend": True})
    scene.settle()
    scene.heard.clear()
    scene.settle()
    assert scene.status.phase == Phase.SUSPENDING, "ranks may still be saving"
    scene.hear_all(AgentState.EXITED, ranks=[RankReport(0, exit=75)], checkpoint=CheckpointRef(79, "p"))
    scene.settle()
    assert scene.status.phase == Phase.SUSPENDED
    assert "step 79" in scene.status.explanation


def test_pods_that_have_not_begun_do_not_hold_up_a_suspension() -> None:
    scene = Scene()
    scene.settle()
    scene.create_all()
    for uid in list(scene.pods):
        scene.change_pod(uid, phase="Pending")
    scene.edit(runPolicy={"suspend": True})
    scene.settle()
    assert scene.status.phase == Phase.SUSPENDED


def test_a_gang_that_does_not_stop_is_deleted_after_its_grace() -> None:
    scene = Scene().run()
    scene.edit(runPolicy={"suspend": True})
    scene.settle()
    scene.now += 60 + 31
    scene.settle()
    assert scene.status.phase == Phase.SUSPENDED
    assert "did not stop in time" in scene.status.explanation


def test_a_job_may_be_suspended_from_the_start() -> None:
    scene = Scene(runPolicy={"suspend": True})
    assert not any(d.actions for d in scene.settle())
    assert scene.status.phase == Phase.SUSPENDED
    assert scene.status.attempt == 0


def test_a_deadline_does_not_count_suspended_time() -> None:
    scene = Scene(runPolicy={"activeDeadlineSeconds": 100}).run()
    scene.edit(runPolicy={"suspend": True, "activeDeadlineSeconds": 100})
    scene.settle()
    scene.hear_all(AgentState.EXITED, ranks=[RankReport(0, exit=75)])
    scene.settle()
    scene.pods.clear()
    scene.now += 10_000
    scene.edit(runPolicy={"activeDeadlineSeconds": 100})
    scene.settle()
    assert scene.status.phase == Phase.STARTING
    scene.now += 200
    scene.settle()
    assert scene.status.phase == Phase.FAILED


def test_a_startup_deadline_says_what_was_awaited() -> None:
    scene = Scene(runPolicy={"startupDeadlineSeconds": 30})
    scene.settle()
    scene.create_all()
    scene.change_pod("pod-0-1", phase="Pending", waiting="ImagePullBackOff", waiting_message="no such image")
    scene.settle()
    found = condition(scene.status, ConditionType.INITIALIZED)
    assert found is not None
    assert found.reason == "ImagePullBackOff"
    assert "spec.template.image" in found.message
    scene.now += 31
    scene.settle()
    assert scene.status.phase == Phase.FAILED
    assert "no such image" in scene.status.explanation


def test_half_a_gang_gives_its_nodes_back() -> None:
    scene = Scene()
    scene.settle()
    scene.create_all()
    scene.change_pod("pod-1-1", node="", phase="Pending", unschedulable="0/3 nodes are available")
    scene.settle()
    assert scene.status.phase == Phase.STARTING
    scene.now += scene.limits.gang_seconds + 1
    decisions = scene.settle()
    assert scene.status.phase == Phase.PENDING
    assert "0/3 nodes are available" in scene.status.explanation
    assert {a.uid for d in decisions for a in d.actions if isinstance(a, DeletePod)} == {"pod-0-1", "pod-1-1"}
    scene.pods.clear()
    assert scene.status.queueing.requeues == 1
    scene.now += 31
    scene.settle()
    assert (scene.status.phase, scene.status.attempt) == (Phase.STARTING, 2)


def test_running_waits_for_all_ranks_and_survives_an_operator_that_has_heard_nothing() -> None:
    scene = Scene()
    scene.settle()
    scene.create_all()
    scene.settle()
    scene.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.RUNNING)
    scene.settle()
    assert (scene.status.phase, scene.status.node_summary) == (Phase.STARTING, "1/2")
    scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.RUNNING)
    scene.settle()
    assert (scene.status.phase, scene.status.node_summary) == (Phase.RUNNING, "2/2")
    scene.heard.clear()
    assert scene.settle()[0].status is None
    assert (scene.status.phase, scene.status.node_summary) == (Phase.RUNNING, "2/2")


def test_a_dead_kubelet_alone_costs_nothing() -> None:
    scene = Scene().run()
    scene.nodes = {"n0": Node("n0", False, not_ready_since=scene.now), "n1": Node("n1", True)}
    for _ in range(10):
        scene.now += 10
        scene.hear_all(AgentState.RUNNING)
        scene.settle()
    assert scene.status.attempt == 1
    scene.now += 16
    scene.settle()
    assert (scene.status.attempt, scene.status.last_failure and scene.status.last_failure.rule) == (2, "node-lost")


def test_a_stale_view_never_deletes_what_is_newer() -> None:
    scene = Scene().run()
    scene.pods["pod-0-9"] = pod("job", 0, 9)
    assert scene.decide().actions == ()


def test_figures_are_written_seldom_and_news_soon() -> None:
    scene = Scene().run()
    scene.settle()
    scene.now += scene.limits.progress_seconds
    scene.hear_all(AgentState.RUNNING, progress=Progress(1))
    assert scene.decide().status is not None
    scene.now += 1
    scene.hear_all(AgentState.RUNNING, progress=Progress(2))
    decision = scene.decide()
    assert decision.status is None
    assert decision.requeue_after == pytest.approx(scene.limits.progress_seconds - 1)


def test_a_deleted_job_is_left_to_its_deletion() -> None:
    scene = Scene().run()
    scene.obj["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    scene.pods.clear()
    assert scene.decide() == reconcile(scene.job, Observed(), scene.now)
    assert scene.decide().actions == ()


def test_a_garbled_status_is_no_reason_to_stop() -> None:
    obj = {**manifest(), "status": {"phase": "Dancing", "slots": "none"}}
    decision = reconcile(job_of(obj), Observed(admission=Verdict(True)), NOW)
    assert decision.status is not None
    assert decision.status.phase == Phase.STARTING

"""Dead, sick and leaving nodes: when a silent one is lost, which ones a job avoids, how it leaves a cordoned one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from operator_cases import SCRIPT, Scene, ended, failure, heard
from trireme_api.job import Phase, Slot
from trireme_api.protocol import AgentState, Cause, RankReport
from trireme_operator.decide.actions import CreatePod, DeletePod
from trireme_operator.decide.admission import Waiting, demand_of, verdicts
from trireme_operator.decide.gang import Place
from trireme_operator.decide.nodes import asked_to_leave
from trireme_operator.decide.pods import Images, pod_manifest
from trireme_operator.decide.views import Node, Verdict
from trireme_operator.observe.leases import Leases, Renewal, renewal_of
from trireme_operator.observe.store import Store

IMAGES = Images("trainer:1", "agent:1", "https://c", "PEM")


def node(name: str, ready: bool = True, **fields: Any) -> Node:
    return Node(name, ready, allocatable={"cpu": 4.0, "pods": 10.0}, **fields)


def scene(nodes: int = 3, **spec: Any) -> Scene:
    found = Scene(**spec)
    found.nodes = {f"n{i}": node(f"n{i}") for i in range(nodes)}
    return found.run()


# --- leases -----------------------------------------------------------------------------------------------------------


def sampled(leases: Leases, at: float, **renewed: str) -> set[str]:
    return leases.sample([Renewal(name, text, 10.0) for name, text in renewed.items()], at)


def test_a_kubelet_that_stops_renewing_is_silent_after_one_and_a_half_renewals() -> None:
    leases = Leases()
    for second in range(0, 60, 3):
        beat = str(second // 10)
        stale = sampled(leases, second, a=beat, b=beat, c="0")
        assert stale == ({"c"} if second >= 15 else set()), second


def test_samples_with_a_gap_prove_nothing() -> None:
    """The API server was away: no kubelet could renew."""
    leases = Leases()
    sampled(leases, 0, a="0", b="0", c="0")
    assert sampled(leases, 60, a="0", b="0", c="0") == set()
    assert sampled(leases, 72, a="0", b="7", c="7") == set()
    assert sampled(leases, 81, a="0", b="8", c="8") == {"a"}


def test_most_kubelets_silent_at_once_is_no_loss_of_nodes() -> None:
    leases = Leases()
    for second in range(0, 40, 3):
        assert sampled(leases, second, a="0", b="0", c=str(second)) == set()


def test_kubelets_clocks_do_not_matter() -> None:
    leases = Leases()
    for second in range(0, 60, 3):
        assert sampled(leases, second, a=f"1970-01-01T00:00:{second // 10}", b=f"2099-{second // 10}") == set()


def test_a_lease_as_the_server_gives_it() -> None:
    obj = {"metadata": {"name": "n"}, "spec": {"leaseDurationSeconds": 40, "renewTime": "t"}}
    assert renewal_of(obj) == Renewal("n", "t", 10.0)
    assert renewal_of({"metadata": {"name": "n"}}) == Renewal("n", "", 10.0)


def test_the_store_keeps_what_leases_say_through_node_events() -> None:
    store = Store()
    obj = {"metadata": {"name": "n"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    store.put_node(obj, 1.0)
    assert store.mark_stale({"n"}, 5.0) == {"n"}
    assert store.mark_stale({"n"}, 8.0) == set()
    store.put_node(obj, 9.0)
    assert store.nodes is not None
    assert (store.nodes["n"].suspect, store.nodes["n"].not_ready_since) == (True, 5.0)
    store.begin_listening(20.0)
    assert store.nodes["n"].not_ready_since == 20.0
    assert store.mark_stale(set(), 30.0) == {"n"}
    assert (store.nodes["n"].suspect, store.nodes["n"].not_ready_since) == (False, None)


# --- silence ----------------------------------------------------------------------------------------------------------


def test_a_dead_node_is_acted_on_within_20_s_of_its_death() -> None:
    """Worst of times: the kubelet has just renewed, the agent has just reported."""
    world = scene()
    store, leases = Store(), Leases()
    for name in ("n0", "n1", "n2"):
        ready = {"conditions": [{"type": "Ready", "status": "True"}]}
        store.put_node({"metadata": {"name": name}, "status": ready}, world.now)
    died = world.now
    world.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.RUNNING, died)
    world.heard["pod-1-1"] = type(world.heard["pod-1-1"])(world.heard["pod-1-1"].report, died, died, wait=5.0)
    while world.status.attempt == 1:
        assert world.now - died <= 20, "too late"
        beat = str(int(world.now - died) // 10)
        stale = leases.sample([Renewal(n, "dead" if n == "n1" else beat, 10.0) for n in ("n0", "n1", "n2")], world.now)
        store.mark_stale(stale, world.now)
        assert store.nodes is not None
        world.nodes = {n: node(n, stale=store.nodes[n].stale, not_ready_since=store.nodes[n].not_ready_since)
                       for n in store.nodes}  # fmt: skip
        world.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.RUNNING, world.now)
        world.decide()
        world.now += 3.0
    assert world.status.last_failure is not None
    assert (world.status.last_failure.rule, world.status.last_failure.node) == ("node-lost", "n1")
    assert [s.incarnation for s in world.status.slots] == [1, 2]
    assert [type(a) for a in world.decide().actions] == [DeletePod, CreatePod], "a pod on a lost node is not waited for"


def test_a_pod_just_made_on_a_suspect_node_gets_its_time_to_speak() -> None:
    """A kubelet that is back renews its lease only seconds later; the pod it was just given is no silent one."""
    world = scene(2)
    world.nodes["n1"] = node("n1", stale=True, not_ready_since=world.now - 100)
    pod = next(pod for pod in world.pods.values() if pod.slot == 1)
    place = Place(Slot(index=1, incarnation=1), replace(pod, node="n1", created_at=world.now), None, world.nodes["n1"])
    assert not place.node_lost(world.now + 9.9, 10.0)
    assert place.node_lost(world.now + 10.0, 10.0)


def test_an_agent_that_waits_for_its_answer_is_not_silent() -> None:
    world = scene()
    assert world.nodes is not None
    world.nodes["n1"] = node("n1", False, not_ready_since=world.now - 100)
    known = heard("pod-1-1", 1, AgentState.RUNNING, world.now - 12)
    world.heard["pod-1-1"] = type(known)(known.report, known.at, known.since, wait=5.0)
    world.decide()
    assert world.status.attempt == 1
    world.now += 4
    world.decide()
    assert world.status.attempt == 2


# --- avoiding ---------------------------------------------------------------------------------------------------------


def fail(world: Scene, cause: Cause = Cause.INFRASTRUCTURE, slot: int = 1, **fields: Any) -> None:
    """One more failure of the rank in this slot, then the gang runs again where it was."""
    uid = f"pod-{slot}-{world.status.slots[slot].incarnation}"
    told = failure(cause, rank=slot, exit=1, **fields)
    world.heard[uid] = heard(uid, world.status.attempt, AgentState.EXITED, world.now, failure=told)
    world.settle()
    world.create_all()
    world.hear_all(AgentState.RUNNING)
    world.settle()


def avoided(world: Scene) -> list[str]:
    return [one.name for one in world.status.avoided_nodes]


def test_a_node_that_failed_twice_is_left_and_avoided_until_its_time_is_over() -> None:
    world = scene(nodePolicy={"avoidForSeconds": 1000})
    fail(world)
    assert (avoided(world), [s.incarnation for s in world.status.slots]) == ([], [1, 1]), "once is no pattern"
    fail(world)
    assert (avoided(world), [s.incarnation for s in world.status.slots]) == (["n1"], [1, 3]), "the pod leaves it, too"
    assert world.status.restarts.recent[-1].action == "ReplacePod"
    assert world.job.spec is not None
    made = pod_manifest(world.job, world.job.spec, world.status.slots[1], IMAGES)["spec"]["affinity"]["nodeAffinity"]
    terms = made["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert terms == [{"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["n1"]}]}]
    world.now += 1001
    world.settle()
    assert avoided(world) == []
    assert "affinity" not in pod_manifest(world.job, world.job.spec, world.status.slots[1], IMAGES)["spec"]


@pytest.mark.parametrize(
    ("cause", "fields"),
    [(Cause.UNKNOWN, {}), (Cause.OOM, {}), (Cause.NON_FINITE, {}), (Cause.NETWORK, {"cascade": True})],
)
def test_what_is_not_the_nodes_fault_is_not_held_against_it(cause: Cause, fields: dict[str, Any]) -> None:
    world = scene()
    fail(world, cause, **fields)
    fail(world, cause, **fields)
    assert avoided(world) == []


def test_failures_on_different_nodes_are_no_pattern() -> None:
    world = scene()
    fail(world, slot=0)
    fail(world, slot=1)
    assert avoided(world) == []


def test_a_rule_avoids_at_once_and_never_turns_the_list_off() -> None:
    rules = {"rules": [{"name": "ecc", "onLogPatterns": ["ECC"], "avoidNode": True}]}
    world = scene(failurePolicy=rules, nodePolicy={"avoidAfterFailures": 0})
    fail(world, Cause.UNKNOWN, message="uncorrectable ECC")
    assert avoided(world) == ["n1"]


def test_a_job_never_avoids_more_than_it_can_do_without() -> None:
    world = scene(nodes=2)
    world.nodes = {name: Node(name, True, allocatable={"cpu": 1.0, "pods": 10.0}) for name in ("n0", "n1")}
    fail(world)
    fail(world)
    assert avoided(world) == []
    assert "NodeNotAvoided" in world.notes


def test_a_cluster_that_has_become_too_small_is_forgiven() -> None:
    world = scene()
    fail(world)
    fail(world)
    world.edit(runPolicy={"suspend": True})
    world.settle()
    world.hear_all(AgentState.EXITED, ranks=[RankReport(0, exit=75)])
    world.settle()
    world.pods.clear()
    world.admission = Verdict(False, "LargerThanCluster", "too large")
    world.edit(runPolicy={"suspend": False})
    world.settle()
    assert avoided(world) == []
    assert "NodeForgiven" in world.notes


def test_admission_counts_without_avoided_nodes() -> None:
    job = Scene().job
    assert job.spec is not None
    nodes = [Node(f"n{i}", True, allocatable={"cpu": 1.0, "pods": 10.0}) for i in range(2)]
    for avoid, fits in (((), True), (("n1",), False)):
        waiting = Waiting(job.key, demand_of(job.spec, avoid), 2, 0, 0.0)
        assert verdicts(nodes, [], [waiting])[job.key].fits is fits


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_a_cordoned_node_is_left_with_everything_saved_and_nothing_charged() -> None:
    world = scene()
    assert world.nodes is not None
    world.nodes["n1"] = node("n1", unschedulable=True)
    first = world.decide()
    assert (world.status.draining, first.actions) == (["n1"], ()), "written before it is done"
    assert world.decide().actions == (DeletePod("job-1-1", "pod-1-1", None),), "with its own grace, to save"
    world.change_pod("pod-1-1", deletion_at=world.now + 60)
    assert world.decide().actions == ()
    leaving = {"state": AgentState.EXITED, "ranks": [RankReport(0, exit=75)]}
    world.heard["pod-1-1"] = heard("pod-1-1", 1, at=world.now, **leaving)
    world.settle()
    assert world.status.attempt == 1, "the others are still saving"
    world.heard["pod-0-1"] = heard("pod-0-1", 1, at=world.now, **leaving)
    world.decide()
    status = world.status
    assert (status.attempt, [s.incarnation for s in status.slots]) == (2, [1, 2]), "the other pod stays"
    record = status.restarts.recent[-1]
    assert (record.action, record.cause, record.charged, record.taken) == (
        "ReplacePod", Cause.PREEMPTION, False, True,
    )  # fmt: skip
    assert (status.budgets_left, avoided(world)) == ({}, [])
    world.settle()
    world.pods.pop("pod-1-1")
    assert CreatePod(world.status.slots[1]) in world.settle()[-1].actions
    world.create_all()
    world.change_pod("pod-1-2", node="n2")
    world.hear_all(AgentState.RUNNING)
    world.settle()
    assert (world.status.phase, world.status.draining) == (Phase.RUNNING, [])


def test_an_evicted_pod_that_is_gone_before_it_was_heard_is_not_charged_either() -> None:
    world = scene()
    del world.pods["pod-1-1"]
    world.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.EXITED, world.now, ranks=[RankReport(0, exit=75)])
    world.decide()
    assert world.status.last_failure is not None
    assert (world.status.last_failure.rule, world.status.restarts.recent[-1].charged) == ("drained", False)


def test_ranks_that_do_not_save_are_not_waited_for_beyond_the_grace() -> None:
    world = scene()
    world.change_pod("pod-1-1", deletion_at=world.now + 60)
    world.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.EXITED, world.now, ranks=[RankReport(0, exit=75)])
    world.settle()
    assert world.status.attempt == 1
    world.now += 61
    world.decide()
    assert world.status.attempt == 2


@pytest.mark.parametrize("why", ["no other node", "policy"])
def test_pods_stay_on_a_cordoned_node(why: str) -> None:
    policy = {"nodePolicy": {"leaveCordoned": False}} if why == "policy" else {}
    world = scene(nodes=3, **policy)
    assert world.nodes is not None
    cordoned = ("n1",) if why == "policy" else ("n0", "n1", "n2")
    for name in cordoned:
        world.nodes[name] = node(name, unschedulable=True)
    assert not any(decision.actions for decision in world.settle())
    assert (world.status.draining, world.status.attempt) == ([], 1)


def test_a_job_that_tolerates_a_cordon_stays_instead_of_coming_back_for_ever() -> None:
    """The scheduler would put its next pod on the very same node."""
    tolerant = {"tolerations": [{"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]}
    world = scene(template={**SCRIPT, **tolerant})
    assert world.nodes is not None
    world.nodes["n1"] = node("n1", unschedulable=True)
    assert not any(decision.actions for decision in world.settle())
    assert (world.status.draining, world.status.attempt) == ([], 1)
    spec = world.job.spec
    assert spec is not None
    waiting = Waiting(world.job.key, demand_of(spec), 2, 0, 0.0)
    cordoned = [node("n0", unschedulable=True), node("n1", unschedulable=True)]
    assert verdicts(cordoned, [], [waiting])[world.job.key].fits, "admission counts what the scheduler would use"


TAINTS = {
    "health checker": ((("nvidia.com/xid", "79", "NoSchedule"),), True),
    "to be emptied": ((("maintenance", "", "NoExecute"),), True),
    "only a wish": ((("maintenance", "", "PreferNoSchedule"),), False),
    "comes and goes": ((("node.kubernetes.io/memory-pressure", "", "NoSchedule"),), False),
    "none": ((), False),
}


@pytest.mark.parametrize("case", TAINTS)
def test_taints(case: str) -> None:
    taints, leaves = TAINTS[case]
    assert asked_to_leave(node("n", taints=taints), ()) is leaves
    assert asked_to_leave(node("n", unschedulable=True), ()) is True
    assert asked_to_leave(node("n", False, unschedulable=True), ()) is False, "nobody there to save"


def test_a_node_that_fails_while_it_is_left_is_a_lost_node() -> None:
    world = scene()
    assert world.nodes is not None
    world.nodes["n1"] = node("n1", unschedulable=True)
    world.settle()
    world.change_pod("pod-1-1", phase="Failed", ended=ended(137, finished_at=world.now), deletion_at=world.now + 30)
    world.settle()
    record = world.status.restarts.recent[-1]
    assert (record.action, record.charged) == ("ReplacePod", False)

"""Gang admission: all or nothing, in order, and never the same room twice."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from operator_cases import manifest, pod
from trireme_api.job import Phase, Slot, TrainingJobStatus
from trireme_api.quantity import parse_quantity
from trireme_api.template import Toleration
from trireme_operator.decide.admission import Demand, Taken, Waiting, fits_on, verdicts
from trireme_operator.decide.views import Node
from trireme_operator.observe.desk import Desk, pod_requests
from trireme_operator.observe.store import Store


def node(name: str, cpu: float = 4, **fields: object) -> Node:
    return Node(name, True, allocatable={"cpu": cpu, "pods": 10.0}, **fields)  # type: ignore[arg-type]


def waits(name: str, count: int, cpu: float = 2, priority: int = 0, at: float = 0, **demand: object) -> Waiting:
    return Waiting(("ns", name), Demand({"cpu": cpu, "pods": 1.0}, **demand), count, priority, at)  # type: ignore[arg-type]


def who(nodes: list[Node], *jobs: Waiting, taken: tuple[Taken, ...] = ()) -> dict[str, str]:
    return {key[1]: verdict.reason for key, verdict in verdicts(nodes, taken, jobs).items()}


TWO = [node("a"), node("b")]
CPU1 = Demand({"cpu": 1.0, "pods": 1.0})
TOLERATED = Toleration(key="nvidia.com/gpu", operator="Exists")
GPU_TAINT = (("nvidia.com/gpu", "", "NoSchedule"),)
CASES = {
    "fits": (who(TWO, waits("x", 4)), {"x": "Fits"}),
    "never": (who(TWO, waits("x", 5)), {"x": "LargerThanCluster"}),
    "a pod must fit one node": (who(TWO, waits("x", 1, cpu=5)), {"x": "LargerThanCluster"}),
    "one after the other": (who(TWO, waits("x", 3), waits("y", 3, at=1)), {"x": "Fits", "y": "WaitsForRoom"}),
    "priority": (who(TWO, waits("x", 3), waits("y", 3, at=1, priority=5)), {"x": "WaitsForRoom", "y": "Fits"}),
    "no overtaking": (
        who(TWO, waits("x", 4), waits("y", 1, at=1), taken=(Taken(CPU1, "a"),)), {"x": "WaitsForRoom", "y": "Queued"},
    ),
    "the impossible does not block": (
        who(TWO, waits("x", 9), waits("y", 1, at=1)), {"x": "LargerThanCluster", "y": "Fits"},
    ),
    "promised room is taken": (who(TWO, waits("x", 4), taken=(Taken(CPU1),)), {"x": "WaitsForRoom"}),
    "other nodes, no waiting": (
        who(
            [node("a", labels={"kind": "gpu"}), node("b", labels={"kind": "cpu"})],
            waits("x", 2, selector={"kind": "gpu"}), waits("y", 1, at=1, selector={"kind": "cpu"}),
            taken=(Taken(CPU1, "a"),),
        ),
        {"x": "WaitsForRoom", "y": "Fits"},
    ),
    "taint": (who([node("a", taints=GPU_TAINT)], waits("x", 1)), {"x": "LargerThanCluster"}),
    "tolerated": (
        who([node("a", taints=GPU_TAINT)], waits("x", 1, tolerations=(TOLERATED,))),
        {"x": "Fits"},
    ),
    "node down": (who([Node("a", False, allocatable={"cpu": 4.0, "pods": 9.0})], waits("x", 1)), {"x": "NoNodeReady"}),
    "cordoned": (
        who([Node("a", True, True, allocatable={"cpu": 4.0, "pods": 9.0})], waits("x", 1)), {"x": "NoNodeReady"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    found, expected = CASES[case]
    assert found == expected


@given(
    nodes=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    jobs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2)), max_size=8),
    taken=st.lists(st.tuples(st.integers(1, 3), st.integers(-1, 4)), max_size=6),
)
def test_all_that_may_start_fit_together_and_the_first_is_never_passed_over(
    nodes: list[int], jobs: list[tuple[int, int, int]], taken: list[tuple[int, int]]
) -> None:
    cluster = [node(f"n{i}", cpu) for i, cpu in enumerate(nodes)]
    names = [one.name for one in cluster]
    bound = tuple(
        Taken(Demand({"cpu": float(cpu), "pods": 1.0}), f"n{at}" if 0 <= at < len(nodes) else "") for cpu, at in taken
    )
    waiting = [waits(f"j{i}", count, cpu, priority, float(i)) for i, (count, cpu, priority) in enumerate(jobs)]
    found = verdicts(cluster, bound, waiting)
    assert set(found) == {job.key for job in waiting}
    granted = sum(job.count * job.demand.requests["cpu"] for job in waiting if found[job.key].fits)
    used = {name: sum(item.demand.requests["cpu"] for item in bound if item.node == name) for name in ("", *names)}
    assert granted <= sum(max(0.0, cpu - used[f"n{i}"]) for i, cpu in enumerate(nodes))
    possible = [job for job in waiting if found[job.key].reason != "LargerThanCluster"]
    if possible and not bound:
        first = min(possible, key=lambda job: (-job.priority, job.created_at))
        assert found[first.key].fits, "nothing is taken, so whoever is first in the queue must start"


def test_amounts_that_are_no_exact_binary_fractions_add_up() -> None:
    assert fits_on({"cpu": 0.3}, {"cpu": 0.1}) == 3
    assert fits_on({"cpu": 4.0}, {"nvidia.com/gpu": 1.0}) == 0
    assert fits_on({"cpu": 4.0, "pods": 3.0}, {"pods": 1.0}) == 3


def test_what_a_pod_of_others_takes() -> None:
    spec = {
        "containers": [{"resources": {"requests": {"cpu": "500m"}}}, {"resources": {"limits": {"cpu": "1"}}}],
        "initContainers": [{"resources": {"requests": {"cpu": "3", "memory": "1Gi"}}}],
        "overhead": {"cpu": "100m"},
    }
    assert pod_requests(spec) == {"cpu": pytest.approx(3.1), "memory": 2.0**30, "pods": 1.0}


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), (2, 2.0), ("8Gi", 8 * 2.0**30), ("1e3", 1000.0), (".5", 0.5), ("1E", 1e18)]
)
def test_quantities(text: str | int, value: float) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["8Gb", "", "much", "1,5", "--1"])
def test_not_quantities(text: str) -> None:
    with pytest.raises(ValueError, match=r"write e\.g\."):
        parse_quantity(text)


# --- the desk -------------------------------------------------------------------------------------------------------


def desk(*jobs: dict[str, object], cpu: int = 2) -> Desk:
    store = Store()
    for name in ("a", "b"):
        allocatable = {"cpu": str(cpu), "pods": "10"}
        ready = [{"type": "Ready", "status": "True"}]
        store.put_node({"metadata": {"name": name}, "status": {"allocatable": allocatable, "conditions": ready}}, 0.0)
    for job in jobs:
        store.put_job(job)
    return Desk(store)


def job_object(name: str, replicas: int, **more: object) -> dict[str, object]:
    obj = manifest(name, replicas, **more)
    obj["metadata"] |= {"uid": f"uid-{name}"}
    return obj


def test_a_grant_is_counted_until_it_is_written() -> None:
    one = desk(job_object("x", 4), job_object("y", 4))
    one.decide()
    x, y = one.store.jobs["ns", "x"], one.store.jobs["ns", "y"]
    first, second = (x, y) if one.verdict(x).fits else (y, x)  # type: ignore[union-attr]
    one.grant(first)
    one.decide()
    assert not one.verdict(second).fits  # type: ignore[union-attr]
    one.settle(first)  # the write failed
    one.decide()
    assert one.verdict(first).fits  # type: ignore[union-attr]


def test_slots_without_a_pod_keep_their_room() -> None:
    status = TrainingJobStatus(phase=Phase.STARTING, attempt=1, slots=[Slot(index=i, incarnation=1) for i in range(3)])
    one = desk(job_object("x", 3, status=status), job_object("y", 2))
    one.decide()
    assert one.verdict(one.store.jobs["ns", "y"]).reason == "WaitsForRoom"  # type: ignore[union-attr]
    assert pod("x", 0).name == "x-0-1"


def test_suspended_and_ended_jobs_take_nothing_and_want_nothing() -> None:
    ended = TrainingJobStatus(phase=Phase.SUCCEEDED, attempt=1, slots=[Slot(index=0, incarnation=1)])
    one = desk(job_object("x", 4, status=ended), job_object("s", 4, runPolicy={"suspend": True}), job_object("y", 4))
    one.decide()
    assert one.verdict(one.store.jobs["ns", "y"]).fits  # type: ignore[union-attr]
    assert one.verdict(one.store.jobs["ns", "s"]) is None


def test_an_unknown_priority_class_is_told() -> None:
    one = desk(job_object("x", 1, schedulingPolicy={"priorityClassName": "urgent"}))
    verdict = one.verdict(one.store.jobs["ns", "x"])
    assert verdict is not None
    assert (verdict.fits, "no PriorityClass 'urgent'" in verdict.message) == (False, True)
    one.priorities["urgent"] = 7
    one.decide()
    assert one.verdict(one.store.jobs["ns", "x"]).fits  # type: ignore[union-attr]


def test_a_thousand_waiting_jobs_and_a_thousand_nodes_are_judged_quickly() -> None:
    nodes = [node(f"n{i}", 8) for i in range(1000)]
    jobs = [waits(f"j{i}", 16, cpu=8, at=float(i)) for i in range(1000)]
    began = time.process_time()
    found = verdicts(nodes, (), jobs)
    assert time.process_time() - began < 2.0
    assert sum(verdict.fits for verdict in found.values()) == 1000 // 16


def test_a_job_that_waits_is_told_which_node_lacks_what() -> None:
    nodes = [
        node("a"), node("b"), node("c", labels={"kind": "cpu"}), Node("d", False), Node("e", True, True),
        node("f", taints=GPU_TAINT), node("g"), node("h"),
    ]  # fmt: skip
    taken = tuple(Taken(CPU1, name) for name in "abghf" for _ in range(3))
    demand = {"avoid": frozenset({"g"})}
    text = verdicts(nodes, taken, [waits("x", 4, **demand)])["ns", "x"].message
    assert "2 would fit now" in text
    assert "a, b, h: too little cpu (2 needed, at most 1 free)" in text
    for part in ("g: avoided after failures", "d: not ready", "e: cordoned", "starts when others end"):
        assert part in text, text
    assert "c:" not in text, "what has room lacks nothing"
    alone = verdicts([node("a", labels={"kind": "x"}), Node("d", False)], (), [waits("x", 1, selector={"kind": "y"})])
    assert "even when empty" in alone["ns", "x"].message
    down = verdicts([Node("d", False, allocatable={"cpu": 9.0, "pods": 9.0})], (), [waits("x", 1)])["ns", "x"]
    assert (down.reason, down.message.rpartition("; ")[2]) == ("NoNodeReady", "d: not ready")


def test_what_a_thousand_nodes_lack_is_said_shortly() -> None:
    nodes = [node(f"n{i:03}") for i in range(1000)]
    taken = [Taken(Demand({"cpu": 3.0}), one.name) for one in nodes]
    text = verdicts(nodes, taken, [waits("x", 1)])["ns", "x"].message
    assert "n000, n001, n002 and 997 more: too little cpu (2 needed, at most 1 free)" in text
    assert len(text) < 250

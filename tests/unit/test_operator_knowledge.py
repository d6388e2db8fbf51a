"""The store against late, lost and doubled events; the queue; merge patches."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from operator_cases import NOW, manifest
from trireme_api.protocol import AgentState, Report
from trireme_operator.act.api import resource_of
from trireme_operator.act.cluster import merge_patch
from trireme_operator.decide.views import Key
from trireme_operator.observe.store import Store
from trireme_operator.queue import Queue, TokenBucket


def pod_object(uid: str = "p", version: int = 1, phase: str = "Running", job: str = "job") -> dict[str, Any]:
    owner = {"apiVersion": "trireme.dev/v1alpha1", "kind": "TrainingJob", "name": job, "uid": "uid", "controller": True}
    return {
        "metadata": {
            "name": f"{job}-0-1", "namespace": "ns", "uid": uid, "resourceVersion": str(version),
            "ownerReferences": [owner],
            "labels": {"trireme.dev/slot": "0", "trireme.dev/incarnation": "1"},
        },
        "spec": {"nodeName": "n"}, "status": {"phase": phase},
    }  # fmt: skip


def job_object(version: int = 1, uid: str = "uid") -> dict[str, Any]:
    obj = manifest()
    obj["metadata"] |= {"resourceVersion": str(version), "uid": uid}
    return obj


def test_nothing_older_than_what_is_known_is_taken_in() -> None:
    store = Store()
    assert store.put_pod(pod_object(version=5)) == ("ns", "job")
    assert store.put_pod(pod_object(version=4, phase="Pending")) is None
    assert store.pods["p"].phase == "Running"
    assert store.put_job(job_object(5)) is not None
    assert store.put_job(job_object(4)) is None


def test_only_what_our_own_last_write_left_is_no_news() -> None:
    store = Store()
    store.put_job(job_object(3))
    assert not store.is_own(job_object(3)), "what a LIST or GET brought still has to be looked at"
    store.put_own(job_object(4))
    assert store.is_own(job_object(4))
    assert not store.is_own(job_object(5)), "somebody else's edit"
    assert not store.is_own(job_object(4, uid="another"))
    store.put_own(job_object(2))
    assert store.is_own(job_object(4)), "an answer that came late"
    store.drop_job(("ns", "job"), "uid", NOW)
    assert not store.is_own(job_object(4))


def test_what_is_gone_stays_gone_however_late_an_event_comes() -> None:
    store = Store()
    store.put_pod(pod_object())
    store.drop_pod("p", NOW)
    assert store.put_pod(pod_object(version=9)) is None
    assert store.pods_of(("ns", "job")) == []
    store.put_job(job_object())
    store.drop_job(("ns", "job"), "uid", NOW)
    assert store.put_job(job_object(9)) is None
    assert store.put_job(job_object(10, "another")) is not None, "the same name again is another job"


def test_a_list_removes_what_no_event_told_but_not_what_is_newer_than_the_list() -> None:
    store = Store()
    store.put_pod(pod_object("old", 5))
    store.put_pod(pod_object("new", 20))
    changed = store.replace_pods([], "10", NOW)
    assert changed == {("ns", "job")}
    assert set(store.pods) == {"new"}
    store.put_job(job_object(5))
    assert store.replace_jobs([], "4", NOW) == set()
    assert store.replace_jobs([], "6", NOW) == {("ns", "job")}


def test_a_list_of_one_job_leaves_the_others_alone() -> None:
    store = Store()
    store.put_pod(pod_object("a", 1, job="a"))
    store.put_pod(pod_object("b", 1, job="b"))
    store.replace_pods([], "9", NOW, only=("ns", "a"))
    assert set(store.pods) == {"b"}


def test_pods_of_nobody_and_of_others_are_not_ours() -> None:
    store = Store()
    stranger = pod_object()
    stranger["metadata"]["ownerReferences"][0]["controller"] = False
    assert store.put_pod(stranger) is None
    stranger["metadata"]["ownerReferences"] = [
        {"kind": "ReplicaSet", "apiVersion": "apps/v1", "controller": True, "uid": "x"}
    ]
    assert store.put_pod(stranger) is None
    assert not store.pods


def test_a_node_that_goes_away_is_stamped_once_by_our_clock() -> None:
    def obj(ready: str) -> dict[str, Any]:
        return {"metadata": {"name": "n"}, "status": {"conditions": [{"type": "Ready", "status": ready}]}}

    store = Store()
    assert store.put_node(obj("True"), 1.0)
    assert not store.put_node(obj("True"), 2.0)
    store.put_node(obj("Unknown"), 3.0)
    store.put_node(obj("False"), 9.0)
    assert store.nodes is not None
    assert store.nodes["n"].not_ready_since == 3.0
    store.put_node(obj("True"), 10.0)
    store.put_node(obj("False"), 11.0)
    assert store.nodes["n"].not_ready_since == 11.0


def test_reports_keep_when_a_state_was_first_heard_and_never_go_back() -> None:
    store = Store()
    assert store.hear("p", Report("p", 2, AgentState.RUNNING), 1.0)
    assert not store.hear("p", Report("p", 2, AgentState.RUNNING), 5.0), "a sign of life is no news"
    assert (store.heard["p"].at, store.heard["p"].since) == (5.0, 1.0)
    assert not store.hear("p", Report("p", 1, AgentState.EXITED), 6.0)
    assert store.heard["p"].report.attempt == 2


@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from(["Pending", "Running", "Failed"])), max_size=30))
def test_in_whatever_order_events_come_the_newest_stays(events: list[tuple[int, str]]) -> None:
    store = Store()
    truth = dict(events)  # one phase per version, as a server gives them
    for version, _ in events:
        store.put_pod(pod_object(version=version, phase=truth[version]))
    if truth:
        assert store.pods["p"].phase == truth[max(truth)]


# --- queue ----------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


KEY, OTHER = ("ns", "a"), ("ns", "b")


def test_a_job_marked_often_is_looked_at_once() -> None:
    clock = Clock()
    queue = Queue(clock)
    for after in (5.0, 0.0, 3.0):
        queue.add(KEY, after)
    assert len(queue) == 1
    assert queue.pop() == KEY
    clock.now = 10.0
    assert queue.pop() is None


def test_a_job_marked_while_it_is_worked_on_comes_again_after() -> None:
    clock = Clock()
    queue = Queue(clock)
    queue.add(KEY)
    assert queue.pop() == KEY
    queue.add(KEY, 2.0)
    queue.add(KEY, 1.0)
    assert queue.pop() is None
    queue.done(KEY)
    assert queue.pop() is None
    clock.now = 1.0
    assert queue.pop() == KEY


def test_failures_wait_longer_each_time_and_success_forgets() -> None:
    queue = Queue(Clock())
    assert [queue.retry(KEY) for _ in range(4)] == [0.25, 0.5, 1.0, 2.0]
    assert [queue.retry(KEY) for _ in range(20)][-1] == 60.0
    queue.forget(KEY)
    assert queue.retry(KEY) == 0.25


def test_no_job_starves() -> None:
    clock = Clock()
    queue = Queue(clock)
    queue.add(OTHER)
    served = []
    for _ in range(4):
        queue.add(KEY)
        clock.now += 1
        key = queue.pop()
        assert key is not None
        served.append(key)
        queue.done(key)
    assert OTHER in served[:2]
    queue.add(OTHER)
    clock.now += 7
    assert queue.oldest_seconds() == 7


def served(queue: Queue) -> list[Key]:
    found = []
    while (key := queue.pop()) is not None:
        found.append(key)
        queue.done(key)
    return found


def test_what_can_wait_lets_others_go_first_but_not_for_ever() -> None:
    clock = Clock()
    queue = Queue(clock)
    figures, news, late_news = ("ns", "figures"), ("ns", "news"), ("ns", "late news")
    queue.add(figures, 1.0, patience=10.0)
    clock.now = 5.0
    queue.add(news)
    assert served(queue) == [news, figures]
    queue.add(figures, 1.0, patience=10.0)
    clock.now = 20.0
    queue.add(late_news)
    assert served(queue) == [figures, late_news]
    queue.add(figures, 1.0)
    clock.now = 25.0
    queue.add(news)
    assert served(queue) == [figures, news], "without patience, in the order they fell due"


def test_news_of_a_job_whose_figures_wait_goes_first() -> None:
    clock = Clock()
    queue = Queue(clock)
    queue.add(KEY, 0.0, patience=10.0)
    clock.now = 1.0
    queue.add(OTHER)
    queue.add(KEY)
    clock.now = 2.0
    queue.add(("ns", "third"))
    assert queue.pop() in (KEY, OTHER)
    assert queue.pop() in (KEY, OTHER)
    assert queue.pop() == ("ns", "third")
    assert queue.pop() is None
    assert len(queue) == 0


def test_of_what_can_wait_only_a_few_are_worked_on_at_once() -> None:
    clock = Clock()
    queue = Queue(clock, patient_at_once=2)
    figures = [("ns", f"figures-{number}") for number in range(4)]
    for key in figures:
        queue.add(key, patience=10.0)
    clock.now = 100.0
    assert [queue.pop(), queue.pop(), queue.pop()] == [*figures[:2], None]
    assert queue.oldest_seconds() == 0, "figures may wait: that is no sign of an operator that is stuck"
    queue.add(KEY)
    queue.add(figures[3])  # has become news
    assert [queue.pop(), queue.pop(), queue.pop()] == [figures[3], KEY, None]
    queue.done(figures[3])
    assert queue.pop() is None
    queue.done(figures[0])
    assert [queue.pop(), queue.pop()] == [figures[2], None]


def test_what_can_wait_becomes_urgent_when_another_mark_falls_due() -> None:
    clock = Clock()
    queue = Queue(clock, patient_at_once=1)
    queue.add(OTHER, patience=10.0)
    assert queue.pop() == OTHER
    queue.add(KEY, 14.0)
    queue.add(KEY, 5.0, patience=10.0)
    clock.now = 13.0
    assert queue.pop() is None, "it is due, but patient still"
    assert queue.oldest_seconds() == 0
    clock.now = 16.0
    assert queue.oldest_seconds() == 2
    assert queue.pop() == KEY
    assert queue.pop() is None


async def test_a_worker_that_waits_for_a_patient_one_to_end_is_woken() -> None:
    queue = Queue(patient_at_once=1)
    queue.add(KEY, patience=10.0)
    queue.add(OTHER, patience=10.0)
    assert await queue.get() == KEY
    waiter = asyncio.ensure_future(queue.get())
    await asyncio.sleep(0.01)
    assert not waiter.done()
    queue.done(KEY)
    assert await asyncio.wait_for(waiter, 1.0) == OTHER


def test_an_entry_that_was_superseded_hands_nothing_out_early() -> None:
    clock = Clock()
    queue = Queue(clock)
    queue.add(KEY, 0.0, patience=10.0)
    queue.add(OTHER)
    assert queue.pop() == OTHER  # now the entry of KEY has its rank, 10
    queue.add(KEY)
    assert queue.pop() == KEY
    queue.done(KEY)
    queue.add(KEY, 10.0)
    clock.now = 9.0
    assert queue.pop() is None
    clock.now = 10.0
    assert queue.pop() == KEY


async def test_a_waiting_worker_is_woken() -> None:
    queue = Queue()
    waiter = asyncio.ensure_future(queue.get())
    await asyncio.sleep(0.01)
    queue.add(KEY, 0.02)
    assert await asyncio.wait_for(waiter, 1.0) == KEY


def test_the_bucket_holds_the_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(10.0, 2, clock)
    assert [round(bucket.reserve(), 3) for _ in range(4)] == [0.0, 0.0, 0.1, 0.2]
    clock.now = 10.0
    assert bucket.reserve() == 0.0


# --- patches --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.text(max_size=3), st.lists(st.integers(), max_size=3)),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


def apply(target: Any, patch: Any) -> Any:
    """RFC 7396, as its appendix has it."""
    if not isinstance(patch, dict):
        return patch
    found = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = apply(found.get(name), value)
    return found


@given(OBJECT, OBJECT)
def test_a_merge_patch_makes_the_new_of_the_old(old: dict[str, Any], new: dict[str, Any]) -> None:
    patch = merge_patch(old, new)
    assert apply(old, patch) == new
    assert bool(patch) == (old != new)


def test_metrics_know_resources_but_no_names() -> None:
    assert resource_of("/api/v1/namespaces/ns/pods/a-0-1") == "pods"
    assert resource_of("/apis/trireme.dev/v1alpha1/namespaces/ns/trainingjobs/a/status") == "trainingjobs/status"
    assert resource_of("/api/v1/nodes") == "nodes"
    assert resource_of("/apis/authentication.k8s.io/v1/tokenreviews") == "tokenreviews"

"""Every single crash of a story: the operator is killed before or after its k-th call, for every k; same end.

After Sieve (OSDI'22): intermediate states (killed at each call), unobserved states (each watch event lost once) and
stale states (nothing seen since the k-th event). The oracle is the end of the same story without a fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from actors import NAMESPACE, Agent, Operator
from model import Model
from trireme_api.job import Phase, TrainingJobStatus
from trireme_api.protocol import AgentState, Cause

JOB = "a"


@dataclass
class Fault:
    """What goes wrong, once: at which of the operator's calls it is killed, or which event it never gets."""

    kill_at: int = -1
    lose: int = -1
    freeze_at: int = -1
    """From this event on the watch is silent; LISTs still answer."""


class Story:
    """Runs the world without any fault but the one, in a fixed order."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.model = Model(nodes=3, cpu=2)
        self.events = 0
        self.calls: list[tuple[float, int]] = []
        """When each call was made, and the state of the world then."""
        self.operator = self.fresh()

    def fresh(self) -> Operator:
        operator = self.model.new_operator(f"op{len(self.model.operators)}")
        operator.read_nodes()
        self.drain(operator)
        return operator

    def drain(self, operator: Operator) -> None:
        """Lets the operator's calls through, one by one, and kills it at the one that is to be its last."""
        while operator.alive:
            if not [gate for gate in operator.gates if not gate.done()]:
                return
            self.calls.append((self.model.now, self.model.version))
            if len(self.calls) - 1 == self.fault.kill_at:
                operator.kill()
                return
            operator.open_gate()

    def turn(self) -> None:
        """One moment: events, work, kubelets, agents."""
        model = self.model
        if not self.operator.alive:
            self.operator = self.fresh()
            if not self.operator.alive:
                return
        operator = self.operator
        while operator.inbox:
            if self.events == self.fault.lose or 0 <= self.fault.freeze_at <= self.events:
                operator.inbox.pop(0)
            else:
                operator.deliver()
            self.events += 1
        operator.begin(("", "resync"))
        operator.read_nodes()
        operator.read_leases()
        self.drain(operator)
        operator.desk.decide()
        if operator.alive:
            operator.begin((NAMESPACE, JOB))
            self.drain(operator)
        for pod in list(model.pods.values()):
            model.kubelet_step(pod)
        for agent in list(model.agents.values()):
            if not agent.gone:
                model.poll(agent, operator)
        model.must.moment()
        model.now += 2.0

    def until(self, done: Callable[[], bool], turns: int = 80) -> None:
        for _ in range(turns):
            if done():
                return
            self.turn()
        raise AssertionError(f"never came about: {self.status.phase} {self.status.explanation}")

    @property
    def status(self) -> TrainingJobStatus:
        return TrainingJobStatus.model_validate((self.model.jobs.get(JOB) or {}).get("status") or {})

    def phase(self, phase: Phase, attempt: int | None = None) -> Callable[[], bool]:
        return lambda: self.status.phase == phase and attempt in (None, self.status.attempt)

    def agents(self) -> list[AgentState]:
        return [agent.state for agent in self.model.agents.values() if not agent.gone]

    def run(self) -> None:
        self.until(lambda: self.phase(Phase.RUNNING)() and self.agents().count(AgentState.RUNNING) == 2)

    def end(self) -> tuple[object, ...]:
        """What a fault must not change."""
        for _ in range(6):
            self.turn()
        self.model.now += 60  # whatever is to leave by itself has left
        for _ in range(3):
            self.turn()
        status, pods = self.status, sorted(self.model.pods)
        self.model.close()
        restarts = status.restarts
        return status.phase, status.attempt, (restarts.process, restarts.pod, restarts.gang), tuple(pods)


def start_and_finish(story: Story) -> None:
    story.model.create_job(JOB, 2)
    story.run()
    for agent in list(story.model.agents.values()):
        story.model.rank_done(agent)
    story.until(story.phase(Phase.SUCCEEDED))


def a_rank_dies(story: Story) -> None:
    story.model.create_job(JOB, 2)
    story.run()
    story.model.rank_fails(list(story.model.agents.values())[1], Cause.UNKNOWN, 1)
    story.until(lambda: story.phase(Phase.RUNNING, 2)() and story.agents().count(AgentState.RUNNING) == 2)


def a_pod_is_lost(story: Story) -> None:
    story.model.create_job(JOB, 2)
    story.run()
    story.model.remove_pod("a-0-1")
    story.until(lambda: story.phase(Phase.RUNNING, 2)() and story.agents().count(AgentState.RUNNING) == 2)


def suspend_and_resume(story: Story) -> None:
    story.model.create_job(JOB, 2)
    story.run()
    story.model.edit_job(JOB, runPolicy={"suspend": True})
    story.until(lambda: story.phase(Phase.SUSPENDED)() and not story.model.pods)
    story.model.edit_job(JOB, runPolicy={"suspend": False})
    story.run()


def runs_on(story: Story, nodes: int, attempt: int) -> None:
    """Until all ranks of a gang of this size run in this attempt or a later one."""

    def there() -> bool:
        status = story.status
        size = sum(not slot.spare for slot in status.slots)
        running = story.agents().count(AgentState.RUNNING)
        return (status.phase, size, running) == (Phase.RUNNING, nodes, nodes) and status.attempt >= attempt

    story.until(there)


def save(story: Story) -> None:
    """A checkpoint, of which the operator hears."""
    for agent in story.model.agents.values():
        story.model.train(agent, 5)
        if agent.state == AgentState.RUNNING:
            story.model.commit(agent)
    story.until(lambda: story.status.last_checkpoint is not None)


def lose_node_of(story: Story, pod: str) -> str:
    """The node and all on it are gone from one moment to the next; the API server still shows them."""
    name = str(story.model.pods[pod]["spec"]["nodeName"])
    for one in story.model.pods.values():
        if one["spec"].get("nodeName") == name and one["metadata"]["uid"] in story.model.agents:
            story.model.agents[one["metadata"]["uid"]].gone = True
    story.model.put_node(name, 2, ready=False)
    return name


def a_spare_steps_in(story: Story) -> None:
    story.model.create_job(JOB, {"desired": 2, "spares": 1})
    runs_on(story, 2, 1)
    story.until(lambda: story.status.replicas.spares == 1)
    lose_node_of(story, "a-0-1")
    runs_on(story, 2, 2)


def a_node_is_lost_and_comes_back(story: Story) -> None:
    story.model.create_job(JOB, {"desired": 3, "min": 2})
    runs_on(story, 3, 1)
    save(story)
    name = lose_node_of(story, "a-1-1")
    runs_on(story, 2, 2)
    story.model.now += 50  # of the minute that a shrunk gang stays small
    story.model.put_node(name, 2, ready=True)
    runs_on(story, 3, 3)


def scaled_down_and_up(story: Story) -> None:
    story.model.create_job(JOB, 2)
    runs_on(story, 2, 1)
    save(story)
    story.model.edit_job(JOB, replicas={"desired": 1})
    runs_on(story, 1, 2)
    story.model.edit_job(JOB, replicas={"desired": 3})
    runs_on(story, 3, 3)


def on_two(story: Story, attempt: int) -> Callable[[], bool]:
    """Two ranks run in exactly this attempt."""
    return lambda: story.phase(Phase.RUNNING, attempt)() and story.agents().count(AgentState.RUNNING) == 2


def quiet(story: Story, seconds: float = 40) -> None:
    """So long nothing happens that a restart would follow from."""
    attempt, until = story.status.attempt, story.model.now + seconds
    while story.model.now < until:
        story.turn()
    assert story.status.attempt == attempt, story.status.explanation


def a_cordoned_node_is_left(story: Story) -> None:
    story.model.create_job(JOB, 2)
    story.run()
    for agent in story.model.agents.values():
        story.model.train(agent, 7)
    node = str(story.model.pods["a-0-1"]["spec"]["nodeName"])
    story.model.cordon(node)
    story.until(on_two(story, 2))
    status = story.status
    assert node not in {pod["spec"]["nodeName"] for pod in story.model.pods.values()}
    assert (status.restarts.recent[-1].charged, status.budgets_left, story.model.committed[JOB]) == (False, {}, 7)
    if story.fault == Fault():
        quiet(story)


def a_cordon_that_the_job_tolerates(story: Story) -> None:
    tolerations = [{"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]
    template = {"image": "i", "command": ["c"], "resources": {"requests": {"cpu": 2}}, "tolerations": tolerations}
    story.model.create_job(JOB, 2, template=template)
    story.run()
    story.model.cordon(str(story.model.pods["a-0-1"]["spec"]["nodeName"]))
    quiet(story)


def a_cordon_without_room_elsewhere(story: Story) -> None:
    story.model.create_job(JOB, 3)
    runs_on(story, 3, 1)
    story.model.cordon("n1")
    quiet(story)


def a_node_dies_before_kubernetes_says_so(story: Story) -> None:
    story.model.create_job(JOB, 2)
    story.run()
    name = str(story.model.pods["a-0-1"]["spec"]["nodeName"])
    story.model.dead_kubelets.add(name)
    for agent in story.model.agents.values():
        agent.gone = agent.gone or agent.pod == "a-0-1"
    story.model.lost.add(story.model.pods["a-0-1"]["metadata"]["uid"])
    died = story.model.now
    story.until(lambda: story.status.attempt == 2)
    if story.fault == Fault():
        assert story.model.now - died <= 24, "two looks more than 20 s"
    story.model.put_node(name, 2, ready=False)  # now it does
    story.until(on_two(story, 2))


def a_kubelet_dies_alone(story: Story) -> None:
    story.model.create_job(JOB, 2)
    story.run()
    story.model.dead_kubelets.add(str(story.model.pods["a-0-1"]["spec"]["nodeName"]))
    quiet(story)


def the_whole_world_pauses(story: Story) -> None:
    """A minute without a word of anybody; one kubelet is a little later to renew than the others."""
    story.model.create_job(JOB, 2)
    story.run()
    for _ in range(8):
        story.turn()
    slow = str(story.model.pods["a-0-1"]["spec"]["nodeName"])
    story.model.now += 60
    story.model.dead_kubelets.add(slow)
    story.turn()
    story.model.dead_kubelets.clear()
    quiet(story)


def one_dies_while_the_other_is_frozen(story: Story) -> tuple[Agent, Agent]:
    """The second is heard of again only when the answer to the first one's end has been decided."""
    story.model.create_job(JOB, 2)
    story.run()
    first, second = list(story.model.agents.values())
    second.frozen = True
    story.model.rank_fails(first, Cause.NETWORK, 1)
    assert first.failure is not None
    first.failure = replace(first.failure, cascade=True)
    story.until(lambda: story.status.attempt == 2)
    return first, second


def the_root_is_told_late(story: Story) -> None:
    _, second = one_dies_while_the_other_is_frozen(story)
    story.model.rank_fails(second, Cause.OOM, 137)
    second.frozen = False
    story.until(on_two(story, 2))
    failure, by_cause = story.status.last_failure, story.status.restarts.by_cause
    assert failure is not None
    # An operator killed with the report in its hands never tells of it: the name is lost, the count is right.
    named = {Cause.OOM} if story.fault.kill_at < 0 else {Cause.OOM, Cause.NETWORK}
    assert failure.cause in named
    assert by_cause == {failure.cause.value: 1}


def a_pod_falls_with_it(story: Story) -> None:
    _, second = one_dies_while_the_other_is_frozen(story)
    story.model.end(story.model.pods[second.pod], 137)
    story.until(on_two(story, 3))
    assert story.status.restart_count == 1, story.status.restarts


def waits_for_data_and_goes_on(story: Story) -> None:
    """Two mega-batches are there: one session after the other in place; then it waits without nodes for the third."""
    story.model.create_stream(JOB, 2, arrived=2)
    for attempt, step in ((1, 25), (2, 50)):
        story.until(on_two(story, attempt))
        assert sorted(story.model.pods) == ["a-0-1", "a-1-1"]
        for agent in list(story.model.agents.values()):
            story.model.train(agent, step)
    story.until(lambda: story.phase(Phase.WAITING)() and not story.model.pods)
    assert (story.status.restart_count, story.status.attempt, story.model.committed[JOB]) == (0, 2, 50)
    if story.fault == Fault():
        quiet(story)
    story.model.arrive(JOB, 3)
    story.until(on_two(story, 3))
    assert {agent.step for agent in story.model.agents.values() if not agent.gone} == {50}


def delete(story: Story) -> None:
    story.model.create_job(JOB, 2)
    story.run()
    story.model.delete_job(JOB)
    story.until(lambda: not story.model.pods)


TOLD = (start_and_finish, a_rank_dies, a_pod_is_lost, suspend_and_resume, waits_for_data_and_goes_on, delete)
NODES = (a_cordoned_node_is_left, a_node_dies_before_kubernetes_says_so)
LATE = (the_root_is_told_late, a_pod_falls_with_it)
CALM = (a_cordon_that_the_job_tolerates, a_cordon_without_room_elsewhere, a_kubelet_dies_alone, the_whole_world_pauses)
"""Nothing may follow from these."""
RESIZED = (a_spare_steps_in, a_node_is_lost_and_comes_back, scaled_down_and_up)
STORIES = {story.__name__: story for story in (*TOLD, *RESIZED, *NODES, *LATE)}
EVERY = STORIES | {story.__name__: story for story in CALM}


def play(name: str, fault: Fault) -> tuple[tuple[object, ...], list[int], int]:
    """The end; the calls at which a kill makes a difference; how many events there were.

    What an operator knows is lost with it, so of calls between which nothing in the world changed, one stands for all.
    """
    story = Story(fault)
    EVERY[name](story)
    calls = story.calls
    points = [k for k, call in enumerate(calls) if k == 0 or call != calls[k - 1]]
    events = story.events
    return story.end(), points, events


@pytest.mark.parametrize("name", (story.__name__ for story in CALM))
def test_nothing_follows(name: str) -> None:
    play(name, Fault())


@pytest.mark.parametrize("name", STORIES)
def test_killed_at_every_call(name: str) -> None:
    expected, calls, _ = play(name, Fault())
    assert len(calls) > 15
    for k in calls:
        assert play(name, Fault(kill_at=k))[0] == expected, f"killed at call {k}"


@pytest.mark.parametrize("name", STORIES)
def test_every_event_lost_once(name: str) -> None:
    expected, _, events = play(name, Fault())
    assert events > 10
    for k in range(events):
        assert play(name, Fault(lose=k))[0] == expected, f"event {k} of {events} lost"


@pytest.mark.parametrize("name", STORIES)
def test_a_watch_that_falls_silent_at_every_event(name: str) -> None:
    expected, _, events = play(name, Fault())
    for k in range(events):
        assert play(name, Fault(freeze_at=k))[0] == expected, f"silent from event {k} of {events}"

"""Every single crash of a story: the operator is killed before or after its k-th call, for every k; same end.

After Sieve (OSDI'22): intermediate states (killed at each call), unobserved states (each watch event lost once) and
stale states (nothing seen since the k-th event). The oracle is the end of the same story without a fault.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from model import NAMESPACE, Model, Operator
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
        self.calls = self.events = 0
        self.operator = self.fresh()

    def fresh(self) -> Operator:
        operator = self.model.new_operator(f"op{len(self.model.operators)}")
        self.model.read_nodes(operator)
        self.drain(operator)
        return operator

    def drain(self, operator: Operator) -> None:
        """Lets the operator's calls through, one by one, and kills it at the one that is to be its last."""
        while operator.alive:
            if not [gate for gate in operator.gates if not gate.done()]:
                return
            if self.calls == self.fault.kill_at:
                self.calls += 1
                self.model.kill(operator)
                return
            self.calls += 1
            self.model.open_gate(operator)

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
                model.deliver(operator)
            self.events += 1
        model.begin(operator, ("", "resync"))
        model.read_nodes(operator)
        self.drain(operator)
        operator.desk.decide()
        if operator.alive:
            model.begin(operator, (NAMESPACE, JOB))
            self.drain(operator)
        for pod in list(model.pods.values()):
            model.kubelet_step(pod)
        for agent in list(model.agents.values()):
            if not agent.gone:
                model.poll(agent, operator)
        model.check()
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


def delete(story: Story) -> None:
    story.model.create_job(JOB, 2)
    story.run()
    story.model.delete_job(JOB)
    story.until(lambda: not story.model.pods)


TOLD = (start_and_finish, a_rank_dies, a_pod_is_lost, suspend_and_resume, delete)
RESIZED = (a_spare_steps_in, a_node_is_lost_and_comes_back, scaled_down_and_up)
STORIES = {story.__name__: story for story in (*TOLD, *RESIZED)}


def play(name: str, fault: Fault) -> tuple[tuple[object, ...], int, int]:
    story = Story(fault)
    STORIES[name](story)
    calls, events = story.calls, story.events
    return story.end(), calls, events


@pytest.mark.parametrize("name", STORIES)
def test_killed_at_every_call(name: str) -> None:
    expected, calls, _ = play(name, Fault())
    assert calls > 20
    for k in range(calls):
        assert play(name, Fault(kill_at=k))[0] == expected, f"killed at call {k} of {calls}"


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

"""Any interleaving of operators, watches, kubelets, nodes, agents and people: invariants hold, all comes to an end.

The rules of the machine are everything that may happen next; hypothesis looks for an order that breaks an invariant of
model.py (I1–I7). Afterwards the world is let calm down, and liveness is checked: every job ends where it should (L1),
nothing is written any more (L2), deleted jobs leave nothing behind (L3).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import Phase as Phases
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

sys.path.insert(0, str(Path(__file__).parent))

from actors import NAMESPACE, Agent, Operator
from invariants import Broken
from model import Model
from trireme_api.job import TERMINAL, Phase, TrainingJobStatus
from trireme_api.protocol import AgentState, Cause

JOBS = ("a", "b")
PARTS = ("resync", "watch", "work", "kubelets", "agents", "training")
PICK = st.integers(min_value=0, max_value=7)


def _valid(replicas: dict[str, Any]) -> bool:
    least, most, allowed = replicas.get("min", 1), replicas.get("max", 99), replicas.get("allowed", [])
    return least <= replicas["desired"] <= most and (not allowed or replicas["desired"] in allowed)


WISHES = st.fixed_dictionaries(
    {"desired": st.integers(1, 3), "spares": st.integers(0, 1)},
    optional={"min": st.integers(1, 2), "max": st.integers(2, 3), "allowed": st.sampled_from([[1, 3], [2, 3], [1, 2]])},
).filter(_valid)
"""spec.replicas"""
CLEAN = 50.0
GREEN = {
    "checkpoint": {"uri": "pvc://checkpoints/job"},
    "carbonPolicy": {"zone": "DE", "pauseAbove": 300, "minimumRunSeconds": 10, "deadline": "2050-01-01T00:00:00Z"},
}


class World(RuleBasedStateMachine):
    operators_at_once = 1

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(nodes=3, cpu=2)
        self.model.one_operator = self.operators_at_once == 1
        self.count = 0

    # --- helpers ----------------------------------------------------------------------------------------------------

    def operator(self, pick: int) -> Operator | None:
        return self.model.operators[pick % len(self.model.operators)] if self.model.operators else None

    def agent(self, pick: int, *states: AgentState) -> Agent | None:
        found = [a for a in self.model.agents.values() if not a.gone and (not states or a.state in states)]
        return found[pick % len(found)] if found else None

    def status(self, name: str) -> TrainingJobStatus:
        return TrainingJobStatus.model_validate(self.model.jobs[name].get("status") or {})

    # --- people -----------------------------------------------------------------------------------------------------

    @initialize(
        sizes=st.tuples(WISHES, WISHES), rounds=st.integers(0, 6), green=st.booleans(),
        arrived=st.sampled_from([None, 0, 1, 2]),
    )  # fmt: skip
    def begin(
        self, sizes: tuple[dict[str, Any], dict[str, Any]], rounds: int, green: bool, arrived: int | None
    ) -> None:
        self.model.shine(CLEAN)
        policy = GREEN if green else {}
        self.model.create_job(JOBS[0], sizes[0], **policy)
        if arrived is None:
            self.model.create_job(JOBS[1], sizes[1], **policy)
        else:
            self.model.create_stream(JOBS[1], sizes[1], arrived, **policy)
        self.replace_operator()
        for _ in range(rounds):
            self.peace(0, PARTS)

    def replace_operator(self) -> None:
        self.count += 1
        operator = self.model.new_operator(f"op{self.count}")
        operator.read_nodes()

    @rule(name=st.sampled_from(JOBS), on=st.booleans())
    def suspend(self, name: str, on: bool) -> None:
        if name in self.model.jobs:
            self.model.edit_job(name, runPolicy={"suspend": on})

    @rule(grams=st.sampled_from([CLEAN, 280.0, 400.0]))
    def weather(self, grams: float) -> None:
        self.model.shine(grams)
        for operator in self.model.operators:
            for name in self.model.jobs:
                operator.queue.add((NAMESPACE, name))

    @rule(name=st.sampled_from(JOBS), replicas=WISHES)
    def edit(self, name: str, replicas: dict[str, Any]) -> None:
        if name in self.model.jobs:
            self.model.edit_job(name, replicas=replicas)

    @rule(name=st.sampled_from(JOBS), desired=st.integers(1, 3))
    def scale(self, name: str, desired: int) -> None:
        """As `kubectl scale` does; the API server refuses what the CRD's rules forbid."""
        if name in self.model.jobs:
            replicas = {**self.model.jobs[name]["spec"]["replicas"], "desired": desired}
            if _valid(replicas):
                self.model.edit_job(name, replicas=replicas)

    @rule()
    def data_arrive(self) -> None:
        """One more mega-batch for the job that learns from a stream."""
        stream = self.model.stream(JOBS[1])
        if stream is not None and stream.spec.arrived < stream.spec.mega_batches:
            self.model.arrive(JOBS[1], stream.spec.arrived + 1)

    @rule(name=st.sampled_from(JOBS), again=st.booleans())
    def delete(self, name: str, again: bool) -> None:
        if name in self.model.jobs and self.count % 3 == 0:
            self.model.delete_job(name)
            self.model.committed.pop(name, None)
            self.model.fence.pop(name, None)
            for agent in self.model.agents.values():
                if agent.job == name:
                    agent.job = f"{name}, deleted"
            if again:
                self.model.create_job(name, 2)

    # --- the operator -----------------------------------------------------------------------------------------------

    @rule(pick=PICK, order=st.permutations(PARTS))
    def peace(self, pick: int, order: Sequence[str]) -> None:
        """For a moment all works as it should, each part at its own time."""
        if not self.model.operators:
            self.replace_operator()
        operator = self.operator(pick)
        assert operator is not None
        everything(self.model, operator, steps=3, order=order)
        self.model.now += 1.0

    @rule(pick=PICK, name=st.sampled_from((*JOBS, "")), gates=st.sampled_from([0, 1, 2, 3, 4, 5, 7, 9, 100]))
    def work(self, pick: int, name: str, gates: int) -> None:
        """Begins to look at a job (or all) and stops somewhere on the way, or at the end."""
        operator = self.operator(pick)
        if operator is not None:
            operator.desk.decide()
            operator.begin((NAMESPACE, name) if name else ("", "resync"))
            for _ in range(gates):
                if not operator.open_gate():
                    break

    @rule(pick=PICK, which=PICK, times=st.integers(1, 6))
    def proceed(self, pick: int, which: int, times: int) -> None:
        operator = self.operator(pick)
        if operator is not None:
            for _ in range(times):
                operator.open_gate(which)

    @rule(pick=PICK, again=st.booleans())
    def crash(self, pick: int, again: bool) -> None:
        operator = self.operator(pick)
        if operator is not None:
            operator.kill()
            if again:
                self.replace_operator()

    @precondition(lambda self: len(self.model.operators) < self.operators_at_once)
    @rule()
    def another_operator(self) -> None:
        self.replace_operator()

    @rule(pick=PICK, which=PICK, times=st.integers(1, 4))
    def deliver(self, pick: int, which: int, times: int) -> None:
        operator = self.operator(pick)
        if operator is not None:
            for _ in range(times):
                operator.deliver(which)

    @rule(pick=PICK, which=PICK)
    def lose_event(self, pick: int, which: int) -> None:
        operator = self.operator(pick)
        if operator is not None and operator.inbox:
            operator.inbox.pop(which % len(operator.inbox))

    # --- the cluster ------------------------------------------------------------------------------------------------

    @rule(pick=PICK, times=st.integers(1, 4))
    def kubelet(self, pick: int, times: int) -> None:
        for _ in range(times):
            pods = list(self.model.pods.values())
            if pods:
                self.model.kubelet_step(pods[pick % len(pods)])
            pick += 1

    @rule(pick=PICK, how=st.sampled_from(["delete", "oom", "crash", "vanish"]))
    def break_pod(self, pick: int, how: str) -> None:
        pods = [p for p in self.model.pods.values() if p["status"]["phase"] == "Running"]
        if not pods:
            return
        pod = pods[pick % len(pods)]
        if how == "delete":
            self.model.delete_pod(pod["metadata"]["name"], pod["metadata"]["uid"])
        elif how == "vanish":
            self.model.remove_pod(pod["metadata"]["name"])
        else:
            self.model.end(pod, 137 if how == "oom" else 1)

    @rule(pick=PICK, ready=st.booleans())
    def node(self, pick: int, ready: bool) -> None:
        name = f"n{pick % 3}"
        self.model.put_node(name, 2, ready)

    @rule(pick=PICK, on=st.booleans())
    def cordon(self, pick: int, on: bool) -> None:
        self.model.cordon(f"n{pick % 3}", on)

    @rule(length=st.sampled_from([0.5, 2.0, 20.0, 90.0]))
    def time_passes(self, length: float) -> None:
        self.model.now += length

    # --- agents -----------------------------------------------------------------------------------------------------

    @rule(pick=PICK, who=PICK, times=st.integers(1, 4))
    def poll(self, pick: int, who: int, times: int) -> None:
        operator = self.operator(who)
        for _ in range(times):
            agent = self.agent(pick)
            if operator is not None and agent is not None:
                self.model.poll(agent, operator)
            pick += 1

    @rule(who=PICK)
    def poll_all(self, who: int) -> None:
        operator = self.operator(who)
        for agent in list(self.model.agents.values()):
            if operator is not None:
                self.model.poll(agent, operator)

    @rule(pick=PICK, steps=st.integers(1, 5), save=st.booleans())
    def train(self, pick: int, steps: int, save: bool) -> None:
        agent = self.agent(pick, AgentState.RUNNING)
        if agent is not None:
            self.model.train(agent, steps)
            if save:
                self.model.commit(agent)

    @rule(pick=PICK, cause=st.sampled_from([Cause.UNKNOWN, Cause.NETWORK, Cause.OOM, Cause.HANG]))
    def rank_fails(self, pick: int, cause: Cause) -> None:
        agent = self.agent(pick, AgentState.RUNNING)
        if agent is not None:
            self.model.rank_fails(agent, cause, 1)

    @rule(pick=PICK)
    def rank_done(self, pick: int) -> None:
        agent = self.agent(pick, AgentState.RUNNING)
        if agent is not None:
            self.model.rank_done(agent)

    # --- checks -----------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        self.model.must.moment()

    def teardown(self) -> None:
        try:
            if self.model.jobs:
                calm(self)
        finally:
            self.model.close()


def calm(world: World) -> None:
    """Faults stop; nodes are well, one operator leads, agents and kubelets do their work: all must come to rest."""
    model = world.model
    model.shine(CLEAN)
    for operator in list(model.operators):
        operator.kill()
    for node in list(model.nodes):
        model.put_node(node, 2, True)
        model.cordon(node, False)
    world.replace_operator()
    operator = model.operators[0]
    come_to_rest(world, operator)
    for name in model.jobs:
        stream = model.stream(name)
        if stream is not None and world.status(name).phase == Phase.WAITING:
            if any(pod["metadata"]["labels"]["trireme.dev/job"] == name for pod in model.pods.values()):
                raise Broken(f"L4: {name} waits for data and holds nodes")
            model.arrive(name, stream.spec.mega_batches)
            come_to_rest(world, operator)
            if world.status(name).phase not in TERMINAL:
                raise Broken(f"L4: {name} has all its data and does not end: {world.status(name).explanation}")
    for _ in range(2):  # what follows from the last change
        everything(model, operator)
        model.now += 60.0
    before = len(model.writes)
    for _ in range(5):
        everything(model, operator)
        model.now += 60.0
    if len(model.writes) != before:
        raise Broken(f"L2: written though nothing happens: {model.writes[before:]}")
    for name in list(model.jobs):
        model.delete_job(name)
    for _ in range(20):
        everything(model, operator)
        model.now += 5.0
    if model.pods:
        raise Broken(f"L3: left behind: {sorted(model.pods)}")


def come_to_rest(world: World, operator: Operator) -> None:
    model = world.model
    for _ in range(120):
        everything(model, operator)
        model.now += 5.0
        if all(at_rest(world, name) for name in model.jobs) and not unsettled(model):
            return
    raise Broken("L1: " + "; ".join(f"{n}: {world.status(n).phase} {world.status(n).explanation}" for n in model.jobs))


def at_rest(world: World, name: str) -> bool:
    phase = world.status(name).phase
    suspended = bool(world.model.jobs[name]["spec"].get("runPolicy", {}).get("suspend"))
    stream = world.model.stream(name)
    step = world.model.committed.get(name, 0)
    waits = phase == Phase.WAITING and stream is not None and stream.needed(step) > stream.spec.arrived
    return phase in TERMINAL or (phase == Phase.SUSPENDED and suspended) or waits


def unsettled(model: Model) -> bool:
    return any("deletionTimestamp" in pod["metadata"] for pod in model.pods.values())


def everything(model: Model, operator: Operator, steps: int = 40, order: Sequence[str] = PARTS) -> None:
    """One round of a world without faults."""
    for part in order:
        if part == "resync":
            operator.begin(("", "resync"))
            drain(model, operator)
        elif part == "watch":
            while operator.deliver():
                pass
            operator.read_nodes()
        elif part == "work":
            operator.desk.decide()
            for name in {*JOBS, *(pod["metadata"]["labels"]["trireme.dev/job"] for pod in model.pods.values())}:
                operator.begin((NAMESPACE, name))
                drain(model, operator)
        elif part == "kubelets":
            for pod in list(model.pods.values()):
                model.kubelet_step(pod)
        elif part == "agents":
            for agent in [agent for agent in model.agents.values() if not agent.gone]:
                model.poll(agent, operator)
        else:
            for agent in [agent for agent in model.agents.values() if not agent.gone]:
                model.train(agent, steps)
                if agent.step >= 100:
                    model.rank_done(agent)


def drain(model: Model, operator: Operator) -> None:
    for _ in range(500):
        if not operator.open_gate():
            return
    raise Broken("the operator does not come to rest")


class TwoOperators(World):
    """The lease is lost without a word: two replicas act at once."""

    operators_at_once = 2


EXAMPLES = int(os.environ.get("TRIREME_MODEL_EXAMPLES", "60"))
CHECKS = settings(
    max_examples=EXAMPLES, stateful_step_count=60, print_blob=True,
    phases=[Phases.explicit, Phases.reuse, Phases.generate, Phases.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)  # fmt: skip
TestOneOperator = World.TestCase
TestOneOperator.settings = CHECKS
TestTwoOperators = TwoOperators.TestCase
TestTwoOperators.settings = CHECKS

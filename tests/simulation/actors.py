"""Who acts in the model: an operator with its own view of the API server, and the agent of each pod."""

from __future__ import annotations

import asyncio
import marshal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from trireme_api.protocol import (
    Action,
    AgentState,
    Assignment,
    CheckpointRef,
    EnergyReading,
    Failure,
    Hardware,
    Progress,
    RankReport,
    Report,
    Spent,
)  # fmt: skip
from trireme_operator.act.api import Json
from trireme_operator.controller import Controller
from trireme_operator.decide.actions import Note
from trireme_operator.decide.assignments import Crew
from trireme_operator.decide.gang import places
from trireme_operator.decide.pods import Images
from trireme_operator.decide.views import Job, Key, Limits
from trireme_operator.observe.desk import Desk
from trireme_operator.observe.leases import Leases, Renewal
from trireme_operator.observe.store import Store
from trireme_operator.queue import Queue

if TYPE_CHECKING:
    from model import Model

NAMESPACE = "sim"
IMAGES = Images("trainer", "agent", "https://coordinator", "PEM")
T = TypeVar("T")


def plain_copy(value: T) -> T:
    """A copy of JSON. Several times as fast as copy.deepcopy, which was half of what a simulated second cost."""
    copied: T = marshal.loads(marshal.dumps(value))
    return copied


@dataclass
class Agent:
    """PID 1 of one pod, obeying the protocol: attempts and actions only go forward."""

    job: str
    pod: str
    uid: str
    attempt: int = 0
    action: Action = Action.HOLD
    state: AgentState = AgentState.WAITING
    failure: Failure | None = None
    exits: list[int] = field(default_factory=list)
    assignment: Assignment | None = None
    step: int = 0
    resumed: int = 0
    saved: int | None = None
    joules: float = 0.0
    gone: bool = False
    frozen: bool = False
    """Its machine stands still: nothing is heard of it, and it hears nothing."""

    @property
    def ranks_alive(self) -> bool:
        return self.state in (AgentState.STARTING, AgentState.RUNNING, AgentState.STOPPING) and not self.gone

    @property
    def _tells(self) -> bool:
        """Of the newest checkpoint: while its ranks run, and when they have just saved."""
        return self.ranks_alive or (self.exits == [75] and not self.gone)

    def report(self, committed: int) -> Report:
        return Report(
            pod_uid=self.uid, attempt=self.attempt, state=self.state, failure=self.failure,
            ranks=[RankReport(local_rank=0, exit=self.exits[0] if self.exits else None)] if self.attempt else [],
            progress=Progress(step=self.step, total_steps=100, tokens_per_second=1.0) if self.step else None,
            checkpoint=CheckpointRef(committed, f"step-{committed}") if committed and self._tells else None,
            energy={"cpu": EnergyReading(self.joules, "declared")}, hardware=Hardware(self.joules / 100, 1),
            spent=self.spent() if self.assignment is not None and self.attempt == self.assignment.attempt else None,
        )  # fmt: skip

    def spent(self) -> Spent:
        """A second for each step, whatever the clock says: what agents tell need not fit."""
        done = self.step - self.resumed
        return Spent({"init": 2.0, "step": float(done)}, "step", self.resumed, self.step, self.saved, float(done))


class Operator:
    """One replica: what it knows is lost when it is killed."""

    def __init__(self, model: Model, name: str) -> None:
        self.name, self.model = name, model
        self.store, self.queue = Store(), Queue(clock=lambda: model.now)
        self.store.nodes = {}
        self.desk, self.leases = Desk(self.store), Leases()
        self.controller = Controller(
            self.store, self.queue, self.desk, View(model, self), IMAGES, clock=lambda: model.now,
            limits=Limits(gang_seconds=60.0, silent_seconds=15.0, shrink_seconds=10.0), grid=lambda: model.grid,
        )  # fmt: skip
        self.tasks: dict[Key, asyncio.Task[Any]] = {}
        self.gates: list[asyncio.Future[None]] = []
        self.inbox: list[tuple[str, str, Json]] = []
        """Watch events not delivered yet."""
        self.alive = True

    def answer(self, agent: Agent, report: Report) -> Assignment | None:
        """The coordinator's work."""
        key = NAMESPACE, agent.job
        self.store.hear(agent.uid, report, self.model.now)
        self.queue.add(key)
        job = self.store.jobs.get(key)
        pod = self.store.pods.get(agent.uid)
        if job is None or pod is None or pod.owner_uid != job.uid:
            return None
        return Crew(job, places(job, self.controller.observed(job))).assignment(agent.uid)

    def begin(self, key: Key) -> None:
        """Starts work on a key unless it is being worked on (as the queue sees to)."""
        if not self.alive or key in self.tasks:
            return
        work = self.controller.resync() if key[0] == "" else self.controller.settle(key)
        self.tasks[key] = self.model.loop.create_task(work)  # type: ignore[arg-type]
        self.model.spin()
        self._reap()

    def open_gate(self, which: int = 0) -> bool:
        """Lets one of the operator's calls go one step on."""
        gates = [gate for gate in self.gates if not gate.done()]
        if not gates:
            return False
        gates[which % len(gates)].set_result(None)
        self.model.spin()
        self._reap()
        return True

    def _reap(self) -> None:
        self.gates = [gate for gate in self.gates if not gate.done()]
        for key, task in list(self.tasks.items()):
            if task.done():
                del self.tasks[key]
                task.result()

    def kill(self) -> None:
        self.alive = False
        for task in self.tasks.values():
            task.cancel()
        self.model.spin()
        self.tasks.clear()
        self.model.operators.remove(self)

    def deliver(self, which: int = 0) -> bool:
        """One watch event, in any order."""
        if not self.inbox:
            return False
        kind, event, obj = self.inbox.pop(which % len(self.inbox))
        store, now = self.store, self.model.now
        key = None
        if kind == "job":
            key = NAMESPACE, obj["metadata"]["name"]
            if event == "DELETED":
                store.drop_job(key, obj["metadata"]["uid"], now)
            else:
                store.put_job(obj)
        elif kind == "pod":
            key = store.drop_pod(obj["metadata"]["uid"], now) if event == "DELETED" else store.put_pod(obj)
        else:
            store.put_node(self.model.nodes.get(obj["metadata"]["name"], obj), now)
        if key is not None:
            self.queue.add(key)
        return True

    def read_leases(self) -> None:
        """One sample of all kubelets' leases; those in `dead_kubelets` are renewed no more."""
        for i, node in enumerate(sorted(self.model.nodes)):
            if node not in self.model.dead_kubelets:
                self.model.renewed[node] = int(self.model.now + 3 * i) // 10
        beats = [Renewal(node, str(self.model.renewed.get(node)), 10.0) for node in sorted(self.model.nodes)]
        self.store.mark_stale(self.leases.sample(beats, self.model.now), self.model.now)

    def read_nodes(self) -> None:
        self.store.replace_nodes(list(self.model.nodes.values()), self.model.now)


class View:
    """The API server as one operator reaches it."""

    def __init__(self, model: Model, operator: Operator) -> None:
        self.model, self.operator = model, operator

    async def _gate(self) -> None:
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.operator.gates.append(gate)
        await gate

    async def get_job(self, key: Key) -> Json | None:
        await self._gate()
        return plain_copy(self.model.jobs.get(key[1]))

    async def list_jobs(self) -> tuple[list[Json], str]:
        await self._gate()
        return plain_copy(list(self.model.jobs.values())), str(self.model.version)

    async def list_pods(self, key: Key | None = None) -> tuple[list[Json], str]:
        await self._gate()
        found = [
            p for p in self.model.pods.values() if key is None or p["metadata"]["labels"]["trireme.dev/job"] == key[1]
        ]
        return plain_copy(found), str(self.model.version)

    async def patch_status(self, job: Job, status: Json) -> Json:
        await self._gate()
        written = self.model.write_status(job, status)
        await self._gate()
        return written

    async def create_pod(self, job: Job, manifest: Json) -> Json:
        await self._gate()
        created = self.model.create_pod(job, manifest)
        await self._gate()
        return created

    async def delete_pod(self, key: Key, name: str, uid: str, grace_seconds: int | None) -> Json | None:
        await self._gate()
        found = self.model.delete_pod(name, uid, by_operator=True)
        await self._gate()
        return found

    async def delete_job(self, job: Job) -> None:
        await self._gate()
        self.model.delete_job(job.name)
        await self._gate()

    async def note(self, job: Job, notes: Sequence[Note]) -> None:
        return None

    async def claim_exists(self, namespace: str, name: str) -> bool:
        return True

"""A model of everything around the operator: API server, scheduler, kubelets, nodes, agents, checkpoints, and a clock.

The operator in it is the real Controller with its Store, Desk and Crew. Every call it makes to the cluster stops at two
gates, before and after the write takes effect, and goes on only when the test says so: so calls of several operators
interleave in any order with everything else, and an operator may be killed at any gate.
"""

from __future__ import annotations

import asyncio
import marshal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from trireme_api.anytime import Stream
from trireme_api.job import API_VERSION, KIND, TERMINAL, Phase, TrainingJobStatus, pod_name
from trireme_api.protocol import (
    Action,
    AgentState,
    Assignment,
    Cause,
    CheckpointRef,
    EnergyReading,
    Failure,
    Hardware,
    Progress,
    RankReport,
    Report,
    Spent,
)  # fmt: skip
from trireme_api.recipe import Recipe
from trireme_api.replicas import Replicas
from trireme_operator.act.api import ApiError, Json
from trireme_operator.controller import Controller
from trireme_operator.decide.actions import Note
from trireme_operator.decide.assignments import Crew
from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.gang import places
from trireme_operator.decide.grid import Grid, Live
from trireme_operator.decide.pods import Images
from trireme_operator.decide.views import Job, Key, Limits
from trireme_operator.observe.desk import Desk
from trireme_operator.observe.leases import Leases, Renewal
from trireme_operator.observe.store import Store
from trireme_operator.queue import Queue

NAMESPACE = "sim"
GRACE_SECONDS = 10
IMAGES = Images("trainer", "agent", "https://coordinator", "PEM")
T = TypeVar("T")
ORDER = {Action.HOLD: 0, Action.RUN: 1, Action.SAVE_AND_HOLD: 2, Action.SAVE_AND_STOP: 3, Action.STOP: 4}


def _gang(status: TrainingJobStatus) -> list[tuple[int, int]]:
    """Slots with ranks and their pods, in the order of the node ranks."""
    return [(slot.index, slot.incarnation) for slot in status.slots if not slot.spare]


def _permits(wish: Replicas, size: int) -> bool:
    if wish.allowed:
        return size in wish.allowed and (wish.min or 1) <= size <= wish.desired
    return (wish.min or wish.desired) <= size <= wish.desired


def plain_copy(value: T) -> T:
    """A copy of JSON. Several times as fast as copy.deepcopy, which was half of what a simulated second cost."""
    copied: T = marshal.loads(marshal.dumps(value))
    return copied


class Broken(AssertionError):
    """An invariant does not hold."""


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


class Model:
    def __init__(self, nodes: int = 3, cpu: int = 2) -> None:
        self.loop = asyncio.new_event_loop()
        self.now = 1_800_000_000.0
        self.version = 0
        self.jobs: dict[str, Json] = {}
        self.pods: dict[str, Json] = {}
        """By name."""
        self.nodes: dict[str, Json] = {}
        self.agents: dict[str, Agent] = {}
        """By pod UID."""
        self.operators: list[Operator] = []
        self.committed: dict[str, int] = {}
        self.fence: dict[str, int] = {}
        self.writes: list[str] = []
        """Every write that changed something, for the question what was written when nothing happened."""
        self.arrivals: dict[str, int] = {}
        """The most mega-batches that a status was written under."""
        self.wishes: dict[str, list[Replicas]] = {}
        """Every spec.replicas that a status was written under."""
        self.grid = Grid()
        self.one_operator = True
        """Two that act at once may make a pod too many; its agent is told to stop, so its ranks never start."""
        self.lost: set[str] = set()
        """UIDs of pods whose node has been not ready since they were bound."""
        self.dead_kubelets: set[str] = set()
        self.renewed: dict[str, int] = {}
        """When each node's lease was last renewed, in tens of seconds."""
        self._uid = 0
        self._seen: dict[str, TrainingJobStatus] = {}
        for i in range(nodes):
            self.put_node(f"n{i}", cpu)

    # --- API server -------------------------------------------------------------------------------------------------

    def _next(self) -> str:
        self.version += 1
        return str(self.version)

    def shine(self, grams: float) -> None:
        """The grid of Germany has this intensity now."""
        self.grid = Grid(live={"DE": Live(grams, self.now, True, "the model")}, max_age_seconds=1e9)

    def new_uid(self) -> str:
        self._uid += 1
        return f"uid-{self._uid}"

    def emit(self, kind: str, event: str, obj: Json) -> None:
        for operator in self.operators:
            operator.inbox.append((kind, event, plain_copy(obj)))

    def put_node(self, name: str, cpu: int, ready: bool = True) -> None:
        self.nodes[name] = {
            "metadata": {"name": name, "labels": {}, "resourceVersion": self._next()},
            "spec": dict(self.nodes.get(name, {}).get("spec", {})),
            "status": {
                "allocatable": {"cpu": str(cpu), "pods": "10"},
                "conditions": [{"type": "Ready", "status": "True" if ready else "Unknown"}],
            },
        }
        if not ready:
            self.lost |= {p["metadata"]["uid"] for p in self.pods.values() if p["spec"].get("nodeName") == name}
        self.emit("node", "MODIFIED", self.nodes[name])

    def cordon(self, name: str, on: bool = True) -> None:
        node = self.nodes[name]
        node["spec"] = {"unschedulable": True} if on else {}
        node["metadata"]["resourceVersion"] = self._next()
        self.emit("node", "MODIFIED", node)

    def create_job(self, name: str, replicas: int | Json, cpu: int = 2, **spec: Any) -> None:
        self.jobs[name] = {
            "apiVersion": API_VERSION, "kind": KIND,
            "metadata": {
                "name": name, "namespace": NAMESPACE, "uid": self.new_uid(), "generation": 1,
                "resourceVersion": self._next(), "creationTimestamp": stamp(self.now),
            },
            "spec": {
                "replicas": {"desired": replicas} if isinstance(replicas, int) else replicas,
                "template": {"image": "i", "command": ["c"], "resources": {"requests": {"cpu": cpu}}},
                **spec,
            },
        }  # fmt: skip
        self.emit("job", "ADDED", self.jobs[name])

    def create_stream(self, name: str, replicas: int | Json, arrived: int, **spec: Any) -> None:
        """A job of 100 steps that learns from four mega-batches."""
        recipe = {
            "model": {"preset": "opt-tiny"}, "until": {"steps": 100}, "batch": {"tokens": 2560},
            "data": {"sources": [{"path": "pvc://stream/mega-{n}"}], "sequenceLength": 64},
            "anytime": {"megaBatches": 4, "arrived": arrived},
        }  # fmt: skip
        spec = {"checkpoint": {"uri": "pvc://c/d"}, **spec}
        self.create_job(name, replicas, recipe=recipe, template={"resources": {"requests": {"cpu": 2}}}, **spec)

    def stream(self, name: str) -> Stream | None:
        """As the job's newest spec has it."""
        spec = self.jobs[name]["spec"] if name in self.jobs else {}
        return Recipe.model_validate(spec["recipe"]).stream if "recipe" in spec else None

    def arrive(self, name: str, arrived: int) -> None:
        recipe = self.jobs[name]["spec"]["recipe"]
        self.edit_job(name, recipe={**recipe, "anytime": {**recipe["anytime"], "arrived": arrived}})

    def edit_job(self, name: str, **spec: Any) -> None:
        job = self.jobs[name]
        job["spec"].update(spec)
        job["metadata"]["generation"] += 1
        job["metadata"]["resourceVersion"] = self._next()
        self.emit("job", "MODIFIED", job)

    def delete_job(self, name: str) -> None:
        job = self.jobs.pop(name, None)
        if job is not None:
            self.writes.append(f"delete job {name}")
            job["metadata"]["resourceVersion"] = self._next()
            self._seen.pop(name, None)
            self.wishes.pop(name, None)
            self.arrivals.pop(name, None)
            self.emit("job", "DELETED", job)

    def write_status(self, job: Job, status: Json) -> Json:
        stored = self.jobs.get(job.name)
        if stored is None or stored["metadata"]["uid"] != job.uid:
            raise ApiError(404, "gone")
        if stored["metadata"]["resourceVersion"] != job.resource_version:
            raise ApiError(409, "changed", "Conflict")
        self.writes.append(f"status {job.name}: {status.get('phase')} {status.get('explanation')}")
        self._check_status(job.name, stored, status)
        stored["status"] = plain_copy(status)
        stored["metadata"]["resourceVersion"] = self._next()
        self.emit("job", "MODIFIED", stored)
        return plain_copy(stored)

    def create_pod(self, job: Job, manifest: Json) -> Json:
        name = manifest["metadata"]["name"]
        if name in self.pods:
            found = self.pods[name]
            if found["metadata"]["ownerReferences"][0]["uid"] != job.uid:
                raise ApiError(409, "taken")
            return plain_copy(found)
        self.writes.append(f"create {name}")
        pod = plain_copy(manifest)
        pod["metadata"] |= {
            "uid": self.new_uid(),
            "resourceVersion": self._next(),
            "creationTimestamp": stamp(self.now),
        }
        pod["status"] = {"phase": "Pending"}
        self.pods[name] = pod
        self.emit("pod", "ADDED", pod)
        self.check()
        return plain_copy(pod)

    def delete_pod(self, name: str, uid: str, by_operator: bool = False) -> Json | None:
        pod = self.pods.get(name)
        if pod is None or pod["metadata"]["uid"] != uid:
            return None
        if by_operator:
            self.writes.append(f"delete {name}")
            reference = pod["metadata"]["ownerReferences"][0]
            if reference["kind"] != KIND:
                raise Broken(f"I2: {name} is not ours")
        if not pod["spec"].get("nodeName"):
            self.remove_pod(name)
            return plain_copy(pod)
        if "deletionTimestamp" not in pod["metadata"]:
            pod["metadata"]["deletionTimestamp"] = stamp(self.now + GRACE_SECONDS)
            self.touch_pod(pod)
        return plain_copy(pod)

    def touch_pod(self, pod: Json) -> None:
        pod["metadata"]["resourceVersion"] = self._next()
        self.emit("pod", "MODIFIED", pod)

    def remove_pod(self, name: str) -> None:
        pod = self.pods.pop(name)
        pod["metadata"]["resourceVersion"] = self._next()
        agent = self.agents.get(pod["metadata"]["uid"])
        if agent is not None:
            agent.gone = True
        self.emit("pod", "DELETED", pod)

    # --- scheduler and kubelets -------------------------------------------------------------------------------------

    def cpu_left(self, node: str) -> float:
        taken = sum(
            float(p["spec"]["containers"][0]["resources"]["requests"]["cpu"])
            for p in self.pods.values()
            if p["spec"].get("nodeName") == node and p["status"]["phase"] not in ("Succeeded", "Failed")
        )
        return float(self.nodes[node]["status"]["allocatable"]["cpu"]) - taken

    def node_ready(self, name: str) -> bool:
        node = self.nodes.get(name)
        return node is not None and node["status"]["conditions"][0]["status"] == "True"

    def schedule(self, pod: Json) -> bool:
        need = float(pod["spec"]["containers"][0]["resources"]["requests"]["cpu"])
        tolerated = any(t["key"] == "node.kubernetes.io/unschedulable" for t in pod["spec"].get("tolerations") or [])
        for node in sorted(self.nodes):
            closed = self.nodes[node]["spec"].get("unschedulable") and not tolerated
            if self.node_ready(node) and not closed and self.cpu_left(node) >= need:
                pod["spec"]["nodeName"] = node
                self.touch_pod(pod)
                return True
        return False

    def start(self, pod: Json) -> None:
        uid = pod["metadata"]["uid"]
        pod["status"] |= {"phase": "Running", "podIP": f"10.0.0.{uid[4:]}"}
        self.agents[uid] = Agent(pod["metadata"]["labels"]["trireme.dev/job"], pod["metadata"]["name"], uid)
        self.touch_pod(pod)

    def end(self, pod: Json, code: int) -> None:
        agent = self.agents.get(pod["metadata"]["uid"])
        if agent is not None:
            agent.gone = True
        pod["status"]["phase"] = "Succeeded" if code == 0 else "Failed"
        pod["status"]["containerStatuses"] = [
            {"state": {"terminated": {"exitCode": code, "finishedAt": stamp(self.now)}}}
        ]
        self.touch_pod(pod)

    def kubelet_step(self, pod: Json) -> bool:
        """What scheduler or kubelet would do next with this pod; False: nothing."""
        node = pod["spec"].get("nodeName")
        if node is None:
            return self.schedule(pod)
        if not self.node_ready(node):
            if node not in self.nodes:
                self.remove_pod(pod["metadata"]["name"])  # the pod garbage collector
                return True
            return False
        leaves = seconds(pod["metadata"].get("deletionTimestamp"))
        if leaves is not None:
            if self.now < leaves - GRACE_SECONDS + 3 and pod["status"]["phase"] == "Running":
                self.terminate(pod)
                return False  # it saves first
            self.remove_pod(pod["metadata"]["name"])
            return True
        if pod["status"]["phase"] == "Pending":
            self.start(pod)
            return True
        return False

    def terminate(self, pod: Json) -> None:
        """SIGTERM: the ranks of a whole gang agree on a step, save and end, wherever they are."""
        asked = self.agents.get(pod["metadata"]["uid"])
        if asked is None or not asked.ranks_alive or asked.assignment is None:
            return
        gang = [a for a in self.agents.values() if a.job == asked.job and a.attempt == asked.attempt and a.ranks_alive]
        if any(a.frozen for a in gang) or len(gang) < asked.assignment.world_size:
            return  # nobody to agree with
        for agent in gang:
            self.commit(agent)
        for agent in gang:
            agent.state, agent.exits = AgentState.EXITED, [75]

    # --- agents -----------------------------------------------------------------------------------------------------

    def poll(self, agent: Agent, operator: Operator) -> None:
        """One exchange with a coordinator, and what the agent makes of the answer."""
        if agent.gone or agent.frozen or not operator.alive:
            return
        answer = operator.answer(agent, agent.report(self.committed.get(agent.job, 0)))
        if answer is not None:
            self.obey(agent, answer)

    def obey(self, agent: Agent, told: Assignment) -> None:
        if told.attempt < agent.attempt or (told.attempt == agent.attempt and ORDER[told.action] < ORDER[agent.action]):
            return
        if told.attempt > agent.attempt:
            agent.attempt, agent.state, agent.failure, agent.exits = told.attempt, AgentState.WAITING, None, []
            agent.action = Action.HOLD
        if told.action == Action.RUN and agent.action == Action.HOLD:
            self._begin(agent, told)
        elif told.action in (Action.SAVE_AND_HOLD, Action.SAVE_AND_STOP) and agent.action != told.action:
            if agent.ranks_alive:
                self.commit(agent)
                agent.exits = [75]
                agent.state = AgentState.EXITED
            elif told.action == Action.SAVE_AND_STOP:
                agent.state = AgentState.EXITED
        elif told.action == Action.STOP:
            agent.state = AgentState.EXITED
            pod = self.pods.get(agent.pod)
            if pod is not None and pod["metadata"]["uid"] == agent.uid and pod["status"]["phase"] == "Running":
                self.end(pod, 0 if agent.exits == [0] else 1)
        agent.action = told.action

    def _begin(self, agent: Agent, told: Assignment) -> None:
        """Ranks start: the barrier must have been kept."""
        agent.assignment, agent.state = told, AgentState.RUNNING
        if told.spare:
            raise Broken(f"I8: {agent.pod} is a spare and starts ranks")
        if not 0 <= told.node_rank < told.world_size:
            raise Broken(f"{agent.pod} has node rank {told.node_rank} of {told.world_size}")
        status = TrainingJobStatus.model_validate((self.jobs.get(agent.job) or {}).get("status") or {})
        if agent.job in self.jobs and status.attempt == told.attempt and status.phase not in TERMINAL:
            for slot in [slot for slot in status.slots if not slot.spare]:
                other = self.agents.get(slot.pod_uid or "")
                if slot.pod_uid is None or (other is not None and not other.gone and other.attempt < told.attempt):
                    raise Broken(
                        f"barrier: {agent.pod} starts attempt {told.attempt} before slot {slot.index} holds it"
                    )
        for other in self.agents.values():
            if other.job == agent.job and other is not agent and other.ranks_alive and other.attempt == agent.attempt:
                assert other.assignment is not None
                if other.assignment.node_rank == told.node_rank:
                    raise Broken(f"I1: {agent.pod} and {other.pod} both run node rank {told.node_rank}")
                if (other.assignment.master_address, other.assignment.world_size) != (
                    told.master_address,
                    told.world_size,
                ):
                    raise Broken("ranks of one attempt disagree on master or world size")
        self.fence[agent.job] = max(self.fence.get(agent.job, 0), agent.attempt)
        resume = told.resume.step if told.resume else 0
        if resume > self.committed.get(agent.job, 0):
            raise Broken(f"I4: resumes from step {resume}, committed is {self.committed.get(agent.job, 0)}")
        agent.step = agent.resumed = self.committed.get(agent.job, 0)
        agent.saved = None
        stream = self.stream(agent.job)
        if stream is not None and stream.begins(agent.step) and stream.needed(agent.step) > stream.spec.arrived:
            self._end_session(agent)  # its ranks find no new directory

    def _end_session(self, agent: Agent) -> None:
        agent.state, agent.exits = AgentState.EXITED, [75]

    def commit(self, agent: Agent) -> None:
        """A checkpoint of a running rank; refused for an attempt that is not the newest that ever started."""
        if agent.attempt == self.fence.get(agent.job):
            self.committed[agent.job] = max(self.committed.get(agent.job, 0), agent.step)
            agent.saved = agent.step

    def train(self, agent: Agent, steps: int = 1) -> None:
        if agent.state == AgentState.RUNNING and not agent.gone:
            agent.step += steps
            agent.joules += 100.0 * steps
            stream = self.stream(agent.job)
            if stream is not None and agent.step >= (end := stream.at(agent.resumed).end_step):
                agent.step = end
                if end < stream.total_steps:
                    self.commit(agent)
                    self._end_session(agent)

    def rank_fails(self, agent: Agent, cause: Cause, code: int) -> None:
        if agent.ranks_alive:
            agent.state, agent.exits = AgentState.EXITED, [code]
            agent.failure = Failure(cause, f"rank ended with {code}", rank=0, exit=code)

    def rank_done(self, agent: Agent) -> None:
        if agent.ranks_alive:
            agent.state, agent.exits = AgentState.EXITED, [0]

    # --- invariants -------------------------------------------------------------------------------------------------

    def _check_status(self, name: str, stored: Json, new: Json) -> None:
        """Between two statuses of one job, whoever writes them."""
        before = self._seen.get(name, TrainingJobStatus())
        after = TrainingJobStatus.model_validate(new)
        if before.phase in TERMINAL and (after.phase, after.attempt) != (before.phase, before.attempt):
            raise Broken(f"I5: {before.phase} became {after.phase}")
        if after.attempt < before.attempt or after.attempt > before.attempt + 1:
            raise Broken(f"I3: attempt {before.attempt} became {after.attempt}")
        for counter in ("process", "pod", "gang"):
            if getattr(after.restarts, counter) < getattr(before.restarts, counter):
                raise Broken(f"I3: restarts.{counter} fell")
        restarts = after.restarts.process + after.restarts.pod + after.restarts.gang
        risen = restarts - before.restarts.process - before.restarts.pod - before.restarts.gang
        if risen not in (0, 1) or sum(after.restarts.by_cause.values()) != restarts:
            raise Broken("I7: a failure was not counted exactly once")
        if risen and after.attempt != before.attempt + 1:
            raise Broken("I7: a restart without a new attempt")
        old, fresh = before.resume_from, after.resume_from
        if old is not None and after.attempt > before.attempt and (fresh is None or fresh.step < old.step):
            raise Broken("I4: the resume step fell")
        if after.energy.joules < before.energy.joules:
            raise Broken("energy fell")
        burnt = sum(agent.joules for agent in self.agents.values() if agent.job == name)
        if after.energy.joules > burnt + 1:
            raise Broken(f"energy counted twice: {after.energy.joules} of {burnt}")
        rows = [*([after.energy.older] if after.energy.older else []), *after.energy.attempts]
        if abs(sum(sum(row.joules.values()) for row in rows) - after.energy.joules) > 1:
            raise Broken("energy: the attempts' rows are not the sum")
        if sum(row.pod_seconds for row in rows) > burnt / 100 + 1:
            raise Broken("energy: hours of hardware counted twice")
        if after.carbon_hold.reason is not None and after.phase in (Phase.STARTING, Phase.RUNNING, Phase.RECOVERING):
            raise Broken(f"carbon: a held job is {after.phase}")
        wishes = self.wishes.setdefault(name, [])
        wishes.append(Replicas.model_validate(stored["spec"]["replicas"]))
        gang, spares = _gang(after), [slot for slot in after.slots if slot.spare]
        if gang and not any(_permits(wish, len(gang)) for wish in wishes):
            raise Broken(f"I6: a gang of {len(gang)}, which no spec permitted")
        if len(after.slots) > max(wish.desired + wish.spares for wish in wishes):
            raise Broken(f"I6: {len(gang)} slots and {len(spares)} spares are more than was ever asked for")
        if after.attempt == before.attempt and gang and _gang(before) and gang != _gang(before):
            raise Broken(f"I8: attempt {after.attempt} was {_gang(before)} and became {gang}")
        if after.attempt > before.attempt and len(gang) != len(_gang(before)) and _gang(before) and gang and risen:
            raise Broken("I8: a restart changed the size")
        self._check_stream(name, before, after)
        idle = after.phase in (Phase.PENDING, Phase.SUSPENDED, Phase.WAITING)
        if idle and (after.slots or after.admitted_spec is not None):
            raise Broken(f"I6: a job that is {after.phase} keeps its slots and old spec")
        self._check_ledger(before, after)
        self._seen[name] = after

    def _check_stream(self, name: str, before: TrainingJobStatus, after: TrainingJobStatus) -> None:
        stream = self.stream(name)
        if stream is None:
            return
        arrived = self.arrivals[name] = max(self.arrivals.get(name, 0), stream.spec.arrived)
        step = after.last_checkpoint.step if after.last_checkpoint else 0
        if after.slots and not before.slots and stream.needed(step) > arrived:
            raise Broken(f"I9: takes nodes at step {step} with {arrived} mega-batches")
        if "found no mega-batch" in after.explanation:
            raise Broken("I9: ends for data that it had been told of rightly")
        if after.stream is not None and before.stream is not None:
            if after.stream.trained < before.stream.trained:
                raise Broken("I9: mega-batches that were trained on are not any more")
            if after.stream.waited_seconds < before.stream.waited_seconds:
                raise Broken("I9: time waited for data fell")

    def _check_ledger(self, before: TrainingJobStatus, after: TrainingJobStatus) -> None:
        """Every second since the start is in exactly one state, whoever wrote them down; none comes or goes."""
        if after.goodput is None:
            if after.start_time is not None:
                raise Broken("goodput: a job that began has no ledger")
            return
        booked = round(1000 * sum(after.goodput.seconds.values()))
        passed = round(1000 * ((seconds(after.goodput.since) or 0.0) - (seconds(after.start_time) or 0.0)))
        if booked != passed:
            raise Broken(f"goodput: {booked} ms booked of {passed}: {after.goodput.seconds}")
        old = before.goodput
        if after.phase != Phase.SUSPENDING and (after.goodput.state == "running") != (after.phase == Phase.RUNNING):
            raise Broken(f"goodput: {after.goodput.state} in phase {after.phase}")
        for state in ("queued", "pulling", "suspended", "waiting", "lost"):
            if old is not None and after.goodput.seconds.get(state, 0.0) < old.seconds.get(state, 0.0):
                raise Broken(f"goodput: time in {state} fell")
        if after.goodput.lost_steps < (old.lost_steps if old is not None else 0):
            raise Broken("goodput: lost steps were found again")

    def check(self) -> None:
        """At any moment."""
        one_operator = self.one_operator
        for name, job in self.jobs.items():
            status = TrainingJobStatus.model_validate(job.get("status") or {})
            uid = job["metadata"]["uid"]
            mine = [p for p in self.pods.values() if p["metadata"]["ownerReferences"][0]["uid"] == uid]
            for index in {p["metadata"]["labels"]["trireme.dev/slot"] for p in mine}:
                live = [
                    p["metadata"]["name"]
                    for p in mine
                    if p["metadata"]["labels"]["trireme.dev/slot"] == index and self._live(p)
                ]
                if one_operator and len(live) > 1:
                    raise Broken(f"I1: two live pods of slot {index}: {live}")
            wanted = {pod_name(name, slot) for slot in status.slots}
            if one_operator and status.phase == Phase.PENDING and any(p["metadata"]["name"] in wanted for p in mine):
                raise Broken("a waiting job has pods")
        running: dict[tuple[str, int], int] = {}
        for agent in self.agents.values():
            if agent.ranks_alive and agent.assignment is not None:
                place = agent.job, agent.assignment.node_rank
                if agent.attempt == self.fence.get(agent.job) and self._pod_live(agent):
                    running[place] = running.get(place, 0) + 1
        if any(count > 1 for count in running.values()):
            raise Broken(f"I1: two writers of one node rank in the newest attempt: {running}")

    def _live(self, pod: Json) -> bool:
        if pod["status"]["phase"] in ("Succeeded", "Failed"):
            return False
        if pod["metadata"]["uid"] in self.lost:
            return False  # its node was away once: what still runs there is held off by its attempt number
        deletion = pod["metadata"].get("deletionTimestamp")
        return deletion is None or deletion > stamp(self.now - 30)

    def _pod_live(self, agent: Agent) -> bool:
        pod = self.pods.get(agent.pod)
        return pod is not None and pod["metadata"]["uid"] == agent.uid and self._live(pod)

    # --- operators --------------------------------------------------------------------------------------------------

    def spin(self) -> None:
        """Lets tasks run until all of them stand at a gate or are done."""

        async def turns() -> None:
            for _ in range(6):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def new_operator(self, name: str) -> Operator:
        operator = Operator(self, name)
        self.operators.append(operator)
        self.begin(operator, ("", "resync"))
        return operator

    def begin(self, operator: Operator, key: Key) -> None:
        """Starts work on a key unless it is being worked on (as the queue sees to)."""
        if not operator.alive or key in operator.tasks:
            return
        work = operator.controller.resync() if key[0] == "" else operator.controller.settle(key)
        operator.tasks[key] = self.loop.create_task(work)  # type: ignore[arg-type]
        self.spin()
        self._reap(operator)

    def open_gate(self, operator: Operator, which: int = 0) -> bool:
        """Lets one of the operator's calls go one step on."""
        gates = [gate for gate in operator.gates if not gate.done()]
        if not gates:
            return False
        gates[which % len(gates)].set_result(None)
        self.spin()
        self._reap(operator)
        return True

    def _reap(self, operator: Operator) -> None:
        operator.gates = [gate for gate in operator.gates if not gate.done()]
        for key, task in list(operator.tasks.items()):
            if task.done():
                del operator.tasks[key]
                task.result()

    def kill(self, operator: Operator) -> None:
        operator.alive = False
        for task in operator.tasks.values():
            task.cancel()
        self.spin()
        operator.tasks.clear()
        self.operators.remove(operator)

    def deliver(self, operator: Operator, which: int = 0) -> bool:
        """One watch event, in any order."""
        if not operator.inbox:
            return False
        kind, event, obj = operator.inbox.pop(which % len(operator.inbox))
        store, now = operator.store, self.now
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
            store.put_node(self.nodes.get(obj["metadata"]["name"], obj), now)
        if key is not None:
            operator.queue.add(key)
        return True

    def read_leases(self, operator: Operator) -> None:
        """One sample of all kubelets' leases; those in `dead_kubelets` are renewed no more."""
        for i, node in enumerate(sorted(self.nodes)):
            if node not in self.dead_kubelets:
                self.renewed[node] = int(self.now + 3 * i) // 10
        beats = [Renewal(node, str(self.renewed.get(node)), 10.0) for node in sorted(self.nodes)]
        operator.store.mark_stale(operator.leases.sample(beats, self.now), self.now)

    def read_nodes(self, operator: Operator) -> None:
        operator.store.replace_nodes(list(self.nodes.values()), self.now)

    def close(self) -> None:
        for operator in list(self.operators):
            self.kill(operator)
        self.loop.close()


__all__ = ["Agent", "Broken", "Model", "Operator", "replace"]

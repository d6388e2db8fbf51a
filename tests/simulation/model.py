"""A model of everything around the operator: API server, scheduler, kubelets, nodes, agents, checkpoints, and a clock.

The operator in it is the real Controller with its Store, Desk and Crew. Every call it makes to the cluster stops at two
gates, before and after the write takes effect, and goes on only when the test says so: so calls of several operators
interleave in any order with everything else, and an operator may be killed at any gate.
"""

from __future__ import annotations

import asyncio
from typing import Any

from actors import NAMESPACE, Agent, Operator, plain_copy
from invariants import Broken, Invariants
from trireme_api.anytime import Stream
from trireme_api.job import API_VERSION, KIND, TERMINAL, TrainingJobStatus
from trireme_api.protocol import Action, AgentState, Assignment, Cause, Failure
from trireme_api.recipe import Recipe
from trireme_operator.act.api import ApiError, Json
from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.grid import Grid, Live
from trireme_operator.decide.views import Job

GRACE_SECONDS = 10
ORDER = {Action.HOLD: 0, Action.RUN: 1, Action.SAVE_AND_HOLD: 2, Action.SAVE_AND_STOP: 3, Action.STOP: 4}


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
        self.grid = Grid()
        self.one_operator = True
        """Two that act at once may make a pod too many; its agent is told to stop, so its ranks never start."""
        self.lost: set[str] = set()
        """UIDs of pods whose node has been not ready since they were bound."""
        self.dead_kubelets: set[str] = set()
        self.renewed: dict[str, int] = {}
        """When each node's lease was last renewed, in tens of seconds."""
        self._uid = 0
        self.must = Invariants(self)
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
            self.must.forget(name)
            self.emit("job", "DELETED", job)

    def write_status(self, job: Job, status: Json) -> Json:
        stored = self.jobs.get(job.name)
        if stored is None or stored["metadata"]["uid"] != job.uid:
            raise ApiError(404, "gone")
        if stored["metadata"]["resourceVersion"] != job.resource_version:
            raise ApiError(409, "changed", "Conflict")
        self.writes.append(f"status {job.name}: {status.get('phase')} {status.get('explanation')}")
        self.must.status(job.name, stored, status)
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
        self.must.moment()
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
        operator.begin(("", "resync"))
        return operator

    def close(self) -> None:
        for operator in list(self.operators):
            operator.kill()
        self.loop.close()

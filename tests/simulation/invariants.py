"""What must hold whatever happens: I1 to I9, the books of energy and of goodput, and streams of mega-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trireme_api.job import TERMINAL, Phase, TrainingJobStatus, pod_name
from trireme_api.replicas import Replicas
from trireme_operator.act.api import Json
from trireme_operator.decide.clock import seconds, stamp

if TYPE_CHECKING:
    from actors import Agent
    from model import Model


def _gang(status: TrainingJobStatus) -> list[tuple[int, int]]:
    """Slots with ranks and their pods, in the order of the node ranks."""
    return [(slot.index, slot.incarnation) for slot in status.slots if not slot.spare]


def _permits(wish: Replicas, size: int) -> bool:
    if wish.allowed:
        return size in wish.allowed and (wish.min or 1) <= size <= wish.desired
    return (wish.min or wish.desired) <= size <= wish.desired


class Broken(AssertionError):
    """An invariant does not hold."""


class Invariants:
    """Remembers what was written of each job."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._seen: dict[str, TrainingJobStatus] = {}
        self.arrivals: dict[str, int] = {}
        """The most mega-batches that a status was written under."""
        self.wishes: dict[str, list[Replicas]] = {}
        """Every spec.replicas that a status was written under."""

    def forget(self, name: str) -> None:
        """The job is gone."""
        for known in (self._seen, self.wishes, self.arrivals):
            known.pop(name, None)

    def status(self, name: str, stored: Json, new: Json) -> None:
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
        burnt = sum(agent.joules for agent in self._model.agents.values() if agent.job == name)
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
        stream = self._model.stream(name)
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

    def moment(self) -> None:
        """At any moment."""
        one_operator = self._model.one_operator
        for name, job in self._model.jobs.items():
            status = TrainingJobStatus.model_validate(job.get("status") or {})
            uid = job["metadata"]["uid"]
            mine = [p for p in self._model.pods.values() if p["metadata"]["ownerReferences"][0]["uid"] == uid]
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
        for agent in self._model.agents.values():
            if agent.ranks_alive and agent.assignment is not None:
                place = agent.job, agent.assignment.node_rank
                if agent.attempt == self._model.fence.get(agent.job) and self._pod_live(agent):
                    running[place] = running.get(place, 0) + 1
        if any(count > 1 for count in running.values()):
            raise Broken(f"I1: two writers of one node rank in the newest attempt: {running}")

    def _live(self, pod: Json) -> bool:
        if pod["status"]["phase"] in ("Succeeded", "Failed"):
            return False
        if pod["metadata"]["uid"] in self._model.lost:
            return False  # its node was away once: what still runs there is held off by its attempt number
        deletion = pod["metadata"].get("deletionTimestamp")
        return deletion is None or deletion > stamp(self._model.now - 30)

    def _pod_live(self, agent: Agent) -> bool:
        pod = self._model.pods.get(agent.pod)
        return pod is not None and pod["metadata"]["uid"] == agent.uid and self._live(pod)

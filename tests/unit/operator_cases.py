"""Jobs, pods and reports for the tests of the operator's pure parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trireme_api.job import TrainingJobStatus, pod_name
from trireme_api.protocol import AgentState, Cause, Failure, RankReport, Report
from trireme_operator.controller import plain_status
from trireme_operator.decide.actions import Decision
from trireme_operator.decide.grid import Grid
from trireme_operator.decide.reconcile import reconcile
from trireme_operator.decide.views import Ended, Heard, Job, Limits, Node, Observed, Pod, Verdict, job_of

NOW = 1_800_000_000.0
FITS = Verdict(True)
SCRIPT = {"image": "i", "command": ["c"], "resources": {"requests": {"cpu": 1}}}


def manifest(name: str = "job", replicas: int = 2, status: Any = None, **spec: Any) -> dict[str, Any]:
    obj: dict[str, Any] = {
        "apiVersion": "trireme.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {
            "name": name, "namespace": "ns", "uid": "uid", "generation": 1, "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"replicas": {"desired": replicas}, "template": SCRIPT, **spec},
    }  # fmt: skip
    if status is not None:
        obj["status"] = plain_status(status)
    return obj


def pod(job: str, slot: int, incarnation: int = 1, **fields: Any) -> Pod:
    known = {
        "namespace": "ns", "name": f"{job}-{slot}-{incarnation}", "uid": f"pod-{slot}-{incarnation}", "owner_name": job,
        "owner_uid": "uid", "slot": slot, "incarnation": incarnation, "phase": "Running", "ip": f"10.0.0.{slot + 1}",
        "node": f"n{slot}",
    }  # fmt: skip
    return Pod(**{**known, **fields})


def heard(uid: str, attempt: int, state: AgentState, at: float = NOW, **fields: Any) -> Heard:
    return Heard(Report(uid, attempt, state, **fields), at, at)


def failure(cause: Cause = Cause.UNKNOWN, **fields: Any) -> Failure:
    return Failure(cause, fields.pop("message", "it broke"), **fields)


def ended(code: int, **fields: Any) -> Ended:
    return Ended(code, **fields)


class Scene:
    """One job and its world, taken forward call by call as the controller would."""

    def __init__(self, **spec: Any) -> None:
        self.obj = manifest(**spec)
        self.now = NOW
        self.pods: dict[str, Pod] = {}
        self.heard: dict[str, Heard] = {}
        self.nodes: dict[str, Node] | None = None
        self.admission: Verdict | None = FITS
        self.claims: tuple[str, ...] = ()
        self.error = ""
        self.limits = Limits()
        self.grid = Grid()
        self.notes: list[str] = []

    @property
    def job(self) -> Job:
        return job_of(self.obj)

    @property
    def status(self) -> TrainingJobStatus:
        return self.job.status

    def seen(self) -> Observed:
        return Observed(
            tuple(self.pods.values()),
            self.nodes,
            dict(self.heard),
            self.admission,
            self.claims,
            self.error,
            self.limits,
            self.grid,
        )

    def decide(self) -> Decision:
        """One decision; its status is written, its actions are not carried out."""
        decision = reconcile(self.job, self.seen(), self.now)
        if decision.status is not None:
            self.obj = {**self.obj, "status": plain_status(decision.status)}
            self.notes += [note.reason for note in decision.notes]
        return decision

    def settle(self) -> list[Decision]:
        """Decisions until no status is written any more and no cause is awaited."""
        found = [self.decide()]
        while found[-1].status is not None or (found[-1].requeue_after or 99) <= self.limits.settle_seconds:
            self.now += 1.0
            found.append(self.decide())
            assert len(found) < 20, "reconcile does not come to rest"
        return found

    def edit(self, **spec: Any) -> None:
        metadata = {**self.obj["metadata"], "generation": self.obj["metadata"]["generation"] + 1}
        self.obj = {**self.obj, "metadata": metadata, "spec": {**self.obj["spec"], **spec}}

    def create_all(self) -> None:
        for slot in self.status.slots:
            if slot.pod_uid is None:
                made = pod(self.job.name, slot.index, slot.incarnation)
                assert made.name == pod_name(self.job.name, slot)
                self.pods[made.uid] = made

    def hear_all(self, state: AgentState, **fields: Any) -> None:
        for slot in self.status.slots:
            uid = f"pod-{slot.index}-{slot.incarnation}"
            if uid in self.pods:
                self.heard[uid] = heard(uid, self.status.attempt, state, self.now, **fields)

    def change_pod(self, uid: str, **fields: Any) -> None:
        self.pods[uid] = replace(self.pods[uid], **fields)

    def run(self) -> Scene:
        """Brings the job to Running."""
        self.settle()
        self.create_all()
        self.settle()
        self.hear_all(AgentState.RUNNING, ranks=[RankReport(0)])
        self.settle()
        assert self.status.phase == "Running", self.status.explanation
        self.now += 10
        return self

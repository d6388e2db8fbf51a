"""What a TrainingJob is doing, why, what broke last, what is left, what happens next. Pure: from the object alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trireme_api.job import (
    InvalidSpecs,
    LastFailure,
    Phase,
    TrainingJobSpec,
    TrainingJobStatus,
    parse_spec,
)
from trireme_operator.decide.clock import duration, seconds

Rows = list[tuple[str, str]]
_REMEDIES = {
    "NotRetryable": "trying again cannot help: mend what the message names, then create the job anew; it resumes from "
    "its newest checkpoint",
    "FailureRule": "a rule of spec.failurePolicy.rules ended it",
    "NoProgress": "find the cause; a job of the same checkpoint.uri goes on from its newest checkpoint",
    "BudgetExhausted": "find the cause, or allow more in spec.failurePolicy.ladder; a job of the same checkpoint.uri "
    "goes on from its newest checkpoint",
    "DeadlineExceeded": "spec.runPolicy.activeDeadlineSeconds is over; a job of the same checkpoint.uri goes on",
    "StartupDeadlineExceeded": "spec.runPolicy.startupDeadlineSeconds is over; see what the start waited for",
}
_WAITS = {
    "LargerThanCluster": "nothing, until spec.replicas or template.resources are lowered or nodes are added",
    "DirtyGrid": "starts when the grid is clean enough for spec.carbonPolicy, at latest by its deadline",
    "CarbonBudgetSpent": "nothing, until the carbon budget in spec.carbonPolicy is raised",
    "ClaimNotFound": "starts when the claim is there; looked for every 10 s",
    "WaitsForRoom": "starts when the whole gang fits at once; nothing is created before",
    "Queued": "starts when those before it have been served",
    "NoNodeReady": "starts when such a node is ready",
}
_HELD = {
    "DirtyGrid": "waits until the grid is clean enough for spec.carbonPolicy, at latest until its deadline",
    "CarbonBudgetSpent": "nothing, until the carbon budget in spec.carbonPolicy is raised",
}
"""Suspended by the operator, not by spec.runPolicy.suspend."""


@dataclass(frozen=True)
class JobView:
    """A TrainingJob as people ask about it. `spec` is None where it cannot be read."""

    name: str
    namespace: str
    spec: TrainingJobSpec | None
    status: TrainingJobStatus
    created: float | None
    problems: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, obj: Mapping[str, Any]) -> JobView:
        metadata = obj["metadata"]
        spec: TrainingJobSpec | None = None
        problems: tuple[str, ...] = ()
        try:
            spec = parse_spec(obj.get("spec"))
        except InvalidSpecs as error:
            problems = tuple(str(item) for item in error.found)
        try:
            status = TrainingJobStatus.model_validate(obj.get("status") or {})
        except ValueError:  # of another version; what can be read is shown by kubectl
            status = TrainingJobStatus(explanation="the status cannot be read by this version of trireme")
        return cls(
            metadata["name"], metadata["namespace"], spec, status, seconds(metadata.get("creationTimestamp")),
            problems, metadata.get("annotations") or {},
        )  # fmt: skip

    @property
    def phase(self) -> str:
        return self.status.phase.value if self.status.phase is not None else "Unseen"


@dataclass(frozen=True)
class Section:
    title: str
    rows: Rows


def explain(job: JobView, now: float) -> list[Section]:
    found = [
        Section("", _doing(job, now)),
        Section("next", [("", line) for line in next_steps(job, now)]),
        Section("last failure", _failure(job.status.last_failure, now)),
        Section("restarts", _restarts(job, now)),
        Section("budgets left", budgets(job)),
        Section("nodes", _nodes(job, now)),
        Section("decisions", _decisions(job, now)),
    ]
    return [section for section in found if section.rows]


def _doing(job: JobView, now: float) -> Rows:
    status, progress = job.status, job.status.progress
    if status.phase is None:
        why = status.explanation or "the operator has not seen it yet; is it running, and does it watch this namespace?"
        return [("phase", "none yet"), ("why", why)]
    reason = status.reason or next((c.reason for c in status.conditions if c.message == status.explanation), "")
    rows = [("phase", status.phase.value + (f" ({reason})" if reason else "")), ("why", status.explanation)]
    rows += [("problem", text) for text in job.problems if text not in status.explanation]
    rows += [
        ("note", f"{c.type.value}: {c.message}")
        for c in status.conditions
        if c.status == "True" and c.message and c.message != status.explanation
    ]
    if status.attempt:
        began = seconds(status.attempt_started_at)
        rows.append(("attempt", f"{status.attempt}, {status.node_summary} nodes{_ago(began, now, ', since ')}"))
    if progress is not None:
        rows.append(("progress", progress_line(job)))
    if progress is not None and progress.remaining and status.phase == Phase.RUNNING:
        rows.append(("ends", f"in about {progress.remaining}, at {progress.eta}, if nothing breaks"))
    if status.last_checkpoint is not None:
        seen = _ago(seconds(status.last_checkpoint.seen_at), now, ", ", " ago")
        rows.append(("checkpoint", f"step {status.last_checkpoint.step}{seen}: {status.last_checkpoint.path}"))
    if status.goodput is not None and status.goodput.summary:
        rows.append(("goodput", f"{status.goodput.summary}; {status.goodput.lost_steps} steps lost"))
    if status.carbon.summary:
        rows.append(("carbon", f"{status.carbon.summary} CO2e, energy {status.energy.source}"))
    if status.updated_at:
        rows.append(("as of", _ago(seconds(status.updated_at), now, "", " ago")))
    return rows


def progress_line(job: JobView) -> str:
    progress = job.status.progress
    if progress is None:
        return ""
    parts = [f"step {progress.step}"]
    if progress.total_steps:
        parts = [f"step {progress.step} of {progress.total_steps} ({progress.step / progress.total_steps:.1%})"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:g}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    if progress.tflops is not None:
        parts.append(f"{progress.tflops:.3g} TFLOP/s per device")
    if progress.mfu is not None:
        parts.append(f"MFU {progress.mfu:.1%}")
    return ", ".join(parts)


def next_steps(job: JobView, now: float) -> list[str]:
    """What will happen without anybody doing anything, and what one can do where nothing will."""
    status = job.status
    phase = status.phase
    if phase is None:
        return []
    if phase == Phase.INVALID:
        return ["it starts by itself once the named field is mended: kubectl edit tj " + job.name]
    if phase == Phase.PENDING:
        return [_waiting(status, now)]
    if phase == Phase.SUSPENDED and status.reason in _HELD:
        return [f"{_HELD[status.reason]}; it then goes on exactly where it saved"]
    if phase == Phase.SUSPENDED:
        step = status.last_checkpoint.step if status.last_checkpoint else None
        where = f"from step {step}" if step is not None else "from the start"
        return [f"nothing, until spec.runPolicy.suspend is false again; it then continues {where}"]
    if phase == Phase.SUSPENDING:
        return ["when every rank has saved and stopped, the pods are removed and the nodes are free"]
    if phase in (Phase.STARTING, Phase.RECOVERING):
        return [_coming_up(job, now), *_on_failure(job)]
    if phase == Phase.RUNNING:
        return [*_resizing(status), *_on_failure(job), *_deadline(job, now)]
    return _after_the_end(job)


def _waiting(status: TrainingJobStatus, now: float) -> str:
    again = seconds(status.queueing.not_before)
    if again is not None and again > now:
        return f"queues again in {duration(again - now)}, after {status.queueing.requeues} tries to get placed"
    return _WAITS.get(status.reason, "starts when the whole gang can be placed")


def _coming_up(job: JobView, now: float) -> str:
    status = job.status
    step = status.resume_from.step if status.resume_from else 0
    text = f"when every pod holds attempt {status.attempt}, all ranks start from step {step}"
    last = next((r for r in reversed(status.restarts.recent) if r.attempt == status.attempt), None)
    began = seconds(status.attempt_started_at)
    if job.spec is None or last is None or began is None or status.phase != Phase.RECOVERING:
        return text
    ladder = job.spec.failure_policy.ladder
    rung = next((r for r in ladder if r.action == last.action), None)
    if rung is not None and rung.timeout_seconds:
        left = duration(max(0.0, began + rung.timeout_seconds - now))
        text += f"; if they do not within {left}, the next rung of the ladder follows"
    return text


def _resizing(status: TrainingJobStatus) -> list[str]:
    if status.sizing.target is not None:
        return [f"ranks are saving; the next attempt has {status.sizing.target} nodes"]
    return [f"leaves {', '.join(status.draining)}: its pods there save and are replaced"] if status.draining else []


def _on_failure(job: JobView) -> list[str]:
    """What a failure would lead to now, by the budget of a cause that has used none."""
    if job.spec is None:
        return []
    status = job.status
    step = status.progress.step if status.progress else 0
    saved = status.last_checkpoint.step if status.last_checkpoint else 0
    again = f"; {step - saved} steps since the checkpoint of step {saved} would be done again" if step > saved else ""
    ladder = job.spec.failure_policy.ladder
    first = next((rung.action for rung in ladder if rung.max), None)
    if first is None:
        return [f"a failure ends the job: spec.failurePolicy.ladder allows no restart{again}"]
    return [f"should a rank fail, {first} follows{again}"]


def _deadline(job: JobView, now: float) -> list[str]:
    limit = job.spec.run_policy.active_deadline_seconds if job.spec is not None else None
    began = seconds(job.status.admitted_at)
    if limit is None or began is None:
        return []
    left = duration(began + limit + job.status.suspended_seconds - now)
    return [f"spec.runPolicy.activeDeadlineSeconds ends it in {left}"]


def _after_the_end(job: JobView) -> list[str]:
    status = job.status
    lines = []
    if status.phase == Phase.FAILED:
        lines.append(_REMEDIES.get(status.reason, "nothing; see what it failed of"))
    ttl = job.spec.run_policy.ttl if job.spec is not None else None
    keep = None
    if ttl is not None:
        keep = ttl.succeeded_seconds if status.phase == Phase.SUCCEEDED else ttl.failed_seconds
    if keep is not None and status.completion_time:
        lines.append(f"the job and its pods are deleted {duration(keep)} after {status.completion_time}")
    return lines or ["nothing: it has ended, and stays until it is deleted"]


def _failure(failure: LastFailure | None, now: float) -> Rows:
    if failure is None:
        return []
    rows = [("cause", f"{failure.cause.value}: {failure.message}")]
    where = [f"rank {failure.rank}" if failure.rank is not None else "", failure.pod or "", failure.node or ""]
    rows.append(("where", ", ".join(part for part in where if part) or "not known"))
    rows.append(("when", f"{failure.at} ({_ago(seconds(failure.at), now)} ago), in attempt {failure.attempt}"))
    by = f"{failure.rule}" + (f", exit code {failure.exit}" if failure.exit is not None else "")
    rows.append(("told by", by))
    if failure.missing_ranks:
        rows.append(("waited for", f"ranks {', '.join(map(str, failure.missing_ranks))}"))
    if failure.stacks:
        rows.append(("stacks", failure.stacks))
    times = failure.phases.model_dump(by_alias=True, exclude_none=True)
    if times:
        rows.append(("recovery", ", ".join(f"{name} {value:g} s" for name, value in times.items())))
    return rows


def _restarts(job: JobView, now: float) -> Rows:
    restarts = job.status.restarts
    if not job.status.restart_count:
        return []
    by = ", ".join(f"{cause} {count}" for cause, count in sorted(restarts.by_cause.items()))
    counts = f"{restarts.process} in place, {restarts.pod} with a new pod, {restarts.gang} of the whole gang"
    rows = [("in all", f"{counts}; by cause: {by}")]
    for record in restarts.recent[-5:]:
        free = "" if record.charged else ", not charged"
        where = f" on {record.node}" if record.node else ""
        text = f"{record.action}: {record.cause.value}{where}, at step {record.step}{free}"
        rows.append((f"attempt {record.attempt}", f"{text} ({_ago(seconds(record.at), now)} ago)"))
    return rows


def budgets(job: JobView) -> Rows:
    """Restarts left by cause and rung of the ladder."""
    if job.spec is None:
        return []
    policy = job.spec.failure_policy
    window = duration(policy.window_seconds)
    rows = []
    for cause, left in sorted(job.status.budgets_left.items()):
        rungs = ", ".join(f"{rung.action} {left.get(rung.action, rung.max)}" for rung in policy.ladder)
        rows.append((cause, f"{rungs} within {window}"))
    ladder = ", ".join(f"{rung.action} {rung.max}" for rung in policy.ladder)
    whose = "every other cause" if rows else "every cause"
    return [*rows, (whose, f"{ladder} within {window}")]


def _nodes(job: JobView, now: float) -> Rows:
    status = job.status
    rows = []
    for node in status.avoided_nodes:
        until = seconds(node.until)
        left = f" for {duration(until - now)} more" if until is not None and until > now else ""
        rows.append(("avoided", f"{node.name}{left}: {node.reason}"))
    rows += [("leaving", name) for name in status.draining]
    rows += [
        ("slow", f"rank {s.rank} on {s.node or 'no node'}: {s.own_seconds:g} s a step, the others {s.others_seconds:g}")
        for s in status.stragglers
    ]
    return rows


def _decisions(job: JobView, now: float, newest: int = 8) -> Rows:
    rows = []
    for item in job.status.decisions[-newest:]:
        times = f" (×{item.count})" if item.count > 1 else ""
        rows.append((f"{_ago(seconds(item.at), now)} ago", f"{item.reason}: {item.message}{times}"))
    return rows


def _ago(at: float | None, now: float, before: str = "", after: str = "") -> str:
    return f"{before}{duration(max(0.0, now - at))}{after}" if at is not None else ""


def to_json(job: JobView, now: float) -> dict[str, Any]:
    status = job.status
    plain = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    keep = (
        "phase", "reason", "explanation", "attempt", "progress", "lastCheckpoint", "resumeFrom", "restarts",
        "lastFailure", "budgetsLeft", "avoidedNodes", "draining", "stragglers", "decisions", "updatedAt",
    )  # fmt: skip
    found: dict[str, Any] = {"name": job.name, "namespace": job.namespace}
    found |= {name: plain[name] for name in keep if name in plain}
    return found | {"problems": list(job.problems), "next": next_steps(job, now)}

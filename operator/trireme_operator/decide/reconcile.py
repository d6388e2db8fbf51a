"""Decide: (job, what is observed, now) → what to write and what to do. No I/O, no clock, no randomness.

A decision is first written to status and only then acted upon: a call that changes what should exist returns the status
alone, and the next call derives creations and deletions from the status it reads back. So the operator may be killed
between any two writes, called twice, late, or with an old view, and comes to the same end.
"""

from __future__ import annotations

from trireme_api.job import TERMINAL, ConditionType, Phase, TrainingJobStatus
from trireme_api.protocol import AgentState

from trireme_operator.decide import bookkeeping, carbonhold, conditions, energy, nodes
from trireme_operator.decide.accounting import account
from trireme_operator.decide.actions import Act, Decision, DeleteJob
from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.frozen import effective, ignored_edits
from trireme_operator.decide.gang import HOLDING, changes, leaves_by
from trireme_operator.decide.recovery import budgets_left
from trireme_operator.decide.resizing import ready_spares
from trireme_operator.decide.running import run
from trireme_operator.decide.stopping import stop
from trireme_operator.decide.views import JOB_UID_LABEL, Job, Observed
from trireme_operator.decide.waiting import invalid_note, wait


def reconcile(job: Job, seen: Observed, now: float) -> Decision:
    """One step towards what the job asks for. Total: any job, any view, any time gives a decision."""
    if job.deleting:
        return Decision()  # its pods go with it by owner reference; nothing outside the cluster needs cleaning
    spec = effective(job)
    if spec is None:
        return (
            _invalid(job, now) if job.status.phase not in TERMINAL else Decision(actions=changes(job, None, seen, now))
        )

    draft = Draft(job, spec, seen, now, job.status.model_copy(deep=True))
    nodes.expire(draft)
    phase = draft.status.phase
    if phase in HOLDING:
        account(draft.status, spec, draft.found, now)
    _meter(draft)
    if phase in TERMINAL:
        actions: list[Act] = list(changes(job, spec, seen, now))
        actions += _expire(draft)
        if any(not pod.over for pod in seen.pods) and now < leaves_by(job):
            draft.wake_at(leaves_by(job))
    else:
        if phase == Phase.SUSPENDING:
            stop(draft)
        elif phase in HOLDING:
            run(draft)
        else:
            wait(draft)
        bookkeeping.keep(draft)
        _describe(draft)
        if decisive(draft.status) != decisive(job.status):
            draft.status.updated_at = stamp(now)
            return Decision(draft.status, notes=tuple(draft.notes), requeue_after=0.0)
        actions = list(changes(job, spec, seen, now))
    return Decision(_to_write(draft), tuple(actions), tuple(draft.notes), _after(draft))


def decisive(status: TrainingJobStatus) -> object:
    """What pods and assignments follow from: when it moves, it is written before anything is done."""
    slots = [(slot.index, slot.incarnation, slot.spare) for slot in status.slots]
    known = status.phase, status.attempt, slots, status.admitted_spec, status.suspended_at, status.queueing.not_before
    hang = status.hang.attempt if status.hang is not None else None
    return known, status.sizing.target, hang, status.draining, status.carbon_hold.reason


def _meter(draft: Draft) -> None:
    """Energy and carbon, whatever the phase: pods burn until they are gone."""
    status, grid = draft.status, draft.grid.reported
    energy.book(status, draft.spec, draft.seen, grid)
    tokens = status.progress.tokens if status.progress is not None else None
    status.carbon = energy.carbon_status(draft.spec, status.energy, grid, tokens)


def _invalid(job: Job, now: float) -> Decision:
    status = job.status.model_copy(deep=True)
    text = "; ".join(str(problem) for problem in job.problems)
    conditions.enter(status, Phase.INVALID, "InvalidSpec", text, now, job.generation)
    if _news(status) == _news(job.status):
        return Decision()
    status.updated_at = stamp(now)
    notes = () if job.status.phase == Phase.INVALID and job.status.explanation == text else invalid_note(text)
    return Decision(status, notes=notes)


def _describe(draft: Draft) -> None:
    """What `kubectl get` shows, and the condition for edits that cannot take effect now."""
    status, job = draft.status, draft.job
    status.observed_generation = job.generation
    if job.problems:  # an admitted gang goes on with the spec it was admitted with
        text = "; ".join(str(problem) for problem in job.problems)
        set_to = (True, "InvalidEdit", f"{text}; the running gang keeps its admitted spec")
    else:
        set_to = (False, "Valid", "")
    conditions.set_condition(status, ConditionType.INVALID, *set_to, draft.now, job.generation)
    fields = ignored_edits(job) if status.admitted_spec is not None else []
    conditions.set_condition(
        status,
        ConditionType.EDIT_IGNORED,
        bool(fields),
        "FixedWhileAdmitted" if fields else "NoEdit",
        f"{', '.join(fields)} changed; the running gang keeps the old values: suspend and resume the job to apply them"
        if fields
        else "",
        draft.now,
        job.generation,
    )
    _tell_size(draft)
    carbonhold.tell(draft)
    replicas = status.replicas
    replicas.desired = draft.spec.replicas.desired
    replicas.selector = f"{JOB_UID_LABEL}={job.uid}"
    holding = status.phase in HOLDING
    replicas.size = len([slot for slot in status.slots if not slot.spare]) if holding else 0
    replicas.spares = len(ready_spares(draft)) if holding else 0
    replicas.created = sum(place.pod is not None for place in draft.found) if holding else 0
    # An agent not heard yet, after the operator's own restart, is no news: the count falls only with a new attempt.
    running = sum(place.says(status.attempt, AgentState.RUNNING) for place in draft.found)
    if not holding or status.attempt != job.status.attempt or status.phase == Phase.SUSPENDING:
        replicas.ready = running if holding else 0
    elif status.phase == Phase.RUNNING:
        replicas.ready = replicas.size
    else:
        replicas.ready = running
    status.node_summary = f"{replicas.ready}/{replicas.desired}"
    status.budgets_left = budgets_left(draft.spec.failure_policy, status, draft.now)
    status.restart_count = status.restarts.process + status.restarts.pod + status.restarts.gang


def _tell_size(draft: Draft) -> None:
    """The condition of a gang that runs on fewer nodes than it is to have."""
    status, desired = draft.status, draft.spec.replicas.desired
    size = sum(not slot.spare for slot in status.slots)
    shrunk = status.phase in HOLDING and 0 < size < desired
    why = status.sizing.reason or "waits for room"
    text = f"{size} of {desired} nodes: {why}; grows when there is room" if shrunk else ""
    reason = "FewerNodes" if shrunk else "FullSize"
    conditions.set_condition(status, ConditionType.SHRUNK, shrunk, reason, text, draft.now, draft.job.generation)


def _news(status: TrainingJobStatus) -> object:
    """Everything but figures that move all the time and the time of writing."""
    spends_on = status.goodput.state if status.goodput is not None else None
    return status.model_dump(exclude={"updated_at", "progress", "energy", "carbon", "goodput"}), spends_on


def _to_write(draft: Draft) -> TrainingJobStatus | None:
    """The status if it is worth a write now; else wakes the job when it will be."""
    new, old, limits = draft.status, draft.job.status, draft.seen.limits
    if new.model_dump(exclude={"updated_at"}) == old.model_dump(exclude={"updated_at"}):
        return None
    wait = limits.soon_seconds if _news(new) != _news(old) else limits.progress_seconds
    last = seconds(old.updated_at)
    if last is not None and 0 <= draft.now - last < wait:  # a clock that was set back must not silence the status
        draft.wake_at(last + wait)
        return None
    new.updated_at = stamp(draft.now)
    if new.goodput is not None:
        new.goodput = bookkeeping.up_to(new.goodput, draft.now)
    return new


def _expire(draft: Draft) -> list[Act]:
    ttl = draft.spec.run_policy.ttl
    keep = ttl.succeeded_seconds if draft.status.phase == Phase.SUCCEEDED else ttl.failed_seconds
    ended = seconds(draft.status.completion_time)
    if keep is None or ended is None:
        return []
    if draft.now >= ended + keep:
        return [DeleteJob()]
    draft.wake_at(ended + keep)
    return []


def _after(draft: Draft) -> float | None:
    return None if draft.wake is None else max(0.0, draft.wake - draft.now)

"""The gang holds its nodes: is it done, to be stopped, broken, stuck, or running?"""

from __future__ import annotations

import math

from trireme_api.job import LastFailure, Phase, RestartRecord, RuleAction, Slot
from trireme_api.protocol import AgentState, Cause, ExitCode

from trireme_operator.decide import carbonhold, hangs, recovery, stragglers
from trireme_operator.decide.accounting import best_step
from trireme_operator.decide.afterwards import absorb
from trireme_operator.decide.clock import duration, seconds, stamp
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.gang import Place, missing
from trireme_operator.decide.nodes import blame, leave
from trireme_operator.decide.recovery import DRAINED, SAVED, STRENGTH, Breakdown
from trireme_operator.decide.resizing import replace_lost, resize
from trireme_operator.decide.rules import ruled
from trireme_operator.decide.starting import first_step_times, hold_up, starting
from trireme_operator.decide.steps import begin_attempt, completed, end, give_back, past_active_deadline
from trireme_operator.decide.streaming import session_ended

RESTART_COUNTERS = {"RestartProcess": "process", "ReplacePod": "pod", "RestartGang": "gang"}
MAX_QUEUE_BACKOFF_SECONDS = 600.0


def run(draft: Draft) -> None:
    """The gang holds its nodes: is it done, to be stopped, broken, stuck, or running?"""
    status = draft.status
    for place in (*draft.found, *draft.spares):
        if place.slot.pod_uid is None and place.pod is not None:
            _slot(draft, place).pod_uid = place.pod.uid
    if status.slots and all(place.done(status.attempt) for place in draft.found):
        end(draft, Phase.SUCCEEDED, "Completed", completed(draft))
        return
    if past_active_deadline(draft):
        return
    if draft.spec.run_policy.suspend:
        status.stopping_since = stamp(draft.now)
        draft.enter(Phase.SUSPENDING, "Suspending", "ranks agree on a step, save and stop; then the pods are removed")
        draft.note("Suspending", "asked to suspend: save and stop")
        return
    hold = carbonhold.to_stop(draft)
    if hold is not None:
        status.stopping_since = stamp(draft.now)
        carbonhold.begin(draft, hold)
        draft.enter(Phase.SUSPENDING, hold.reason, f"{hold.message}; ranks agree on a step, save and stop")
        return
    if session_ended(draft):
        return
    leave(draft)
    if absorb(draft) or _failed(draft) or resize(draft):
        return
    if _not_placed(draft) or _past_startup_deadline(draft) or _recovery_too_slow(draft):
        return
    if status.phase == Phase.RUNNING:
        first_step_times(draft)
        stragglers.watch(draft)
    else:
        starting(draft)


def _slot(draft: Draft, place: Place) -> Slot:
    return next(slot for slot in draft.status.slots if slot.index == place.slot.index)


def _failed(draft: Draft) -> bool:
    """Whether something broke in this attempt; then the ladder has been asked and its answer written."""
    status, limits = draft.status, draft.seen.limits
    found = [b for p in draft.found if (b := recovery.breakdown(p, status.attempt, draft.now, limits)) is not None]
    found += _ended_before_it_began(draft) + hangs.watch(draft)
    if status.sizing.target is not None:
        found = [b for b in found if not _asked_for(b)]
    for place in draft.found:
        if (lost_at := place.lost_at(limits.silent_seconds)) < math.inf:
            draft.wake_at(max(lost_at, draft.now + 0.5))
    if not found:
        return False
    found = recovery.drained(found)
    first_at = min(b.at for b in found)
    patience = limits.settle_seconds
    if all(b.rule in (SAVED, DRAINED) for b in found):
        # The last rank to leave is the one that commits the checkpoint.
        patience = float(draft.spec.template.termination_grace_period_seconds)
        settled = all(_stopped(draft, place) for place in draft.found)
    else:
        certain = any(not b.cascade and not (b.rule == "exit-code" and b.cause == Cause.UNKNOWN) for b in found)
        settled = certain or len(found) == len(draft.found)
    if not settled and first_at <= draft.now < first_at + patience:
        draft.wake_at(first_at + patience)
        return True
    first = recovery.first_failure(found)
    if hangs.gathering(draft, first):
        return True
    first, rule = ruled(draft.spec.failure_policy, hangs.attributed(draft, first))
    _note_failure(draft, first)
    lost = {place.slot.index for place in draft.found if not draft.alive(place)} | hangs.silent_slots(draft)
    if blame(draft, first, rule):
        lost |= {p.slot.index for p in draft.found if p.pod is not None and p.pod.node == first.node}
    _climb(draft, first, lost, minimum=1 if lost else 0, asked=rule.action if rule else "Ladder")
    return True


def _asked_for(found: Breakdown) -> bool:
    """What ranks do that are asked to save: they save, or end by the signal, or lose peers that were quicker."""
    return found.cascade or found.exit in (ExitCode.SAVED_AND_STOPPED, -15, 143)


def _stopped(draft: Draft, place: Place) -> bool:
    """No rank of this attempt runs in it any more."""
    return place.pod is None or place.pod.over or place.says(draft.status.attempt, AgentState.EXITED)


def _ended_before_it_began(draft: Draft) -> list[Breakdown]:
    """A pod that ended well while the others still wait at the barrier of a newer attempt: it left with the old one."""
    status = draft.status
    began = seconds(status.attempt_started_at) or draft.now
    waiting = any(place.says(status.attempt, AgentState.WAITING) for place in draft.found)
    if status.phase == Phase.RUNNING or not waiting or draft.now - began < 10:
        return []
    return [
        Breakdown(
            Cause.INFRASTRUCTURE,
            "the pod had ended before this attempt began",
            draft.now,
            "ended-early",
            place.slot.index,
            place.pod.name,
            place.pod.node,
        )
        for place in draft.found
        if place.pod is not None and place.pod.phase == "Succeeded"
    ]


def _note_failure(draft: Draft, first: Breakdown) -> None:
    status = draft.status
    status.last_failure = LastFailure(
        cause=first.cause,
        message=first.message,
        at=stamp(min(first.at, draft.now)),
        attempt=status.attempt,
        rank=first.rank,
        pod=first.pod or None,
        node=first.node or None,
        exit=first.exit,
        rule=first.rule,
        cascade=first.cascade,
        missing_ranks=list(first.missing),
        stacks=first.stacks,
    )
    status.last_failure.phases.detect = _detection(draft, first)
    status.last_failure.phases.decide = round(max(0.0, draft.now - first.at), 3)


def _detection(draft: Draft, first: Breakdown) -> float | None:
    """Seconds from the rank's end, by the pod's clock, to its report; absent where the clocks plainly disagree."""
    heard = draft.place(first.slot).heard
    failure = heard.report.failure if heard is not None else None
    if heard is None or failure is None or failure.at is None:
        return None
    took = (heard.since or heard.at) - failure.at
    return round(took, 3) if 0 <= took < 60 else None


def _climb(draft: Draft, first: Breakdown, lost: set[int], minimum: int, asked: RuleAction = "Ladder") -> None:
    """Asks the ladder and writes its answer: a new attempt, or the end."""
    status, policy = draft.status, draft.spec.failure_policy
    furthest = best_step(status)
    reply = recovery.answer(policy, status, first, minimum=minimum, best_step=furthest, now=draft.now, asked=asked)
    if reply.action is None:
        end(draft, Phase.FAILED, reply.reason, reply.message)
        return
    stricken = lost if reply.action == "RestartProcess" else lost | {first.slot}
    renewed = {place.slot.index for place in draft.found} if reply.action == "RestartGang" else set()
    begin_attempt(draft)
    helped = replace_lost(draft, stricken, renewed)
    restarts = status.restarts
    counter = RESTART_COUNTERS[reply.action]
    setattr(restarts, counter, getattr(restarts, counter) + 1)
    restarts.by_cause[first.cause.value] = restarts.by_cause.get(first.cause.value, 0) + 1
    restarts.recent = [
        *recovery.within_window(policy, status, draft.now),
        RestartRecord(
            at=stamp(draft.now),
            action=reply.action,
            cause=first.cause,
            step=furthest,
            attempt=status.attempt,
            charged=first.charged,
            taken=first.taken,
            node=first.node or None,
        ),
    ]
    where = f"rank {first.rank} of {first.pod}" if first.rank is not None else first.pod or f"slot {first.slot}"
    again = f"from step {status.resume_from.step}" if status.resume_from else "from the start"
    message = f"{where}: {first.cause.value}: {first.message}; {reply.action}, attempt {status.attempt} {again}{helped}"
    draft.enter(Phase.RECOVERING, reply.action, message)
    draft.note(reply.action, message, warning=True)


def _not_placed(draft: Draft) -> bool:
    """A gang that is not wholly placed in time gives its nodes back: half a gang helps nobody and blocks others."""
    status, limits = draft.status, draft.seen.limits
    uncreated = [slot for slot in missing(draft.job, draft.seen) if not slot.spare]
    unplaced = [p.pod for p in draft.found if p.pod is not None and not p.pod.over and not p.pod.node]
    began = seconds(status.attempt_started_at)
    if began is None or not (uncreated or unplaced) or status.phase == Phase.RUNNING:
        return False
    if draft.now < began + limits.gang_seconds:
        draft.wake_at(began + limits.gang_seconds)
        return False
    why = (
        next((pod.unschedulable for pod in unplaced if pod.unschedulable), "")
        or draft.seen.write_error
        or "no node took them"
    )
    status.queueing.requeues += 1
    pause = min(MAX_QUEUE_BACKOFF_SECONDS, 15.0 * 2 ** min(status.queueing.requeues, 10))
    give_back(draft)
    status.queueing.not_before = stamp(draft.now + pause)
    message = (
        f"{len(uncreated) + len(unplaced)} of {len(draft.found)} pods found no place within "
        f"{duration(limits.gang_seconds)} ({why}); the whole gang gives way and queues again at "
        f"{status.queueing.not_before}"
    )
    draft.enter(Phase.PENDING, "GangNotPlaced", message)
    draft.note("GangNotPlaced", message, warning=True)
    return True


def _past_startup_deadline(draft: Draft) -> bool:
    limit, began = draft.spec.run_policy.startup_deadline_seconds, seconds(draft.status.attempt_started_at)
    if limit is None or began is None or draft.status.phase == Phase.RUNNING:
        return False
    if draft.now < began + limit:
        draft.wake_at(began + limit)
        return False
    end(
        draft,
        Phase.FAILED,
        "StartupDeadlineExceeded",
        f"spec.runPolicy.startupDeadlineSeconds: not all ranks ran {limit} s after "
        f"attempt {draft.status.attempt} began; {hold_up(draft)}",
    )
    return True


def _recovery_too_slow(draft: Draft) -> bool:
    """A restart that does not bring the gang back in its time is answered by the next rung of the ladder."""
    status, policy = draft.status, draft.spec.failure_policy
    began = seconds(status.attempt_started_at)
    last = next((r for r in reversed(status.restarts.recent) if r.attempt == status.attempt), None)
    step = recovery.rung(policy, last.action) if last is not None else None
    if (
        status.phase != Phase.RECOVERING
        or began is None
        or last is None
        or step is None
        or step.timeout_seconds is None
    ):
        return False
    if any(place.pod is None or not place.pod.node for place in draft.found):
        return False  # waits for room, which restarting would not make
    if draft.now < began + step.timeout_seconds:
        draft.wake_at(began + step.timeout_seconds)
        return False
    late = next(
        (p for p in draft.found if not p.says(status.attempt, AgentState.WAITING, AgentState.RUNNING)), draft.found[0]
    )
    failure = Breakdown(
        last.cause,
        f"{last.action} did not bring the gang back within {step.timeout_seconds} s: {hold_up(draft)}",
        draft.now,
        "recovery-timeout",
        late.slot.index,
        late.pod.name if late.pod else "",
        late.pod.node if late.pod else "",
    )
    _note_failure(draft, failure)
    minimum = min(STRENGTH[last.action] + 1, STRENGTH["RestartGang"])
    _climb(draft, failure, {p.slot.index for p in draft.found if not draft.alive(p)}, minimum)
    return True

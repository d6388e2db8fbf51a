"""What failed first, why, and which rung of the restart ladder answers it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TypedDict

from trireme_api.job import FailurePolicy, LadderStep, RestartAction, RestartRecord, RuleAction, TrainingJobStatus
from trireme_api.protocol import (
    AgentState,
    Cause,
    ExitCode,
    Failure,
    ProtocolError,
    cause_of_exit,
    clean_text,
    retryable,
)

from trireme_operator.decide.clock import seconds
from trireme_operator.decide.gang import Place
from trireme_operator.decide.views import Ended, Limits, Pod

DRAINED, SAVED = "drained", "saved-unasked"
DISRUPTIONS = {
    "PreemptionByScheduler": Cause.PREEMPTION,
    "EvictionByEvictionAPI": Cause.PREEMPTION,
    "DeletionByTaintManager": Cause.INFRASTRUCTURE,
    "DeletionByPodGC": Cause.INFRASTRUCTURE,
    "TerminationByKubelet": Cause.INFRASTRUCTURE,
}
"""Reasons of the condition DisruptionTarget; one that is not known here took the pod away as well."""
NODE_SHUTDOWN = frozenset({"Preempting", "Terminated", "Shutdown", "NodeShutdown"})
"""Reasons of a pod that the kubelet of a leaving or crowded node ended."""
STRENGTH: dict[str, int] = {"RestartProcess": 0, "ReplacePod": 1, "RestartGang": 2}


@dataclass(frozen=True)
class Breakdown:
    """One pod's failure, classified."""

    cause: Cause
    message: str
    at: float
    """Unix seconds by the operator's clock, or the kubelet's where the container's end is all there is."""
    rule: str
    """Which signal classified it."""
    slot: int
    pod: str = ""
    node: str = ""
    rank: int | None = None
    exit: int | None = None
    cascade: bool = False
    """It failed because a peer did."""
    taken: bool = False
    """The API server says that the cluster took the pod away; what a rank says of itself never makes this true, or a
    script that exits 75 would be started for ever."""
    charged: bool = True
    """Whether it counts against the budget."""
    disrupted: bool = False
    """The pod carries the condition DisruptionTarget."""
    detail: str = ""
    """The traceback, where there is one."""
    missing: tuple[int, ...] = ()
    """After a hang: the ranks the others waited for."""
    stacks: str | None = None
    """After a hang: where they were saved."""


def breakdown(place: Place, attempt: int, now: float, limits: Limits) -> Breakdown | None:
    """The failure of one place in this attempt, if there is one. Signals in order of trust (API server first)."""
    pod, slot = place.pod, place.slot
    if pod is None:
        if slot.pod_uid is None:
            return None
        return Breakdown(
            Cause.INFRASTRUCTURE,
            "the pod is gone from the API server: deleted, evicted or its node removed",
            now,
            "pod-gone",
            slot.index,
        )
    if pod.phase == "Failed":
        return _of_ended_pod(place, pod, now)
    if pod.phase == "Succeeded":
        return None
    if place.node_lost(now, limits.silent_seconds):
        what = (
            f"node {pod.node} is gone" if place.node_gone else f"node {pod.node} is not ready and its agent is silent"
        )
        return Breakdown(Cause.INFRASTRUCTURE, what, now, "node-lost", slot.index, pod.name, pod.node)
    return _of_report(place, pod, attempt)


def _of_report(place: Place, pod: Pod, attempt: int) -> Breakdown | None:
    heard = place.heard
    if heard is None or heard.report.attempt != attempt:
        return None
    report = heard.report
    if report.failure is not None:
        found = report.failure
        return Breakdown(
            found.cause,
            _first_line(found),
            heard.since or heard.at,
            "agent-report",
            place.slot.index,
            pod.name,
            pod.node,
            found.rank,
            found.exit,
            found.cascade,
            **_taken(pod),
            detail=found.traceback or "",
        )
    if report.state != AgentState.EXITED:
        return None
    exits = [rank for rank in report.ranks if rank.exit not in (None, 0)]
    if not exits:
        return None
    worst = next((rank for rank in exits if rank.exit != ExitCode.SAVED_AND_STOPPED), exits[0])
    assert worst.exit is not None
    return _of_exit_code(place, pod, worst.exit, heard.since or heard.at, worst.local_rank)


def _of_exit_code(place: Place, pod: Pod, code: int, at: float, local_rank: int | None = None) -> Breakdown:
    where = place.slot.index, pod.name, pod.node, None, code
    if code == ExitCode.SAVED_AND_STOPPED and pod.leaving:
        what = "the pod was asked to leave; its ranks saved and stopped"
        return Breakdown(Cause.PREEMPTION, what, at, DRAINED, *where, **_taken(pod))
    if code == ExitCode.SAVED_AND_STOPPED:
        what = "ranks were asked from outside to leave (SIGTERM): saved and stopped"
        return Breakdown(Cause.PREEMPTION, what, at, SAVED, *where, cascade=True)
    who = "" if local_rank is None else f"local rank {local_rank} "
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    cause = Cause.PREEMPTION if pod.leaving and code == 143 else cause_of_exit(code) or Cause.UNKNOWN
    return Breakdown(cause, f"{who}{how}".strip(), at, "exit-code", *where, **_taken(pod))


class _Taken(TypedDict):
    taken: bool
    charged: bool
    disrupted: bool


def _taken(pod: Pod) -> _Taken:
    """A pod that somebody asked to leave (eviction, drain, taint, preemption, delete) fails for that."""
    gone = pod.leaving or bool(pod.disruption)
    return {"taken": gone, "charged": not gone, "disrupted": bool(pod.disruption)}


def _of_ended_pod(place: Place, pod: Pod, now: float) -> Breakdown:
    ended = pod.ended
    # An end without a time must not stay news for ever: nobody's report is awaited for it.
    at = now if ended is None else pod.created_at if ended.finished_at is None else ended.finished_at

    def found(cause: Cause, message: str, rule: str, code: int | None = None, taken: bool = False) -> Breakdown:
        return Breakdown(
            cause, message, at, rule, place.slot.index, pod.name, pod.node, exit=code,
            taken=taken, charged=not taken, disrupted=bool(pod.disruption),
        )  # fmt: skip

    if pod.reason == "Evicted":
        # For want of memory or disk on the node, which the pod itself may have used up: charged.
        return found(Cause.INFRASTRUCTURE, f"evicted by the kubelet: {pod.message}", "evicted")
    if pod.disruption:
        cause = DISRUPTIONS.get(pod.disruption, Cause.PREEMPTION)
        return found(cause, f"the cluster took the pod away: {pod.disruption}", "disruption", taken=True)
    if pod.reason in NODE_SHUTDOWN:
        what = f"the node took the pod away: {pod.reason}: {pod.message}"
        return found(Cause.PREEMPTION, what, "disruption", taken=True)
    if ended is None:
        return found(
            Cause.INFRASTRUCTURE, f"{pod.reason or 'failed'}: {pod.message or 'no container ran'}", "pod-failed"
        )
    if ended.reason == "OOMKilled":
        return found(
            Cause.OOM,
            "the container was killed for memory; raise template.resources.limits.memory or lower batch.micro",
            "oom-killed",
            ended.exit_code,
        )
    if ended.reason in ("StartError", "ContainerCannotRun"):
        return found(
            Cause.USER_ERROR,
            f"template.image: the container cannot start (is python3 in the image?): {ended.message}",
            "start-error",
            ended.exit_code,
        )
    told = _from_termination_message(ended)
    if told is not None:
        return Breakdown(
            told.cause,
            _first_line(told),
            at,
            "termination-message",
            place.slot.index,
            pod.name,
            pod.node,
            told.rank,
            told.exit if told.exit is not None else ended.exit_code,
            told.cascade,
            **_taken(pod),
            detail=told.traceback or "",
        )
    return _of_exit_code(place, pod, ended.exit_code, at)


def _from_termination_message(ended: Ended) -> Failure | None:
    try:
        data = json.loads(ended.message)
        return Failure.from_json(data.get("failure") or data)
    except (ValueError, AttributeError, ProtocolError):
        return None


def _first_line(failure: Failure) -> str:
    return clean_text(failure.message.strip() or "no message", 512)


def drained(found: list[Breakdown]) -> list[Breakdown]:
    """The same, knowing that a pod which is gone while all others saved and stopped had been asked to leave."""
    others = [item for item in found if item.rule != "pod-gone"]
    if not others or any(item.rule not in (SAVED, DRAINED) for item in others):
        return found
    gone = "the pod was asked to leave and is gone; the ranks had saved and stopped"
    return [
        item
        if item.rule != "pod-gone"
        else replace(item, cause=Cause.PREEMPTION, message=gone, rule=DRAINED, taken=True, charged=False)
        for item in found
    ]


def first_failure(found: list[Breakdown]) -> Breakdown:
    """The one that began it: no mere consequence of a peer's end, then the earliest, then the lowest slot."""
    return min(found, key=lambda item: (item.cascade, item.rule == SAVED, item.at, item.slot))


@dataclass(frozen=True)
class Answer:
    """What to do about a failure: a restart, or the end of the job."""

    action: RestartAction | None
    reason: str = ""
    message: str = ""


def within_window(policy: FailurePolicy, status: TrainingJobStatus, now: float) -> list[RestartRecord]:
    return [item for item in status.restarts.recent if now - (seconds(item.at) or 0.0) < policy.window_seconds]


def answer(
    policy: FailurePolicy,
    status: TrainingJobStatus,
    failure: Breakdown,
    *,
    minimum: int,
    best_step: int,
    now: float,
    asked: RuleAction = "Ladder",
) -> Answer:
    """The first rung, not weaker than `minimum`, for which the cause has budget left; or the end, with the reason.

    `best_step` is the furthest step ever reached, committed checkpoints included. `asked` is the action of the user's
    rule that fitted.
    """
    if asked == "Fail":
        return Answer(None, "FailureRule", f"rule {failure.rule}: {failure.cause.value}: {failure.message}")
    if asked == "Ladder" and not retryable(failure.cause):
        return Answer(None, "NotRetryable", f"{failure.cause.value}: {failure.message}")
    minimum = max(minimum, STRENGTH.get(asked, 0))
    recent = within_window(policy, status, now)
    stuck = 1
    for record in reversed(recent):
        if record.cause != failure.cause or record.step < best_step:
            break
        stuck += not record.taken
    if not failure.taken and stuck >= policy.stop_when.same_cause_without_progress:
        return Answer(
            None,
            "NoProgress",
            f"{failure.cause.value} {stuck} times in a row without a step beyond {best_step}: {failure.message}",
        )
    used = spent(recent, failure.cause)
    for step in policy.ladder:
        if STRENGTH[step.action] >= minimum and (used[step.action] < step.max or (not failure.charged and step.max)):
            return Answer(step.action)
    how = ", ".join(f"{step.action} {used[step.action]} of {step.max}" for step in policy.ladder)
    return Answer(
        None,
        "BudgetExhausted",
        f"no restart left for {failure.cause.value} within {policy.window_seconds} s ({how}); last: {failure.message}",
    )


def spent(recent: list[RestartRecord], cause: Cause) -> dict[str, int]:
    """Restarts by rung that this cause has used of its budget; each cause has its own, so that a bad network does not
    take the restarts away that a hang will need."""
    return {action: sum(r.action == action and r.charged and r.cause == cause for r in recent) for action in STRENGTH}


def budgets_left(policy: FailurePolicy, status: TrainingJobStatus, now: float) -> dict[str, dict[str, int]]:
    """By cause and rung; only causes that have used some of theirs within the window."""
    recent = within_window(policy, status, now)
    causes = sorted({record.cause for record in recent if record.charged}, key=lambda cause: cause.value)
    return {
        cause.value: {s.action: max(0, s.max - spent(recent, cause)[s.action]) for s in policy.ladder}
        for cause in causes
    }


def rung(policy: FailurePolicy, action: str) -> LadderStep | None:
    return next((step for step in policy.ladder if step.action == action), None)

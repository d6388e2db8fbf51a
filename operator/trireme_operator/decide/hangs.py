"""Hang watch: no step within the limit, judged by the operator's own clock. Pure functions of status and reports.

A heartbeat's age is what the agent says of its rank; it counts only while the operator, by its own clock, has seen the
rank stand still over several reports, so that neither a late report nor a paused machine looks like a hang. An agent's
silence is another matter: it is never a hang by itself, but when the gang stands still, the silent pod is the suspect.

A hang that was found is first written to status; the agents then save the stacks of all ranks; then it is a failure
like any other and the restart ladder answers it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trireme_api.hang import HangPolicy, HangStatus
from trireme_api.job import TrainingJobStatus
from trireme_api.layout import procs_per_node
from trireme_api.protocol import AgentState, Cause, RankStack

from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.gang import Place
from trireme_operator.decide.recovery import Breakdown
from trireme_operator.decide.trail import Mark

FACTOR = 3.0
FLOOR_SECONDS = 14.0
"""A second less than the 15 promised: what reports take on their way, and the agent's tick, come on top."""
STEPPING = frozenset({"step", "data"})
SILENT_SECONDS = 40.0
"""An agent has a long poll of 30 s open at all times; one that let this much pass did not come back for it."""
STACKS_SECONDS = 6.0
"""So long stacks are waited for; then the gang is restarted without those that are missing."""
STILL = ("stopped", "traced", "uninterruptible")


@dataclass(frozen=True)
class Stand:
    """One rank as last heard."""

    place: Place
    local_rank: int
    mark: Mark
    limit: float

    def stands(self, share: float) -> bool:
        """Whether it was said to have stood still for this share of its limit."""
        return self.mark.last.age >= share * self.limit

    def hung(self) -> bool:
        """Past its limit, and by the operator's clock seen standing for a third of it (one step, where learnt)."""
        since = self.mark.stood_since(self.limit / 2)
        return self.stands(1.0) and since is not None and self.mark.last.at - since >= self.limit / 3


def step_limit(policy: HangPolicy, step_seconds: float | None) -> float:
    """Seconds a step may take; before one is known, as long as a start."""
    if policy.step_timeout != "auto":
        return float(policy.step_timeout)
    return max(FLOOR_SECONDS, FACTOR * step_seconds) if step_seconds else float(policy.start_seconds)


def step_seconds(found: Sequence[Place], status: TrainingJobStatus) -> float | None:
    """Median step of the gang as its agents measure it; before that, what was last learnt and written."""
    told = [
        rank.step_seconds
        for place in found
        if place.heard is not None and place.heard.report.attempt == status.attempt
        for rank in place.heard.report.ranks
        if rank.step_seconds is not None
    ]
    if told:
        return statistics.median(told)
    return status.progress.step_seconds if status.progress is not None else None


def stands(draft: Draft) -> list[Stand]:
    """Every live rank of this attempt that writes heartbeats, with the limit of the phase it is in."""
    policy, attempt = draft.spec.hang_policy, draft.status.attempt
    limit = step_limit(policy, step_seconds(draft.found, draft.status))
    found = []
    for place in draft.found:
        if place.heard is None or not place.says(attempt, AgentState.RUNNING):
            continue
        trail = place.heard.trail
        ended = {rank.local_rank for rank in place.heard.report.ranks if rank.exit is not None}
        for local_rank, mark in trail.marks.items():
            if local_rank not in ended:
                steps = mark.phase in STEPPING and trail.stepped
                found.append(Stand(place, local_rank, mark, limit if steps else float(policy.start_seconds)))
    return found


def watch(draft: Draft) -> list[Breakdown]:
    """The hang of this attempt as a failure, if there is one. Once found it stays found: status says so."""
    status = draft.status
    if status.hang is not None and status.hang.attempt == status.attempt:
        return [_breakdown(draft, status.hang)]
    known = stands(draft)
    silent = {
        place.slot.index
        for place in _ranked(draft)
        if place.heard is not None and draft.now - place.heard.at > SILENT_SECONDS
    }
    heard = [stand for stand in known if stand.place.slot.index not in silent]
    hung = [stand for stand in heard if stand.hung()]
    # One rank that moves, or was not heard to stand, means that the gang goes on.
    if not hung or not all(stand.stands(0.5) for stand in heard):
        return []
    worst = min(hung, key=lambda stand: (stand.mark.step or 0, -stand.mark.last.age, stand.place.slot.index))
    typical = step_seconds(draft.found, status)
    why = ""
    if draft.spec.hang_policy.step_timeout == "auto" and typical and worst.limit < draft.spec.hang_policy.start_seconds:
        why = f": a step takes {typical:.2g} s"
    message = (
        f"no rank moved for {worst.mark.last.age:.0f} s, at step {worst.mark.step} in phase {worst.mark.phase} "
        f"(limit {worst.limit:.0f} s{why})"
    )
    status.hang = HangStatus(
        attempt=status.attempt,
        since=stamp(draft.now),
        message=message,
        slot=worst.place.slot.index,
        silent=sorted(silent),
    )
    draft.note("Hang", f"{message}; saving the stacks of all ranks", warning=True)
    return [_breakdown(draft, status.hang)]


def _breakdown(draft: Draft, hang: HangStatus) -> Breakdown:
    pod = next((place.pod for place in draft.found if place.slot.index == hang.slot), None)
    at = min(seconds(hang.since) or draft.now, draft.now)
    return Breakdown(
        Cause.HANG, hang.message, at, "hang-watch", hang.slot, pod.name if pod else "", pod.node if pod else ""
    )


def gathering(draft: Draft, first: Breakdown) -> bool:
    """Whether stacks are still awaited before this failure is answered. Asks for them the first time."""
    if first.cause != Cause.HANG:
        return False
    status = draft.status
    if status.hang is None or status.hang.attempt != status.attempt:
        # A rank's own watch was first: the other pods' stacks are wanted all the same.
        status.hang = HangStatus(
            attempt=status.attempt, since=stamp(draft.now), message=first.message, slot=first.slot
        )
    until = (seconds(status.hang.since) or draft.now) + STACKS_SECONDS
    if draft.now >= until or all(_has_stacks(draft, place) for place in _ranked(draft)):
        return False
    draft.wake_at(until)
    return True


def _has_stacks(draft: Draft, place: Place) -> bool:
    hang = draft.status.hang
    if place.heard is None or not draft.alive(place) or (hang is not None and place.slot.index in hang.silent):
        return True
    report = place.heard.report
    if report.attempt != draft.status.attempt or report.stacks is not None:
        return True
    hung_itself = report.failure is not None and report.failure.cause == Cause.HANG
    return not hung_itself and report.state not in (AgentState.RUNNING, AgentState.STOPPING)


def attributed(draft: Draft, first: Breakdown) -> Breakdown:
    """The failure with what the stacks tell: who is missing (its pod and node are then the failed ones), and where
    they were saved."""
    if first.cause != Cause.HANG:
        return first
    per_node = procs_per_node(draft.spec)
    ranks, reason = missing(draft, per_node)
    stacks = next((p.heard.report.stacks.path for p in draft.found if p.heard and p.heard.report.stacks), None)
    if not ranks:
        return replace(first, stacks=stacks)
    place = _ranked(draft)[ranks[0] // per_node]
    who = f"rank {', '.join(str(rank) for rank in ranks)}"
    return replace(
        first,
        rank=ranks[0],
        slot=place.slot.index,
        pod=place.pod.name if place.pod else "",
        node=place.pod.node if place.pod else "",
        message=f"{first.message}; {who} {reason}",
        missing=tuple(ranks),
        stacks=stacks,
    )


def _ranked(draft: Draft) -> list[Place]:
    """The places that have ranks, in the order of their node ranks."""
    return [place for place in draft.found if not place.slot.spare]


def silent_slots(draft: Draft) -> set[int]:
    """Pods that a restart in place would not reach after a hang: their agents do not answer."""
    hang = draft.status.hang
    return set(hang.silent) if hang is not None and hang.attempt == draft.status.attempt else set()


def missing(draft: Draft, per_node: int) -> tuple[list[int], str]:
    """(global ranks that the others wait for, why), by the strongest evidence there is; no ranks where none tells."""
    attempt = draft.status.attempt
    ranked = _ranked(draft)
    reports = [
        (node, place.heard.report)
        for node, place in enumerate(ranked)
        if place.heard is not None and place.heard.report.attempt == attempt
    ]
    taken: list[tuple[int, RankStack]] = [
        (node * per_node + stack.local_rank, stack)
        for node, report in reports
        if report.stacks is not None
        for stack in report.stacks.ranks
    ]
    still = [(rank, stack.state) for rank, stack in taken if stack.state in STILL]
    if still:
        return [rank for rank, _ in still], f"is {still[0][1]} (state of the process)"
    named: Counter[int] = Counter()
    for _, report in reports:
        if report.failure is not None and report.failure.cause == Cause.HANG:
            named.update(report.failure.missing or [])
    size = per_node * len(ranked)
    most = max(named.values(), default=0)
    if most:
        return sorted(rank for rank, votes in named.items() if votes == most and 0 <= rank < size), (
            "is the one that its peers' own hang watch misses"
        )
    silent = silent_slots(draft)
    if silent:
        nodes = [node for node, place in enumerate(ranked) if place.slot.index in silent]
        return [node * per_node + local for node in nodes for local in range(per_node)], "is in a pod that fell silent"
    busy = [(rank, stack) for rank, stack in taken if stack.waits is False]
    if busy and any(stack.waits for _, stack in taken):
        where = f": {busy[0][1].where}" if busy[0][1].where else ""
        return [rank for rank, _ in busy], f"does not wait for the others as they do for it{where}"
    steps = [
        (node * per_node + rank.local_rank, rank.step)
        for node, report in reports
        for rank in report.ranks
        if rank.step is not None
    ]
    least, furthest = (pick((step for _, step in steps), default=0) for pick in (min, max))
    if least < furthest:
        return [rank for rank, step in steps if step == least], f"is still at step {least}, others at {furthest}"
    return [], ""

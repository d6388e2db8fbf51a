"""Slow ranks: reported with their pod and node, never killed. Pure functions of status and reports.

All ranks take the same time for a step, for they wait for each other; what tells is the time that is a rank's own
(`ownSeconds`, a mean over about twenty seconds that the trainer makes). A rank is a straggler when it takes half as
long again as the median of the others and that costs the gang a tenth of its time; it stays one until it is within a
quarter, or costs less than a twentieth.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from trireme_api.hang import Straggler
from trireme_api.layout import procs_per_node
from trireme_api.protocol import AgentState

from trireme_operator.decide.clock import stamp
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.gang import Place
from trireme_operator.decide.hangs import step_seconds

SLOW, STILL_SLOW = 1.5, 1.25
MATTERS, STILL_MATTERS = 0.1, 0.05
"""Share of a step that the difference must be of to count."""


@dataclass(frozen=True)
class Own:
    place: Place
    seconds: float


def watch(draft: Draft) -> None:
    """Brings `status.stragglers` up to what the ranks tell; an event for each new one."""
    status = draft.status
    told = own_times(draft)
    if len(told) < 2:
        return  # nothing to compare with; a restarted operator has not heard them all yet
    known = {straggler.rank: straggler for straggler in status.stragglers}
    step = step_seconds(draft.found, status) or 0.0
    found = []
    for rank, own in sorted(told.items()):
        others = statistics.median(other.seconds for peer, other in told.items() if peer != rank)
        factor, share = (STILL_SLOW, STILL_MATTERS) if rank in known else (SLOW, MATTERS)
        if own.seconds < factor * others or own.seconds - others < share * step:
            continue
        if rank not in known:
            known[rank] = _reported(draft, rank, own, others)
        # As first reported: figures that move all the time would be written all the time.
        found.append(known[rank])
    status.stragglers = found


def own_times(draft: Draft) -> dict[int, Own]:
    """By global rank, of this attempt."""
    per_node = procs_per_node(draft.spec)
    ranked = [place for place in draft.found if not place.slot.spare]
    return {
        node * per_node + rank.local_rank: Own(place, rank.own_seconds)
        for node, place in enumerate(ranked)
        if place.heard is not None and place.says(draft.status.attempt, AgentState.RUNNING)
        for rank in place.heard.report.ranks
        if rank.own_seconds is not None and rank.exit is None
    }


def _reported(draft: Draft, rank: int, own: Own, others: float) -> Straggler:
    pod = own.place.pod
    name, node = (pod.name, pod.node) if pod is not None else ("", "")
    draft.note(
        "Straggler",
        f"rank {rank} of {name} on {node or 'no node'} takes {own.seconds:.3g} s of its own for a step, the others "
        f"{others:.3g} s: the whole gang waits for it",
        warning=True,
    )
    return Straggler(
        rank=rank,
        pod=name,
        node=node,
        own_seconds=round(own.seconds, 4),
        others_seconds=round(others, 4),
        since=stamp(draft.now),
    )

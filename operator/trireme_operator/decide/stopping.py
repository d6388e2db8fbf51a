"""Asked to suspend: every rank saves and stops, then the nodes are given back."""

from __future__ import annotations

from trireme_api.job import Phase
from trireme_api.protocol import AgentState, ExitCode

from trireme_operator.decide import carbonhold
from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.gang import Place
from trireme_operator.decide.steps import completed, end, give_back

STOP_MARGIN_SECONDS = 30.0
"""Beyond the pod's own grace, before a gang that does not stop is deleted all the same."""


def stop(draft: Draft) -> None:
    """Asked to suspend: wait until every rank has saved and stopped, then give the nodes back."""
    status = draft.status
    if draft.found and all(place.done(status.attempt) for place in draft.found):
        end(draft, Phase.SUCCEEDED, "Completed", f"{completed(draft)} before it could be suspended")
        return
    began = seconds(status.stopping_since) or draft.now
    patience = draft.spec.template.termination_grace_period_seconds + STOP_MARGIN_SECONDS
    running = [place for place in draft.found if not _stopped(draft, place)]
    if running and draft.now < began + patience:
        draft.wake_at(began + patience)
        return
    saved = any(
        rank.exit == ExitCode.SAVED_AND_STOPPED
        for p in draft.found
        if p.heard is not None
        for rank in p.heard.report.ranks
    )
    at = f"at step {status.last_checkpoint.step}" if status.last_checkpoint else "before the first checkpoint"
    how = (
        "saved and stopped"
        if saved
        else "stopped without saving"
        if not running
        else "deleted, for they did not stop in time"
    )
    give_back(draft)
    status.suspended_at = stamp(draft.now)
    reason, why = "Suspended", "set spec.runPolicy.suspend to false to go on from there"
    if not draft.spec.run_policy.suspend and status.carbon_hold.reason is not None:
        hold = carbonhold.to_start(draft)
        reason, why = status.carbon_hold.reason, hold.message if hold is not None else "goes on from there"
    message = f"suspended {at} (ranks {how}); {why}"
    draft.enter(Phase.SUSPENDED, reason, message)
    draft.note("Suspended", message, warning=bool(running))


def _stopped(draft: Draft, place: Place) -> bool:
    if not draft.alive(place):
        return place.pod is None or place.pod.over or place.node_lost(draft.now, draft.seen.limits.silent_seconds)
    if place.heard is None:
        # An operator that has just started has heard nobody yet: ranks that still save must not be taken for stopped.
        return place.pod is None or place.pod.phase != "Running"
    return place.says(draft.status.attempt, AgentState.EXITED, AgentState.WAITING)

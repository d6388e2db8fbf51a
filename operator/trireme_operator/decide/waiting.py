"""Jobs without pods: new, queueing, suspended. Starts the gang when admission says that it fits."""

from __future__ import annotations

from trireme_api.job import ConditionType, Phase

from trireme_operator.decide import carbonhold
from trireme_operator.decide.actions import Note
from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.conditions import condition
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.frozen import snapshot
from trireme_operator.decide.gang import fresh_slots
from trireme_operator.decide.nodes import forgive
from trireme_operator.decide.steps import begin_attempt, past_active_deadline
from trireme_operator.decide.streaming import stop_waiting, waits_for_data


def invalid_note(text: str) -> tuple[Note, ...]:
    return (Note("InvalidSpec", text, warning=True),)


def wait(draft: Draft) -> None:
    """New, invalid till now, suspended or queueing: no pods. Starts the gang when admission says that it fits."""
    status, spec = draft.status, draft.spec
    if draft.job.spec is None:
        return  # an admitted spec is only kept while the gang holds its nodes
    if status.start_time is None:
        status.start_time = stamp(draft.now)
    if spec.run_policy.suspend:
        stop_waiting(draft)
        if status.phase != Phase.SUSPENDED or status.carbon_hold.reason is not None:
            status.suspended_at = status.suspended_at or stamp(draft.now)
            before = "before it was started" if status.admitted_at is None else "while it waited"
            draft.enter(
                Phase.SUSPENDED, "Suspended", f"suspended {before}; set spec.runPolicy.suspend to false to go on"
            )
            draft.note("Suspended", "spec.runPolicy.suspend is true")
            carbonhold.lift(draft)
        return
    hold = carbonhold.to_start(draft)
    if hold is not None:
        stop_waiting(draft)
        _held(draft, hold)
        return
    if asks := carbonhold.asks(draft):
        stop_waiting(draft)
        if status.phase != Phase.SUSPENDED:
            _keep_waiting(draft, "GridAsked", asks)
        return
    carbonhold.lift(draft)
    since = seconds(status.suspended_at)
    if since is not None:
        status.suspended_seconds = round(status.suspended_seconds + max(0.0, draft.now - since), 3)
        status.suspended_at = None
        draft.note("Resumed", "nothing suspends it any more")
    if waits_for_data(draft):
        return
    if past_active_deadline(draft):
        return
    if draft.seen.missing_claims:
        _keep_waiting(draft, "ClaimNotFound", "; ".join(draft.seen.missing_claims))
        draft.wake_at(draft.now + 10)
        return
    not_before = seconds(status.queueing.not_before)
    if not_before is not None and draft.now < not_before:
        # Why the gang gave way stays to be read until it may try again.
        draft.wake_at(not_before)
        return
    verdict = draft.seen.admission
    if verdict is not None and verdict.reason == "LargerThanCluster" and forgive(draft):
        verdict = None
    if verdict is None:
        _keep_waiting(draft, "Queued", "waits for the admission check")
    elif not verdict.fits:
        _keep_waiting(draft, verdict.reason, verdict.message)
    else:
        admit(draft)


def _held(draft: Draft, hold: carbonhold.Hold) -> None:
    """Pending until it ran for the first time, then Suspended: that time is not counted against its active deadline."""
    status = draft.status
    ran = status.admitted_at is not None
    status.suspended_at = (status.suspended_at or stamp(draft.now)) if ran else None
    carbonhold.begin(draft, hold)
    draft.enter(Phase.SUSPENDED if ran else Phase.PENDING, hold.reason, hold.message)


def _keep_waiting(draft: Draft, reason: str, message: str) -> None:
    before = condition(draft.status, ConditionType.ADMITTED)
    if draft.status.phase != Phase.PENDING or before is None or before.reason != reason:
        draft.note(reason, message, warning=reason in ("LargerThanCluster", "ClaimNotFound"))
    draft.enter(Phase.PENDING, reason, message)


def admit(draft: Draft) -> None:
    status, spec = draft.status, draft.spec
    status.admitted_spec = snapshot(spec)
    status.admitted_at = status.admitted_at or stamp(draft.now)
    status.carbon_hold.runs_since = stamp(draft.now)
    status.queueing.not_before = None
    begin_attempt(draft)
    room = draft.seen.admission.pods if draft.seen.admission is not None else None
    pods = spec.replicas.desired + spec.replicas.spares if room is None else room
    size = spec.replicas.fit(pods) or spec.replicas.desired
    status.slots = fresh_slots(size, status.attempt, max(0, pods - size))
    status.sizing.not_before = None
    status.sizing.asked_at = stamp(draft.now)
    few = f" of {spec.replicas.desired}" if size < spec.replicas.desired else ""
    status.sizing.reason = f"there was room for {size}{few} when it was admitted" if few else ""
    spare = f" and {pods - size} spares" if pods > size else ""
    again = f" from step {status.resume_from.step}" if status.resume_from else ""
    draft.enter(Phase.STARTING, "Admitted", f"admitted; attempt {status.attempt} starts {size}{few} pods{spare}{again}")
    draft.note("Admitted", f"room for a gang of {size}{few}{spare}; attempt {status.attempt}{again}")

"""What is only told after the answer to a failure has been decided: its real cause, and pods that fell with it. Pure.

Peers of a failed rank often report first, and a dead node is noticed last. Until the gang runs again, what belongs to
the failure that is being recovered from corrects it instead of counting as another one.
"""

from __future__ import annotations

from trireme_api.job import Phase
from trireme_api.protocol import retryable

from trireme_operator.decide import recovery
from trireme_operator.decide.clock import stamp
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.gang import Place
from trireme_operator.decide.recovery import SAVED, STRENGTH, Breakdown
from trireme_operator.decide.resizing import replace_lost
from trireme_operator.decide.rules import ruled
from trireme_operator.decide.steps import begin_attempt, end


def absorb(draft: Draft) -> bool:
    """Takes late news about the failure that began this recovery into it. True: the status has moved on."""
    status = draft.status
    failure, recent = status.last_failure, status.restarts.recent
    if status.phase != Phase.RECOVERING or failure is None or not recent or recent[-1].attempt != status.attempt:
        return False
    late = [
        found
        for place in draft.found
        if _behind(draft, place, failure.attempt)
        and (found := recovery.breakdown(place, failure.attempt, draft.now, draft.seen.limits)) is not None
    ]
    roots = [item for item in late if not item.cascade and item.rule != SAVED]
    if failure.cascade and roots and _correct(draft, recovery.first_failure(roots)):
        return True
    lost = {item.slot for item in late} - {p.slot.index for p in draft.found if draft.alive(p)}
    if not lost:
        return False
    # A new attempt, so that no pod can be on both sides of the barrier; no new restart, for it is the same failure.
    begin_attempt(draft)
    helped = replace_lost(draft, lost, ())
    if STRENGTH[recent[-1].action] < STRENGTH["ReplacePod"]:
        recent[-1].action = "ReplacePod"
    recent[-1].attempt = status.attempt
    names = ", ".join(item.pod or f"slot {item.slot}" for item in late if item.slot in lost)
    again = f"replaced in the same recovery, attempt {status.attempt}{helped}"
    message = f"{names} fell with it: {late[0].message}; {again}"
    draft.enter(Phase.RECOVERING, "ReplacePod", message)
    draft.note("AlsoLost", message, warning=True)
    return True


def _behind(draft: Draft, place: Place, failed: int) -> bool:
    """Its pod was there when the failure happened, and its agent is known not to hold the new attempt yet: so the
    barrier has not been passed. Each slot can be behind only once, for its next pod is made for a newer attempt."""
    if place.slot.incarnation > failed:
        return False
    if place.heard is None:
        # Unheard although it ran before: the operator has been started anew, and what has ended will tell no more.
        return place.pod is not None and place.pod.over
    return place.heard.report.attempt < draft.status.attempt


def _correct(draft: Draft, root: Breakdown) -> bool:
    """What was taken for the failure was its consequence; True if the job ends for the real one."""
    status, policy = draft.status, draft.spec.failure_policy
    root, rule = ruled(policy, root)
    failure, record = status.last_failure, status.restarts.recent[-1]
    assert failure is not None
    by_cause = status.restarts.by_cause
    by_cause[failure.cause.value] -= 1
    by_cause = {cause: count for cause, count in by_cause.items() if count}
    by_cause[root.cause.value] = by_cause.get(root.cause.value, 0) + 1
    status.restarts.by_cause = by_cause
    draft.note("FailureFound", f"it began with {root.pod or f'slot {root.slot}'}: {root.message}", warning=True)
    failure.cause, failure.message, failure.rule, failure.cascade = root.cause, root.message, root.rule, False
    failure.rank, failure.pod, failure.node, failure.exit = root.rank, root.pod or None, root.node or None, root.exit
    failure.at = min(failure.at, stamp(root.at))
    record.cause, record.charged, record.taken, record.node = root.cause, root.charged, root.taken, root.node or None
    if rule is not None and rule.action == "Fail":
        end(draft, Phase.FAILED, "FailureRule", f"rule {rule.name}: {root.cause.value}: {root.message}")
        return True
    if not retryable(root.cause) and (rule is None or rule.action == "Ladder"):
        end(draft, Phase.FAILED, "NotRetryable", f"{root.cause.value}: {root.message}")
        return True
    return False

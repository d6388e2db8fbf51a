"""carbonPolicy: whether a job waits for a cleaner grid, pauses in dirty hours, or has used up its carbon. Pure.

A pause is a suspension: ranks agree on a step, save, give the nodes back, and go on exactly there. Nothing waits past
`deadline`: from then on only the budget holds a job back.
"""

from __future__ import annotations

from dataclasses import dataclass

from trireme_api import carbon
from trireme_api.job import ConditionType, Phase

from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.conditions import condition, set_condition
from trireme_operator.decide.draft import Draft

DIRTY, SPENT = "DirtyGrid", "CarbonBudgetSpent"
RESUME_SHARE = 0.9
"""Of pauseAbove, where startBelow does not say when to go on: a grid at the bound must not make the gang flap."""


@dataclass(frozen=True)
class Hold:
    reason: str
    message: str


def to_start(draft: Draft) -> Hold | None:
    """Why a job without pods may not start or go on yet."""
    return _spent(draft) or _dirty(draft, _start_limit(draft), "starts" if _never_ran(draft) else "goes on")


def asks(draft: Draft) -> str:
    """Not empty while the provider has yet to tell whether a job without pods may start or go on: no job starts on a
    yearly average in the seconds that this takes."""
    deadline = seconds(draft.spec.carbon_policy.deadline)
    if not draft.grid.asking or _start_limit(draft) is None or deadline is None or draft.now >= deadline:
        return ""
    draft.wake_at(deadline)
    return f"{draft.grid.asking} is asked for the grid's carbon intensity"


def to_stop(draft: Draft) -> Hold | None:
    """Why a gang that holds its nodes must save and give them back."""
    spent = _spent(draft)
    if spent is not None or draft.status.phase != Phase.RUNNING:
        return spent
    policy, since = draft.spec.carbon_policy, seconds(draft.status.carbon_hold.runs_since)
    if policy.pause_above is None or not _above(draft, policy.pause_above):
        return None
    if since is not None and draft.now < since + policy.minimum_run_seconds:
        draft.wake_at(since + policy.minimum_run_seconds)
        return None
    return _dirty(draft, policy.pause_above, "pauses; goes on", _resume_limit(draft))


def begin(draft: Draft, hold: Hold) -> None:
    """Writes down that it is held from now on."""
    held = draft.status.carbon_hold
    if held.reason == hold.reason:
        return
    held.reason, held.since = hold.reason, stamp(draft.now)
    if draft.status.slots:
        held.pauses += 1
    draft.note(hold.reason, hold.message, warning=hold.reason == SPENT)


def lift(draft: Draft) -> None:
    held = draft.status.carbon_hold
    if held.reason is not None:
        held.reason = held.since = None
        draft.note("CarbonHoldEnded", _now(draft))


def tell(draft: Draft) -> None:
    """The conditions that carbon has of its own, with an event when they turn true."""
    spent, trouble = _over_budget(draft), draft.grid.trouble
    _set(draft, ConditionType.OVER_CARBON_BUDGET, "CarbonBudgetSpent" if spent else "WithinBudget", spent)
    instead = f"; {draft.grid.reported.source} is used instead" if draft.grid.reported is not None else ""
    text = f"{trouble}{instead}" if trouble else ""
    _set(draft, ConditionType.INTENSITY_FALLBACK, "NoLiveIntensity" if text else "Live", text)


def _set(draft: Draft, kind: ConditionType, reason: str, text: str) -> None:
    before = condition(draft.status, kind)
    set_condition(draft.status, kind, bool(text), reason, text, draft.now, draft.job.generation)
    if text and (before is None or before.status != "True"):
        draft.note(reason, text, warning=True)


# --- the budget -----------------------------------------------------------------------------------------------------


def _over_budget(draft: Draft) -> str:
    """Empty while it is not known to be."""
    budget, used = draft.spec.carbon_policy.budget_grams, draft.status.carbon.total_grams
    if budget is None or used is None or used <= budget:
        return ""
    return f"{carbon.mass(used)} of CO2e are more than carbonPolicy.budgetGrams ({carbon.mass(budget)})"


def _spent(draft: Draft) -> Hold | None:
    text = _over_budget(draft)
    if not text or draft.spec.carbon_policy.on_budget != "suspend":
        return None
    return Hold(SPENT, f"{text}; raise it, or set onBudget to warn, to go on")


# --- the grid -------------------------------------------------------------------------------------------------------


def _never_ran(draft: Draft) -> bool:
    return draft.status.admitted_at is None


def _resume_limit(draft: Draft) -> float | None:
    policy = draft.spec.carbon_policy
    if policy.start_below is not None:
        return policy.start_below
    return policy.pause_above * RESUME_SHARE if policy.pause_above is not None else None


def _start_limit(draft: Draft) -> float | None:
    policy = draft.spec.carbon_policy
    if _never_ran(draft):
        return policy.start_below if policy.start_below is not None else policy.pause_above
    if draft.status.carbon_hold.reason == DIRTY:
        return _resume_limit(draft)
    return policy.pause_above  # it gave its place back for another reason: only a dirty hour keeps it from coming back


def _above(draft: Draft, limit: float | None) -> bool:
    """Before the deadline, with an intensity that is known to be above the limit."""
    deadline, signal = seconds(draft.spec.carbon_policy.deadline), draft.grid.signal
    if limit is None or signal is None or deadline is None or draft.now >= deadline:
        return False
    return signal.grams_per_kilowatt_hour > limit


def _dirty(draft: Draft, limit: float | None, what: str, until: float | None = None) -> Hold | None:
    policy = draft.spec.carbon_policy
    if not _above(draft, limit):
        return None
    deadline = seconds(policy.deadline)
    assert deadline is not None
    draft.wake_at(deadline)
    bound = until if until is not None else limit
    return Hold(DIRTY, f"{_now(draft)}; {what} at {bound:g} or less, at the latest at {policy.deadline}")


def _now(draft: Draft) -> str:
    signal = draft.grid.signal
    if signal is None:
        return "the grid's intensity is not known"
    return f"the grid has {signal.grams_per_kilowatt_hour:g} g/kWh ({signal.source})"

"""Phase, conditions and explanation always agree, because one table makes the conditions from the phase."""

from __future__ import annotations

from trireme_api.job import Condition, ConditionType, Phase, TrainingJobStatus

from trireme_operator.decide.clock import stamp

C = ConditionType
# What each phase says: the first condition is the one that carries the phase's own reason and message.
_TABLE: dict[Phase, dict[ConditionType, bool]] = {
    Phase.INVALID: {C.INVALID: True, C.ADMITTED: False, C.RUNNING: False},
    Phase.PENDING: {
        C.ADMITTED: False, C.INVALID: False, C.INITIALIZED: False, C.RUNNING: False, C.SUSPENDED: False,
        C.RECOVERING: False, C.WAITING_FOR_DATA: False,
    },
    Phase.STARTING: {
        C.INITIALIZED: False, C.ADMITTED: True, C.INVALID: False, C.RUNNING: False, C.SUSPENDED: False,
        C.RECOVERING: False, C.WAITING_FOR_DATA: False,
    },
    Phase.RUNNING: {C.RUNNING: True, C.ADMITTED: True, C.INITIALIZED: True, C.RECOVERING: False, C.SUSPENDED: False},
    Phase.RECOVERING: {C.RECOVERING: True, C.ADMITTED: True, C.RUNNING: False, C.SUSPENDED: False},
    Phase.SUSPENDING: {C.SUSPENDED: False, C.ADMITTED: True, C.RUNNING: False, C.RECOVERING: False},
    Phase.SUSPENDED: {
        C.SUSPENDED: True, C.ADMITTED: False, C.INVALID: False, C.INITIALIZED: False, C.RUNNING: False,
        C.RECOVERING: False, C.WAITING_FOR_DATA: False,
    },
    Phase.WAITING: {
        C.WAITING_FOR_DATA: True, C.ADMITTED: False, C.INVALID: False, C.INITIALIZED: False, C.RUNNING: False,
        C.RECOVERING: False, C.SUSPENDED: False,
    },
    Phase.SUCCEEDED: {C.SUCCEEDED: True, C.RUNNING: False, C.RECOVERING: False, C.SUSPENDED: False},
    Phase.FAILED: {C.FAILED: True, C.RUNNING: False, C.RECOVERING: False, C.SUSPENDED: False},
}  # fmt: skip
_ONLY_IF_PRESENT = frozenset({
    C.INVALID, C.SUSPENDED, C.RECOVERING, C.EDIT_IGNORED, C.SHRUNK, C.OVER_CARBON_BUDGET, C.INTENSITY_FALLBACK,
    C.WAITING_FOR_DATA,
})  # fmt: skip
"""False is the default of these: not worth a line until they have been true."""
_FALSE_REASON = {Phase.SUSPENDING: "Suspending", Phase.SUSPENDED: "Suspended"}


def set_condition(
    status: TrainingJobStatus, kind: ConditionType, value: bool, reason: str, message: str, now: float, generation: int
) -> None:
    """Sets one condition; the transition time moves only when the truth does."""
    text = "True" if value else "False"
    old = next((item for item in status.conditions if item.type == kind), None)
    if old is None and not value and kind in _ONLY_IF_PRESENT and reason not in ("Suspending",):
        return
    moved = old is None or old.status != text
    new = Condition(
        type=kind,
        status="True" if value else "False",
        reason=reason,
        message=message,
        last_transition_time=stamp(now) if moved or old is None else old.last_transition_time,
        observed_generation=generation,
    )
    if old is None:
        status.conditions.append(new)
    else:
        status.conditions[status.conditions.index(old)] = new


def condition(status: TrainingJobStatus, kind: ConditionType) -> Condition | None:
    return next((item for item in status.conditions if item.type == kind), None)


def enter(status: TrainingJobStatus, phase: Phase, reason: str, message: str, now: float, generation: int) -> None:
    """Puts the job into a phase (or says why it is still in it): conditions and explanation follow."""
    status.phase = phase
    status.reason = reason
    status.explanation = message
    status.observed_generation = generation
    main = next(iter(_TABLE[phase]))
    for kind, value in _TABLE[phase].items():
        if kind == main:
            set_condition(status, kind, value, reason, message, now, generation)
            continue
        old = condition(status, kind)
        if old is not None and old.status == ("True" if value else "False"):
            old.observed_generation = generation
            continue
        set_condition(status, kind, value, _FALSE_REASON.get(phase, phase.value), "", now, generation)

"""When the gang changes its size: spares first, then a smaller size, waiting last, growth at a checkpoint.

A change of size is a new attempt. A wished one (growth, scaling) is written to status first (`sizing.target`); the
ranks then agree on a step and save, their pods stay, and the next attempt goes on from that very step. None of it is
charged to the restart budgets; the failure that made a gang shrink is.
"""

from __future__ import annotations

from collections.abc import Collection

from trireme_api.job import Phase, Slot
from trireme_api.protocol import AgentState

from trireme_operator.decide import sizing
from trireme_operator.decide.clock import duration, seconds, stamp
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.frozen import with_replicas
from trireme_operator.decide.gang import Place, occupied
from trireme_operator.decide.sizing import Cast
from trireme_operator.decide.steps import begin_attempt

SAVE_MARGIN_SECONDS = 30.0
"""Beyond the pods' own grace, before a gang that does not save is cast anew all the same."""
UNSCHEDULABLE_SECONDS = 2.0
"""The scheduler's word that no node takes a pod is believed after so long: a pod that is just leaving makes room."""
UNDECIDED_SECONDS = 2.0


def ready_spares(draft: Draft) -> list[int]:
    """Spares that can take a place at once: placed, recorded, heard and waiting."""
    waiting = (AgentState.WAITING,)
    return [
        p.slot.index
        for p in draft.spares
        if p.slot.pod_uid is not None and draft.alive(p) and p.heard is not None and p.heard.report.state in waiting
    ]


def replace_lost(draft: Draft, stricken: Collection[int], renewed: Collection[int]) -> str:
    """After a failure, in a new attempt: the same size. Returns in words what was done beyond new pods."""
    status = draft.status
    cast = sizing.recast(status.slots, status.attempt, stricken=stricken, renewed=renewed, ready=ready_spares(draft))
    status.slots = cast.slots
    if not cast.promoted:
        return ""
    names = ", ".join(_pods(draft, cast.promoted))
    draft.note("SpareUsed", f"{names} took the place of a lost pod")
    return f"; {names} of the spares took its place"


def resize(draft: Draft) -> bool:
    """Everything about size for a gang in which nothing broke. True: a decision that nothing else may follow."""
    status = draft.status
    _remember(draft)
    if status.sizing.target is not None:
        return _await_saving(draft)
    if status.phase == Phase.RUNNING:
        if _scale_down(draft) or _grow(draft):
            return True
    elif _shrink(draft):
        return True
    _staff(draft)
    return False


def _remember(draft: Draft) -> None:
    """The number of nodes is the one part of an admitted spec that may change: it is written with it."""
    status, replicas = draft.status, draft.spec.replicas
    if status.admitted_spec is not None and draft.job.spec is not None:
        status.admitted_spec = with_replicas(status.admitted_spec, replicas)
    if draft.job.status.replicas.desired not in (0, replicas.desired):
        status.sizing.not_before = None  # somebody wants another size, and need not wait for old trouble
        status.sizing.scaled = True
        draft.note("Scaled", f"spec.replicas.desired: from {draft.job.status.replicas.desired} to {replicas.desired}")
    elif len(draft.found) == replicas.desired:
        status.sizing.scaled = False


# --- wished changes -------------------------------------------------------------------------------------------------


def _scale_down(draft: Draft) -> bool:
    size, desired = len(draft.found), draft.spec.replicas.desired
    if desired >= size:
        return False
    _ask(draft, desired, "ScalingDown", f"spec.replicas asks for {desired} nodes of the {size}")
    return True


def _grow(draft: Draft) -> bool:
    """Ready spares make the gang larger as soon as they suffice for a permitted size; those that would stay spares do
    not count against it: a full gang goes before full spares."""
    size, ready = len(draft.found), ready_spares(draft)
    goal = draft.spec.replicas.fit(size + len(ready)) or size
    if goal <= size or not _comes_back_exactly(draft):
        return False
    if _too_early(draft):
        return False
    _ask(draft, goal, "Growing", f"{goal - size} more pods are ready for a gang of {goal}")
    return True


def _comes_back_exactly(draft: Draft) -> bool:
    """A job without checkpoints would lose all it has done: it grows only where somebody has just asked for it."""
    status = draft.status
    return draft.spec.checkpoint is not None or status.last_checkpoint is not None or status.sizing.scaled


def _too_early(draft: Draft) -> bool:
    not_before = seconds(draft.status.sizing.not_before)
    if not_before is None or draft.now >= not_before:
        return False
    draft.wake_at(not_before)
    return True


def _ask(draft: Draft, target: int, reason: str, message: str) -> None:
    chosen = draft.status.sizing
    chosen.target, chosen.since, chosen.reason = target, stamp(draft.now), message
    draft.enter(Phase.RUNNING, reason, f"{message}; ranks agree on a step and save, their pods stay")
    draft.note(reason, message)


def _await_saving(draft: Draft) -> bool:
    """Ranks save; when all have, or time is up, the next attempt begins with the new cast."""
    status = draft.status
    began = seconds(status.sizing.since) or draft.now
    until = began + draft.spec.template.termination_grace_period_seconds + SAVE_MARGIN_SECONDS
    saving = [p for p in draft.found if draft.alive(p) and not p.says(status.attempt, AgentState.EXITED)]
    if saving and draft.now < until:
        draft.wake_at(until)
        return True
    usable = {p.slot.index for p in draft.found if draft.alive(p)}
    ready = ready_spares(draft)
    target = status.sizing.target or len(draft.found)
    before = len(draft.found)
    size = min(target, draft.spec.replicas.fit(len(usable) + len(ready)) or before)
    cast = sizing.resized(status.slots, size, usable=usable, ready=ready)
    begin_attempt(draft)
    if cast is None:  # pods were lost meanwhile: the same size again, with new pods for them
        lost = {p.slot.index for p in draft.found} - usable
        cast = sizing.recast(status.slots, status.attempt, stricken=lost, renewed=(), ready=ready)
    why = "" if not saving else f"; {len(saving)} pods did not save in time"
    _begin(draft, cast, before, f"{status.sizing.reason}{why}", "Grown" if cast.size > before else "ScaledDown")
    return True


# --- forced ones ----------------------------------------------------------------------------------------------------


def _shrink(draft: Draft) -> bool:
    """A gang that waits for pods which find no place goes on without them, if a smaller size is permitted."""
    status, limits = draft.status, draft.seen.limits
    began = seconds(status.attempt_started_at) or draft.now
    homeless = [p for p in draft.found if _homeless(draft, p)]
    before = len(draft.found)
    too_many = before - draft.spec.replicas.desired
    if not homeless and too_many <= 0:
        return False
    told = any(p.pod is not None and p.pod.unschedulable for p in homeless)
    patience = 0.0 if too_many > 0 else UNSCHEDULABLE_SECONDS if told else limits.shrink_seconds
    usable = {p.slot.index for p in draft.found} - {p.slot.index for p in homeless}
    ready = ready_spares(draft)
    size = draft.spec.replicas.fit(len(usable) + len(ready))
    if size is None:
        return False
    if draft.now < began + patience:
        draft.wake_at(began + patience)
        return False
    cast = sizing.resized(status.slots, size, usable=usable, ready=ready)
    if cast is None:
        return False
    begin_attempt(draft)
    if cast.size >= before:
        _begin(draft, cast, before, f"{len(homeless)} pods found no node; spares took their places", "SpareUsed")
        return True
    if too_many <= 0:
        _note_shrink(draft)
        why = next((p.pod.unschedulable for p in homeless if p.pod is not None and p.pod.unschedulable), "")
        reason = f"{len(homeless)} of {before} pods found no node" + (f" ({why})" if why else "")
        _begin(draft, cast, before, reason, "Shrunk")
    else:
        _begin(draft, cast, before, f"spec.replicas asks for {size} nodes", "ScaledDown")
    return True


def _homeless(draft: Draft, place: Place) -> bool:
    """Its pod has no node. One that waits for its predecessor to leave will have one."""
    if place.pod is None:
        return place.slot.pod_uid is None and not occupied(place.slot, draft.job, draft.seen, draft.now)
    return not place.pod.over and not place.pod.node


def _note_shrink(draft: Draft) -> None:
    chosen, window = draft.status.sizing, draft.spec.failure_policy.window_seconds
    recent = [at for at in chosen.shrunk_at if draft.now - (seconds(at) or 0.0) < window]
    chosen.shrunk_at = [*recent[-15:], stamp(draft.now)]
    chosen.not_before = stamp(draft.now + sizing.snooze(len(chosen.shrunk_at), draft.seen.limits.snooze_seconds))


def _begin(draft: Draft, cast: Cast, before: int, why: str, reason: str) -> None:
    """The new attempt has its gang."""
    status = draft.status
    status.slots = cast.slots
    status.sizing.reason = why
    at = f" from step {status.resume_from.step}" if status.resume_from else ""
    change = f"with {cast.size} nodes instead of {before}" if cast.size != before else f"again with {before} nodes"
    message = f"attempt {status.attempt} starts {change}{at}: {why}"
    recent = status.restarts.recent
    if status.phase == Phase.RECOVERING and recent and recent[-1].attempt == status.attempt - 1:
        recent[-1].attempt = status.attempt  # the same recovery goes on, under the same time limit
    phase = Phase.RECOVERING if status.phase == Phase.RECOVERING else Phase.STARTING
    draft.enter(phase, reason, message)
    draft.note(reason, message, warning=reason == "Shrunk")


# --- spares ---------------------------------------------------------------------------------------------------------


def _staff(draft: Draft) -> None:
    """Keeps as many spares as asked for and as growth needs: lost ones are given up, new ones asked for where there is
    room. Touches no slot that has ranks."""
    status, replicas, now = draft.status, draft.spec.replicas, draft.now
    keep = [p.slot for p in draft.spares if _still_wanted(draft, p)]
    over = sizing.surplus(replicas, len(draft.found), len(keep))
    keep = keep[: len(keep) - over]
    kept = {slot.index for slot in keep}
    status.slots = [slot for slot in status.slots if not slot.spare or slot.index in kept]
    if status.phase != Phase.RUNNING or len(draft.found) + len(keep) >= replicas.desired + replicas.spares:
        return
    if _too_early(draft) or not (_comes_back_exactly(draft) or replicas.spares):
        return
    room = _room(draft)
    more = sizing.extra(replicas, len(draft.found), len(keep), room) if room else 0
    if not more:
        return
    taken = [pod.slot for pod in draft.seen.pods]
    status.slots += [
        Slot(index=index, incarnation=status.attempt, spare=True)
        for index in sizing.free_indices(draft.job.status.slots, taken, more)
    ]
    status.sizing.asked_at = stamp(now)
    draft.note("SparesAdded", f"room for {more} more pods: they are placed and get ready beside the running gang")


def _still_wanted(draft: Draft, place: Place) -> bool:
    status, now = draft.status, draft.now
    if place.pod is None and place.slot.pod_uid is None:
        homeless = True
    elif not draft.alive(place):
        draft.note("SpareLost", f"spare pod of slot {place.slot.index} is lost", warning=True)
        return False
    else:
        assert place.pod is not None
        homeless = not place.pod.node
    if not homeless:
        return True
    asked = seconds(status.sizing.asked_at) or seconds(status.attempt_started_at) or now
    until = asked + draft.seen.limits.gang_seconds
    if now < until:
        draft.wake_at(until)
        return True
    wait = sizing.snooze(len(status.sizing.shrunk_at) + 1, draft.seen.limits.snooze_seconds)
    status.sizing.not_before = stamp(now + wait)
    draft.note("NoRoom", f"a spare pod found no node; asked for again in {duration(wait)}", warning=True)
    return False


def _room(draft: Draft) -> int:
    """Further pods that would fit now; 0 while that is not known."""
    verdict = draft.seen.admission
    if verdict is None:
        draft.wake_at(draft.now + UNDECIDED_SECONDS)
        return 0
    if verdict.pods is None:
        return draft.spec.replicas.desired + draft.spec.replicas.spares if verdict.fits else 0
    return verdict.pods


def _pods(draft: Draft, indices: Collection[int]) -> list[str]:
    return [p.pod.name for p in draft.spares if p.slot.index in indices and p.pod is not None]

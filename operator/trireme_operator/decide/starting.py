"""From pods created to all ranks running: what is still awaited, in words, and how long a recovery took."""

from __future__ import annotations

from trireme_api.job import Phase, TrainingJobStatus
from trireme_api.protocol import AgentState

from trireme_operator.decide.assignments import newest_in_memory
from trireme_operator.decide.clock import seconds
from trireme_operator.decide.draft import Draft


def starting(draft: Draft) -> None:
    status = draft.status
    if draft.found and all(place.says(status.attempt, AgentState.RUNNING) for place in draft.found):
        _recovery_times(draft)
        kept = newest_in_memory(status, draft.spec, draft.found)
        at = f" from step {status.resume_from.step}" if status.resume_from else ""
        at = f" from step {kept.step} in {kept.path}" if kept else at
        draft.enter(Phase.RUNNING, "AllRanksRun", f"attempt {status.attempt} runs on {len(draft.found)} nodes{at}")
        draft.note("Running", f"all ranks of attempt {status.attempt} run{at}")
        return
    began = f"attempt {status.attempt}: {hold_up(draft)}"
    assert status.phase is not None
    if status.phase == Phase.STARTING:
        draft.enter(Phase.STARTING, _reason(draft), began)
    elif status.last_failure is not None:
        draft.enter(Phase.RECOVERING, status.restarts.recent[-1].action if status.restarts.recent else "Restart", began)


def _recovery_times(draft: Draft) -> None:
    """The parts of the last recovery, each a duration within one clock."""
    status = draft.status
    failure, began = status.last_failure, seconds(status.attempt_started_at)
    if failure is None or began is None or not _recovers(status):
        return
    phases = failure.phases
    phases.replace = round(max(0.0, draft.now - began), 3)
    told = [p.heard.report.phases for p in draft.found if p.heard is not None and p.heard.report.phases is not None]
    stops = [t.stopped - t.assigned for t in told if t.stopped and t.assigned and t.stopped >= t.assigned]
    phases.fence = round(max(stops), 3) if stops else None


def _recovers(status: TrainingJobStatus) -> bool:
    """Whether this attempt is the answer to the last failure."""
    recent = status.restarts.recent
    return bool(recent) and recent[-1].attempt == status.attempt


def _reason(draft: Draft) -> str:
    waiting = next((p.pod.waiting for p in draft.found if p.pod is not None and _is_trouble(p.pod.waiting)), None)
    return waiting or ("CreateFailed" if draft.seen.write_error else "PodsStarting")


def _is_trouble(reason: str) -> bool:
    return reason not in ("", "PodInitializing", "ContainerCreating")


def hold_up(draft: Draft) -> str:
    """What the start is waiting for, in words with a remedy where there is one."""
    attempt = draft.status.attempt
    if draft.seen.write_error:
        return f"pods cannot be created: {draft.seen.write_error}"
    for place in draft.found:
        pod = place.pod
        if pod is None or pod.over:
            continue
        if pod.unschedulable:
            return f"{pod.name} finds no node: {pod.unschedulable}"
        if _is_trouble(pod.waiting):
            remedy = "; check spec.template.image and imagePullSecrets" if "Image" in pod.waiting else ""
            return f"{pod.name}: {pod.waiting}: {pod.waiting_message}{remedy}"
    absent = sum(place.pod is None for place in draft.found)
    if absent:
        return f"{absent} of {len(draft.found)} pods are still to be created"
    unheard = sum(place.heard is None for place in draft.found)
    if unheard:
        return f"{unheard} of {len(draft.found)} agents have not reported yet"
    behind = sum(place.heard is not None and place.heard.report.attempt != attempt for place in draft.found)
    if behind:
        return f"{behind} of {len(draft.found)} pods do not hold the attempt yet"
    return "ranks are starting"


def first_step_times(draft: Draft) -> None:
    """Completes the times of the last recovery when the first rank tells that the first new step is done."""
    failure, told = draft.status.last_failure, None
    if draft.found and draft.found[0].says(draft.status.attempt, AgentState.RUNNING):
        assert draft.found[0].heard is not None
        told = draft.found[0].heard.report.phases
    if failure is None or told is None or not _recovers(draft.status):
        return
    if told.first_step is None or failure.phases.first_step is not None:
        return
    failure.phases.rendezvous = _between(told.started, told.rendezvous)
    failure.phases.load = _between(told.rendezvous, told.loaded)
    failure.phases.first_step = _between(told.loaded, told.first_step)


def _between(begin: float | None, end: float | None) -> float | None:
    return round(end - begin, 3) if begin is not None and end is not None and end >= begin else None

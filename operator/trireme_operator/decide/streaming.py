"""Jobs that learn from a stream of mega-batches (`recipe.anytime`). Pure.

At the end of a session its ranks save and end with exit code 75, unasked. Has the next session's data arrived, the gang
goes on with it in place, as a new attempt; else it gives its nodes back, and the job waits. How far it has come follows
from the newest checkpoint alone, so there is nothing here that a crash could tear apart.
"""

from __future__ import annotations

from trireme_api.anytime import Stream, StreamStatus
from trireme_api.job import Phase, TrainingJobSpec, TrainingJobStatus
from trireme_api.protocol import AgentState, Cause, ExitCode

from trireme_operator.decide.clock import seconds, stamp
from trireme_operator.decide.draft import Draft
from trireme_operator.decide.gang import Place
from trireme_operator.decide.steps import begin_attempt, end, give_back


def session_ended(draft: Draft) -> bool:
    """Whether all ranks have ended at the end of a session; then what follows has been written."""
    status, stream = draft.status, stream_of(draft.spec)
    step = _step(status)
    if stream is None or not stream.begins(step) or not draft.found:
        return False
    if not all(_saved(place, status.attempt) for place in draft.found):
        return False
    at, needed = progress(draft, stream, step), stream.needed(step)
    if needed > stream.spec.arrived:
        give_back(draft)
        at.waiting_since = stamp(draft.now)
        _enter_waiting(draft, at, step)
        return True
    if not all(draft.alive(place) for place in draft.found):
        return False  # a pod is being taken away: answered like any other loss, and the session begins with the new one
    resumed = status.resume_from.step if status.resume_from else 0
    if at.told >= needed and resumed >= step:
        # These ranks knew of it, did nothing and found nothing: to start them again would go on for ever.
        end(
            draft, Phase.FAILED, "MegaBatchMissing",
            f"{Cause.DATA.value}: spec.recipe.anytime.arrived says {stream.spec.arrived}, but the ranks found no "
            f"mega-batch {at.trained + 1}: see their log for the path",
        )  # fmt: skip
        return True
    begin_attempt(draft)
    message = (
        f"trained on {at.trained} of {at.of} mega-batches at step {step}; attempt {status.attempt} goes on with "
        f"mega-batch {_range(at.trained + 1, needed)}"
    )
    draft.enter(Phase.STARTING, "NextSession", message)
    draft.note("NextSession", message)
    return True


def waits_for_data(draft: Draft) -> bool:
    """Whether a job without nodes lacks the data of its next session; then it has been put into that phase."""
    status, stream = draft.status, stream_of(draft.spec)
    if stream is None:
        _waited(draft)
        return False
    step = _step(status)
    at = progress(draft, stream, step)
    if not lacks_data(draft.spec, status):
        if status.phase == Phase.WAITING:
            draft.note("DataArrived", f"{stream.spec.arrived} of {at.of} mega-batches have arrived")
        _waited(draft)
        return False
    at.waiting_since = at.waiting_since or stamp(draft.now)
    _enter_waiting(draft, at, step)
    return True


def lacks_data(spec: TrainingJobSpec, status: TrainingJobStatus) -> bool:
    """Whether the mega-batches of the session in turn have yet to arrive."""
    stream = stream_of(spec)
    return stream is not None and stream.needed(_step(status)) > stream.spec.arrived


def progress(draft: Draft, stream: Stream, step: int) -> StreamStatus:
    """`status.stream`, brought up to date."""
    at = draft.status.stream = draft.status.stream or StreamStatus()
    at.trained, at.needed, at.of = stream.trained(step), stream.needed(step), stream.spec.mega_batches
    return at


def stream_of(spec: TrainingJobSpec) -> Stream | None:
    return spec.recipe.stream if spec.recipe is not None else None


def stop_waiting(draft: Draft) -> None:
    """Suspended or ended meanwhile: the time until now was spent waiting."""
    _waited(draft)


def _step(status: TrainingJobStatus) -> int:
    return status.last_checkpoint.step if status.last_checkpoint else 0


def _waited(draft: Draft) -> None:
    at = draft.status.stream
    since = seconds(at.waiting_since) if at is not None else None
    if at is not None and since is not None:
        at.waited_seconds = round(at.waited_seconds + max(0.0, draft.now - since), 3)
        at.waiting_since = None


def _enter_waiting(draft: Draft, at: StreamStatus, step: int) -> None:
    new = draft.status.phase != Phase.WAITING
    lacking = f"mega-batch {_range(at.trained + 1, at.needed)}"
    message = (
        f"trained on {at.trained} of {at.of} mega-batches at step {step}; holds no nodes and waits for {lacking}: when "
        f"complete, say so with kubectl patch tj {draft.job.name} --type merge -p "
        f'\'{{"spec":{{"recipe":{{"anytime":{{"arrived":{at.needed}}}}}}}}}\''
    )
    draft.enter(Phase.WAITING, "WaitingForData", message)
    if new:
        draft.note("WaitingForData", message)


def _saved(place: Place, attempt: int) -> bool:
    """All its ranks of this attempt saved and stopped."""
    if place.heard is None or not place.says(attempt, AgentState.EXITED):
        return False
    report = place.heard.report
    codes = {rank.exit for rank in report.ranks}
    return report.failure is None and codes == {int(ExitCode.SAVED_AND_STOPPED)}


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"

"""What ranks told in their step log, in the words of a logbook: one function per event that belongs there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trireme_api import evaluation, fewshot
from trireme_api.ledger import LEDGER_STATES
from trireme_api.quantity import size

from trireme_cli.report.steplog import Event

Fields = Mapping[str, Any]


def in_words(event: Event) -> tuple[str, str] | None:
    """(title, text) of an event; None where it belongs into no logbook. One that is not as this version writes it is
    told with its fields as they stand."""
    if event.name not in TOLD:
        return None
    title, words = TOLD[event.name]
    try:
        return title, words(event.fields)
    except (KeyError, TypeError, ValueError, AttributeError):
        return title, raw(event.fields)


def raw(value: Any) -> str:
    """Anything, a little shortened."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {raw(item)}" for name, item in value.items() if item not in (None, "", []))
    text = str(value)
    return text if len(text) <= 200 else text[:199] + "…"


def _initialised(fields: Fields) -> str:
    weights, peak = size(fields["weightBytes"]), size(fields["peakBytes"])
    return f"rank 0 holds {weights} of weights; its memory at its fullest so far: {peak}"


def _resumed(fields: Fields) -> str:
    took = {"verified": fields["verifySeconds"], "moved": fields.get("moveSeconds", 0.0), "read": fields["readSeconds"]}
    times = ", ".join(f"{what} in {seconds:.3g} s" for what, seconds in took.items() if seconds)
    peers = fields.get("fromPeers")
    whence = f", {_count(peers, 'shard')} from other nodes" if peers else ""
    wrote = fields["worldSizeThen"]
    return f"at step {fields['step']:,} from {fields['path']}, written by {_count(wrote, 'rank')}{whence}; {times}"


def _rolled_back(fields: Fields) -> str:
    first, end = fields["leftOut"]
    return (
        f"to step {fields['step']:,} ({fields['path'] or 'initial values'}), {_count(fields['lostSteps'], 'step')} "
        f"lost, because of step {fields['spikeStep']:,}: {fields['reason']}; batches {first:,} to {end - 1:,} are left "
        f"out, learning rate × {fields['learningRateFactor']:.4g} from now on; rollback {fields['rollbacks']}"
    )


def _passed_over(fields: Fields) -> str:
    return f"{fields['path']}: {fields['reason']}" if fields["path"] else str(fields["reason"])


def _save_failed(fields: Fields) -> str:
    return ("in memory: " if fields.get("tier") == "memory" else "") + str(fields["reason"])


def _evaluated(fields: Fields) -> str:
    lines = fewshot.in_words(fields) if "answerLoss" in fields else evaluation.in_words(fields)
    return "; ".join([f"after step {fields['step']:,}", *lines])


def _grown(fields: Fields) -> str:
    return (
        f"after step {fields['step']:,} to {fields['parameters']:,} parameters: of each layer, expert "
        f"{', '.join(str(expert) for expert in fields['split'])} was split; no logit changed by more than "
        f"{fields['difference']:.1e} of the largest"
    )


def _session_ended(fields: Fields) -> str:
    nats = f", {fields['nats']:,.6g} nats on the fixed text" if "nats" in fields else ""
    sums = ", ".join(f"{name} {value:,.6g}" for name, value in fields["cumulative"].items())
    return (
        f"at step {fields['step']:,}, {_count(fields['megaBatches'], 'mega-batch', 'mega-batches')} seen, "
        f"{fields['parameters']:,} parameters, {fields['flops']:.4g} FLOPs in this session{nats}; cumulative: {sums}"
    )


def _ended(fields: Fields) -> str:
    spent = fields["seconds"]
    known = [state for state in LEDGER_STATES if state in spent]
    parts = ", ".join(f"{state} {spent[state]:,.1f} s" for state in known if round(spent[state], 1))
    peak = fields.get("peakMemoryBytes")
    full = f"; rank 0's memory at its fullest: {size(peak)}" if peak is not None else ""
    return f"after step {fields['step']:,}: {parts}{full}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


TOLD: dict[str, tuple[str, Callable[[Fields], str]]] = {
    "initialised": ("initial values", _initialised),
    "resumed": ("resumed", _resumed),
    "rolled-back": ("rolled back", _rolled_back),
    "checkpoint-abandoned": ("save abandoned", _passed_over),
    "checkpoint-failed": ("save failed", _save_failed),
    "checkpoint-skipped": ("checkpoint passed over", _passed_over),
    "memory-tier-off": ("no checkpoints in memory", _save_failed),
    "evaluation": ("evaluation", _evaluated),
    "grown": ("grown", _grown),
    "session-ended": ("session ended", _session_ended),
    "ended": ("ranks ended", _ended),
}
"""Events of the step log that belong into a logbook: how they are called there, and what is told of them."""

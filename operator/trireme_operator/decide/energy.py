"""Books what pods have used under the attempt that used it, each joule once, and makes carbon of it. Pure.

Agents tell counters that run from the agent's start. Of each pod the last counted values stand in status, and the
difference is added: so reports may come twice, late or out of order, and the operator may start anew at any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from trireme_api import carbon
from trireme_api.carbon.policy import AttemptEnergy, CarbonStatus, EmbodiedGrams, EnergyStatus
from trireme_api.job import TrainingJobSpec, TrainingJobStatus
from trireme_api.protocol import MISSING, SOURCES, AgentState, Hardware, Report

from trireme_operator.decide.admission import demand_of
from trireme_operator.decide.gang import HOLDING
from trireme_operator.decide.views import Node, Observed

COMPONENTS = ("gpu", "cpu", "dram")
KEPT_ATTEMPTS = 16
MAX_COUNTER = 1e15
"""What a pod tells must fit into status: 1e15 J is a thousand years of a rack."""
MAX_GPUS = 64
MAX_MODEL_CHARS = 96
BUSY = (AgentState.STARTING, AgentState.RUNNING, AgentState.STOPPING)
MODES: tuple[carbon.Mode, ...] = ("calendar", "busy")
TOKENS_PER_UNIT = 1e6


def book(
    status: TrainingJobStatus, spec: TrainingJobSpec, seen: Observed, grid: carbon.Intensity | None
) -> None:
    """Adds what the agents have told since the last time; pods that were replaced count as long as they burn."""
    energy, wants = status.energy, demand_of(spec).requests
    for pod in seen.pods:
        heard = seen.heard.get(pod.uid)
        if heard is not None:
            _count(status, pod.uid, heard.report, _share(wants, (seen.nodes or {}).get(pod.node)))
    if status.phase in HOLDING:
        # Kept until the pod is gone and its slot filled anew, so that a view that misses it once counts nothing twice.
        keep = {pod.uid for pod in seen.pods} | {slot.pod_uid for slot in status.slots}
        energy.pods = {uid: meter for uid, meter in energy.pods.items() if uid in keep}
    for row in _rows(energy):
        _price(row, spec.carbon_policy.pue, grid)
    _sum_up(energy)


def _count(status: TrainingJobStatus, uid: str, report: Report, share: float) -> None:
    """What this pod's counters have gained, to the attempt it tells of; `share` is the pod's of its machine."""
    hardware, meter = report.hardware, status.energy.pods.get(uid, {})
    told = {name: _figure(report.energy[name].joules) for name in COMPONENTS if name in report.energy}
    told["seconds"] = _figure(hardware.seconds) if hardware is not None else None
    gained = {name: now - meter.get(name, 0.0) for name, now in told.items() if now is not None}
    if meter and not any(more > 0 for more in gained.values()):
        return
    row = _row(status.energy, report.attempt if 0 < report.attempt <= status.attempt else status.attempt)
    for name, reading in report.energy.items():
        if name in told:
            weak = MISSING if told[name] is None or reading.stale else reading.source
            row.sources[name] = _weaker(row.sources.get(name), weak)
    for name, more in gained.items():
        more = max(0.0, more)
        meter[name] = round(meter.get(name, 0.0) + more, 1)
        if name == "seconds":
            assert hardware is not None
            _hold(row, hardware, more, share)
            continue
        row.joules[name] = round(row.joules.get(name, 0.0) + more, 1)
        row.unpriced_joules = round(row.unpriced_joules + more, 1)
        if report.state not in BUSY:
            row.idle_joules = round(row.idle_joules + more, 1)
    status.energy.pods[uid] = meter


def _hold(row: AttemptEnergy, hardware: Hardware, seconds: float, share: float) -> None:
    gpus = min(max(0, hardware.gpus), MAX_GPUS)
    row.pod_seconds = round(row.pod_seconds + seconds, 1)
    _add(row.host_seconds, "gpu" if gpus else "cpu", seconds * share)
    if gpus:
        _add(row.gpu_seconds, (hardware.gpu_model or "unknown")[:MAX_MODEL_CHARS], seconds * gpus)


def _add(amounts: dict[str, float], name: str, more: float) -> None:
    amounts[name] = round(amounts.get(name, 0.0) + more, 3)


def _figure(value: float | None) -> float | None:
    """A counter that a pod told, as it stands in status; None for what is none."""
    return round(value, 1) if value is not None and math.isfinite(value) and 0 <= value <= MAX_COUNTER else None


def _share(wants: Mapping[str, float], node: Node | None) -> float:
    """The largest share that a pod has of any resource of its node; the whole where the node is not known."""
    if node is None:
        return 1.0
    shares = [amount / node.allocatable[name] for name, amount in wants.items() if node.allocatable.get(name)]
    return min(1.0, max(shares, default=1.0))


def _row(energy: EnergyStatus, attempt: int) -> AttemptEnergy:
    """The row of this attempt; the oldest ones are put together."""
    if energy.older is not None and attempt <= energy.older.attempt:
        return energy.older
    row = next((row for row in energy.attempts if row.attempt == attempt), None)
    if row is None:
        row = AttemptEnergy(attempt=attempt)
        energy.attempts = sorted([*energy.attempts, row], key=lambda one: one.attempt)
        while len(energy.attempts) > KEPT_ATTEMPTS:
            energy.older = _merged(energy.older, energy.attempts.pop(0))
            if attempt <= energy.older.attempt:
                return energy.older
    return row


def _merged(older: AttemptEnergy | None, row: AttemptEnergy) -> AttemptEnergy:
    if older is None:
        return row
    for mine, theirs in (
        (older.joules, row.joules), (older.gpu_seconds, row.gpu_seconds), (older.host_seconds, row.host_seconds),
    ):  # fmt: skip
        for name, amount in theirs.items():
            _add(mine, name, amount)
    for name, source in row.sources.items():
        older.sources[name] = _weaker(older.sources.get(name), source)
    older.attempt = row.attempt
    older.idle_joules = round(older.idle_joules + row.idle_joules, 1)
    older.pod_seconds = round(older.pod_seconds + row.pod_seconds, 1)
    older.unpriced_joules = round(older.unpriced_joules + row.unpriced_joules, 1)
    if row.grams is not None:
        older.grams = round((older.grams or 0.0) + row.grams, 6)
    return older


def _rows(energy: EnergyStatus) -> list[AttemptEnergy]:
    return [*([energy.older] if energy.older else []), *energy.attempts]


def _price(row: AttemptEnergy, pue: float, grid: carbon.Intensity | None) -> None:
    """PUE goes in here, and nowhere else."""
    if grid is None or not row.joules:
        return
    more = carbon.operational_grams(row.unpriced_joules, pue, grid.grams_per_kilowatt_hour)
    row.grams = round((row.grams or 0.0) + more, 6)
    row.unpriced_joules = 0.0


def _sum_up(energy: EnergyStatus) -> None:
    rows = _rows(energy)
    energy.by_component = {
        name: round(sum(row.joules[name] for row in rows if name in row.joules), 1)
        for name in COMPONENTS
        if any(name in row.joules for row in rows)
    }
    energy.joules = round(sum(energy.by_component.values()), 1)
    energy.idle_joules = round(sum(row.idle_joules for row in rows), 1)
    known = [row.sources[name] for row in rows for name in row.joules if name in row.sources]
    energy.source = weakest(source for source in known if source != MISSING)
    energy.missing = [name for name in COMPONENTS if any(row.sources.get(name) == MISSING for row in rows)]


def weakest(sources: Iterable[str]) -> str:
    """The least trustworthy of them; `missing` where there is none."""
    return max(sources, key=_rank, default=MISSING)


def _weaker(one: str | None, other: str) -> str:
    other = other if other in SOURCES else MISSING
    return other if one is None else max(one, other, key=_rank)


def _rank(source: str) -> int:
    return SOURCES.index(source) if source in SOURCES else len(SOURCES)


# --- carbon ---------------------------------------------------------------------------------------------------------


def carbon_status(
    spec: TrainingJobSpec, energy: EnergyStatus, grid: carbon.Intensity | None, tokens: int | None
) -> CarbonStatus:
    """Grams are absent, never 0, where the energy or the grid is not known."""
    policy, rows = spec.carbon_policy, _rows(energy)
    priced = [row.grams for row in rows if row.grams is not None]
    grams = sum(priced) if priced else None
    by_mode = {mode: made for mode in MODES if (made := embodied(spec, rows, mode)) is not None}
    chosen = by_mode.get(policy.embodied.mode)
    total = None if grams is None else grams + (chosen.mid if chosen is not None else 0.0)
    rate = None
    if grams is not None and tokens and "calendar" in by_mode:
        rate = carbon.sci(grams, by_mode["calendar"].mid, tokens / TOKENS_PER_UNIT)
    at_least = "≥" if energy.missing or any(row.unpriced_joules for row in rows) else ""
    return CarbonStatus(
        grams=_rounded(grams),
        grams_per_kilowatt_hour=grid.grams_per_kilowatt_hour if grid is not None else None,
        pue=policy.pue,
        source=grid.source if grid is not None else None,
        embodied=_told(chosen),
        embodied_by_mode={mode: told for mode, made in by_mode.items() if (told := _told(made)) is not None},
        total_grams=_rounded(total),
        grams_per_million_tokens=_rounded(rate),
        summary=None if total is None else at_least + carbon.mass(total),
    )


def embodied(spec: TrainingJobSpec, rows: Iterable[AttemptEnergy], mode: carbon.Mode) -> carbon.Range | None:
    """Grams of what the hardware cost to make that fall on this job; None where agents told of no hardware."""
    policy = spec.carbon_policy.embodied
    whole, known = carbon.NOTHING, False
    for row in rows:
        kinds = {"gpu": carbon.host(1), "cpu": carbon.host(0)}
        held = [(carbon.gpu(model), policy.gpu_kilograms, time) for model, time in row.gpu_seconds.items()]
        held += [(kinds[kind], policy.host_kilograms, time) for kind, time in row.host_seconds.items() if kind in kinds]
        for device, own, time in held:
            made = device.embodied_kilograms if own is None else carbon.Range(own, own, own)
            share = carbon.embodied_share(
                time, mode=mode, life_years=policy.life_years, utilisation=policy.utilization
            )
            whole, known = whole + made * (1000 * share), True
    return whole if known else None


def _told(made: carbon.Range | None) -> EmbodiedGrams | None:
    if made is None:
        return None
    return EmbodiedGrams(low=round(made.low, 4), mid=round(made.mid, 4), high=round(made.high, 4))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


"""The pure parts of the chaos suite: a row from what a job left behind, a table from rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from demo import curve as curves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chaos import measure, table
from chaos.faults import FAULTS, chosen
from chaos.measure import PHASES, Broken

T = 1_800_000_000.0


def log(*rows: tuple[int, int, float, float]) -> list[str]:
    """(step, attempt, loss, seconds after T) → lines."""
    return [json.dumps({"step": s, "attempt": a, "loss": loss, "time": T + at}) for s, a, loss, at in rows]


STARTED = {
    "event": "started", "attempt": 2, "imported": 3.0, "rendezvous": 0.5, "initialised": 0.25, "loaded": 0.75,
    "first_step": 0.5,
}  # fmt: skip
KILLED = [
    *log((1, 1, 5.0, 0.0), (2, 1, 4.0, 1.0), (3, 1, 3.5, 2.0), (4, 1, 3.25, 3.0)),
    json.dumps(STARTED),
    *log((3, 2, 3.5, 12.0), (4, 2, 3.25, 13.0)),
]
AT = T + 3.5
STATUS: dict[str, Any] = {
    "attempt": 2,
    "attemptStartedAt": "2027-01-15T08:00:05.000Z",
    "lastFailure": {"attempt": 1, "phases": {"decide": 0.5, "fence": 0.25}},
}


def test_the_parts_of_a_recovery_add_up() -> None:
    assert measure.seconds(STATUS["attemptStartedAt"]) == T + 5
    found = measure.recovered(AT, 1, KILLED, curves.parse(KILLED), STATUS)
    assert found.total == pytest.approx(8.5)
    assert found.phases == pytest.approx(
        {
            "detect": 1.0, "decide": 0.5, "fence": 0.25, "replace": 1.75, "startup": 3.0, "rendezvous": 0.5,
            "load": 1.0, "firstStep": 0.5,
        }
    )  # fmt: skip
    assert tuple(found.phases) == PHASES
    assert sum(found.phases.values()) == pytest.approx(found.total)
    assert (found.lost_steps, found.attempts, found.twice, found.largest_difference) == (2, 1, 2, 0.0)


def test_a_kubelets_whole_second_before_the_fault_is_no_negative_detection() -> None:
    status = {**STATUS, "lastFailure": {"attempt": 1, "phases": {"decide": 2.4}}}
    phases = measure.recovered(AT, 1, KILLED, curves.parse(KILLED), status).phases
    assert (phases["detect"], phases["decide"]) == (0.0, pytest.approx(1.5))


def test_phases_of_another_failure_are_not_taken_for_this_one() -> None:
    status = {**STATUS, "lastFailure": {"attempt": 7, "phases": {}}}
    assert measure.recovered(AT, 1, KILLED, curves.parse(KILLED), status).phases == {}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (log((1, 1, 5.0, 0), (2, 1, 4.0, 1), (2, 2, 4.1, 9)), "differ by 0.1"),
        (log((1, 1, 5.0, 0), (2, 1, 4.0, 1), (4, 2, 3.0, 9)), r"steps \[3\] were never done"),
        (log((1, 1, 5.0, 0)), "no step after attempt 1"),
        (log((1, 1, 5.0, 0), (2, 2, 4.0, 9), (3, 1, 3.5, 10)), "attempt 1 wrote step 3 after attempt 2"),
    ],
)
def test_what_is_not_exact_is_broken(rows: list[str], message: str) -> None:
    with pytest.raises(Broken, match=message):
        measure.recovered(AT, 1, rows, curves.parse(rows), STATUS)


def test_a_loss_that_is_no_number_is_broken() -> None:
    rows = [*log((1, 1, 5.0, 0)), '{"step": 1, "attempt": 2, "loss": NaN, "time": 1}']
    with pytest.raises(Broken):
        measure.exact(curves.parse(rows))


def test_against_the_undisturbed_run() -> None:
    curve = curves.parse(KILLED)
    assert measure.as_undisturbed(curve, {3: 3.5, 4: 3.25, 900: 1.0}) == 2
    with pytest.raises(Broken, match="loss of step 4"):
        measure.as_undisturbed(curve, {4: 3.3})


def test_a_pause_reaches_over_both_ends() -> None:
    curve = curves.parse(log((1, 1, 5, 0), (2, 1, 5, 1), (3, 1, 5, 4), (4, 1, 5, 5)))
    assert measure.pause(curve, T + 0.5, T + 5) == 3.0
    assert measure.pause(curve, T + 4.5, T + 9) == 4.0
    assert measure.pause(curve, T + 1.5, T + 2.5) == 1.5
    with pytest.raises(Broken):
        measure.pause(curves.parse([]), T, T + 1)


def pod(slot: int, name: str, phase: str = "Running", leaving: bool = False) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "labels": {"trireme.dev/slot": str(slot)}}
    if leaving:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {"metadata": metadata, "status": {"phase": phase}}


def test_two_living_pods_of_a_slot_are_duplicates() -> None:
    fine = [pod(0, "a-0-1"), pod(1, "a-1-1", leaving=True), pod(1, "a-1-2"), pod(0, "a-0-0", "Failed")]
    assert measure.duplicates(fine) == []
    assert measure.duplicates([*fine, pod(1, "a-1-3", "Pending")]) == ["slot 1: a-1-2, a-1-3"]


def trial(total: float, **more: Any) -> dict[str, Any]:
    return {**measure.Trial(total=total, phases={"detect": total / 10}, lost_steps=3).as_json(), **more}


def test_median_and_worst() -> None:
    found = table.summary([trial(5.0), trial(4.0), trial(9.0)])
    assert found["total"] == {"median": 5.0, "worst": 9.0}
    assert found["phases"] == {"detect": {"median": 0.5, "worst": 0.9}}
    assert table.verdict(found, 10, 2) == "met"
    assert table.verdict(found, 8, 0.8) == "missed: total 9.0 > 8, detect 0.9 > 0.8"
    assert table.verdict(found, None, None) == "measured"
    assert table.summary([]) == {"n": 0}


def test_the_table_goes_between_its_marks_and_nowhere_else() -> None:
    result = {
        "kind": "recovery", "target": 10, "detectTarget": 2, "verdict": "met", "load": 1.5,
        "summary": table.summary([trial(5.0)]),
    }  # fmt: skip
    none = {"kind": "recovery", "verdict": "broken: x", "summary": table.summary([])}
    text = table.markdown({"rank-sigkill": result, "other": none})
    rows = text.splitlines()
    assert len({row.count("|") for row in rows}) == 1, text
    assert rows[2].startswith("| rank-sigkill | 1 | 0.50 / 0.50 | – |")
    assert "| 5.00 / 5.00 | 10, detect 2 | 3 / 3 | 1.5 | met |" in rows[2]
    page = f"before\n{table.BEGIN.format('local')}\nold\n{table.END.format('local')}\nafter\n"
    once = table.put(page, "local", text)
    assert "old" not in once
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert table.put(once, "local", text) == once
    with pytest.raises(ValueError, match="no marks for 'cluster'"):
        table.put(page, "cluster", text)


def test_the_page_has_the_marks_the_suite_writes_between() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "chaos.md").read_text()
    for where in ("local", "cluster"):
        table.put(page, where, "x")


def test_faults_by_name() -> None:
    assert [fault.name for fault in chosen("local", "pod-deleted,rank-sigkill")] == ["pod-deleted", "rank-sigkill"]
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    with pytest.raises(ValueError, match="no fault 'rank-sigkil' in local"):
        chosen("local", "rank-sigkil")
    for fault in FAULTS:
        # What restarts nothing has no phases; what may restart says how often.
        assert (fault.kind == "pause") == (fault.attempts == 0), fault.name
        assert fault.restarts <= fault.attempts, fault.name

"""carbonPolicy: waiting for a clean grid, pausing in dirty hours, the deadline, and the budget."""

from __future__ import annotations

from typing import Any

import pytest
from operator_cases import NOW, Scene, manifest
from trireme_api.job import Phase
from trireme_api.protocol import AgentState, CheckpointRef, EnergyReading, RankReport
from trireme_api.validation import check_job
from trireme_operator.decide.assignments import Crew
from trireme_operator.decide.clock import stamp
from trireme_operator.decide.gang import places
from trireme_operator.decide.grid import Grid, Live
from trireme_operator.observe.desk import Desk
from trireme_operator.observe.store import Store

DAY = 86_400.0
CHECKPOINT = {"uri": "pvc://checkpoints/job"}


def scene(grams: float, **policy: Any) -> Scene:
    found = Scene(checkpoint=CHECKPOINT, carbonPolicy={"zone": "DE", "deadline": stamp(NOW + DAY), **policy})
    shine(found, grams)
    return found


def shine(found: Scene, grams: float) -> None:
    found.grid = Grid(live={"DE": Live(grams, found.now, True, "Electricity Maps, DE")}, max_age_seconds=2 * DAY)


def stop_all(found: Scene, step: int = 40) -> None:
    """The ranks save and the pods are removed."""
    found.hear_all(
        AgentState.EXITED, ranks=[RankReport(0, exit=75)], checkpoint=CheckpointRef(step, f"step-{step}")
    )
    found.settle()
    found.pods.clear()
    found.heard.clear()
    found.settle()


def test_a_job_waits_for_a_clean_grid_and_starts_then() -> None:
    found = scene(300, startBelow=100)
    found.settle()
    assert found.status.phase == Phase.PENDING
    assert "the grid has 300 g/kWh (Electricity Maps, DE" in found.status.explanation
    assert "starts at 100 or less" in found.status.explanation
    assert found.status.carbon_hold.reason == "DirtyGrid"
    assert found.status.goodput is not None
    assert found.status.goodput.state == "queued"
    shine(found, 100)
    found.settle()
    assert found.status.phase == Phase.STARTING
    assert found.status.carbon_hold.reason is None
    assert found.notes.count("DirtyGrid") == found.notes.count("CarbonHoldEnded") == 1


def test_at_the_deadline_it_starts_whatever_the_grid() -> None:
    found = scene(300, startBelow=100)
    found.settle()
    wake = found.decide().requeue_after
    assert wake == pytest.approx(NOW + DAY - found.now, abs=2)
    found.now = NOW + DAY
    found.settle()
    assert found.status.phase == Phase.STARTING
    found.create_all()
    found.settle()
    found.hear_all(AgentState.RUNNING, ranks=[RankReport(0)])
    found.edit(carbonPolicy={"zone": "DE", "deadline": stamp(NOW + DAY), "pauseAbove": 200, "minimumRunSeconds": 0})
    found.settle()
    assert found.status.phase == Phase.RUNNING, "nor does it pause any more"


def test_an_intensity_nobody_knows_holds_nobody() -> None:
    found = Scene(carbonPolicy={"startBelow": 100, "deadline": stamp(NOW + DAY)})
    found.settle()
    assert found.status.phase == Phase.STARTING


def test_without_a_live_figure_the_tables_is_gone_by() -> None:
    found = scene(10, startBelow=100)
    found.grid = Grid(troubles={"DE": "Electricity Maps: HTTP 503"})
    found.settle()
    assert found.status.phase == Phase.PENDING
    assert "Germany 2023" in found.status.explanation


def test_until_a_provider_has_answered_nobody_starts_or_pauses_on_a_yearly_average() -> None:
    """Germany's table says 381: an operator that has just started must neither start the one nor pause the other."""
    found = scene(10, startBelow=500)
    found.grid = Grid(provider="Electricity Maps")
    found.settle()
    assert (found.status.phase, found.status.reason) == (Phase.PENDING, "GridAsked")
    assert found.status.explanation == "Electricity Maps is asked for the grid's carbon intensity"
    found.grid = Grid(troubles={"DE": "Electricity Maps: HTTP 503"}, provider="Electricity Maps")
    found.settle()
    assert found.status.phase == Phase.STARTING, "it has failed to answer: the table's figure counts"

    running = scene(100, pauseAbove=200, minimumRunSeconds=0).run()
    running.grid = Grid(provider="Electricity Maps")
    running.settle()
    assert running.status.phase == Phase.RUNNING
    shine(running, 250)
    running.settle()
    stop_all(running)
    assert running.status.phase == Phase.SUSPENDED
    running.grid = Grid(provider="Electricity Maps")
    running.settle()
    assert (running.status.phase, running.status.carbon_hold.reason) == (Phase.SUSPENDED, "DirtyGrid")
    shine(running, 90)
    running.settle()
    assert running.status.phase == Phase.STARTING


def test_it_pauses_in_dirty_hours_and_goes_on_exactly_there() -> None:
    found = scene(100, pauseAbove=200, minimumRunSeconds=600).run()
    shine(found, 250)
    found.settle()
    assert found.status.phase == Phase.RUNNING, "it has only just started"
    assert (found.decide().requeue_after or 0) <= 600
    found.now = NOW + 700
    found.settle()
    assert found.status.phase == Phase.SUSPENDING
    crew = Crew(found.job, places(found.job, found.seen()))
    assert crew.assignment("pod-0-1").action.value == "save-and-stop"
    stop_all(found)
    assert found.status.phase == Phase.SUSPENDED
    assert "goes on at 180 or less" in found.status.explanation
    assert found.status.carbon_hold.pauses == 1
    assert found.status.goodput is not None
    assert found.status.goodput.state == "suspended"
    shine(found, 190)
    found.settle()
    assert found.status.phase == Phase.SUSPENDED, "a grid at the bound must not make the gang flap"
    found.now += 3600
    shine(found, 180)
    found.settle()
    assert (found.status.phase, found.status.attempt) == (Phase.STARTING, 2)
    assert found.status.resume_from is not None
    assert found.status.resume_from.step == 40
    assert found.status.restart_count == 0, "a pause is no failure"
    assert found.status.suspended_seconds > 3600


def test_a_pause_ends_at_the_deadline() -> None:
    found = scene(100, pauseAbove=200, startBelow=50, minimumRunSeconds=0)
    found.now = NOW + DAY
    found.run()
    found.edit(carbonPolicy={"zone": "DE", "deadline": stamp(found.now + DAY), "pauseAbove": 200, "startBelow": 50,
                             "minimumRunSeconds": 0})  # fmt: skip
    shine(found, 250)
    found.settle()
    stop_all(found)
    shine(found, 120)
    found.settle()
    assert found.status.phase == Phase.SUSPENDED
    assert "goes on at 50 or less" in found.status.explanation
    found.now += DAY
    found.settle()
    assert found.status.phase == Phase.STARTING


def test_who_is_held_keeps_no_room_from_others() -> None:
    store = Store()
    store.nodes = {}
    desk = Desk(store)
    found = scene(300, startBelow=100)
    store.put_job(found.obj)
    assert desk.undecided(store.jobs["ns", "job"])
    found.settle()
    before = store.capacity_version
    found.obj["metadata"]["resourceVersion"] = "2"
    store.put_job(found.obj)
    assert store.capacity_version > before
    desk.decide()
    assert desk.verdict(store.jobs["ns", "job"]) is None
    assert not desk.anyone_waits()


def test_suspending_a_held_job_and_letting_it_go() -> None:
    found = scene(300, startBelow=100)
    found.settle()
    found.edit(runPolicy={"suspend": True})
    found.settle()
    assert found.status.phase == Phase.SUSPENDED
    assert "runPolicy.suspend" in found.status.explanation
    assert found.status.carbon_hold.reason is None
    found.edit(runPolicy={"suspend": False})
    found.settle()
    assert (found.status.phase, found.status.carbon_hold.reason) == (Phase.PENDING, "DirtyGrid")


def burn(found: Scene, kilowatt_hours: float) -> None:
    found.now += 10
    reading = {"cpu": EnergyReading(kilowatt_hours * 3.6e6, "rapl")}
    found.hear_all(AgentState.RUNNING, energy=reading, ranks=[RankReport(0)])
    found.settle()


def test_beyond_its_budget_a_job_says_so_and_runs_on() -> None:
    found = scene(100, budgetGrams=300, pue=1.0).run()
    burn(found, 1.0)
    assert found.status.carbon.total_grams == 200
    assert not [item for item in found.status.conditions if item.type == "OverCarbonBudget"]
    burn(found, 2.0)
    (told,) = (item for item in found.status.conditions if item.type == "OverCarbonBudget")
    assert told.status == "True"
    assert "400g of CO2e are more than carbonPolicy.budgetGrams (300g)" in told.message
    assert found.status.phase == Phase.RUNNING
    burn(found, 2.5)
    assert found.notes.count("CarbonBudgetSpent") == 1


def test_beyond_its_budget_a_job_saves_and_stops_until_it_has_more() -> None:
    found = scene(100, budgetGrams=300, pue=1.0, onBudget="suspend").run()
    burn(found, 2.0)
    assert found.status.phase == Phase.SUSPENDING
    stop_all(found)
    assert found.status.phase == Phase.SUSPENDED
    assert "raise it" in found.status.explanation
    found.now += 2 * DAY
    found.settle()
    assert found.status.phase == Phase.SUSPENDED, "the deadline is the grid's, not the budget's"
    found.edit(carbonPolicy={"zone": "DE", "pue": 1.0, "budgetGrams": 5000, "onBudget": "suspend"})
    found.settle()
    assert (found.status.phase, found.status.attempt) == (Phase.STARTING, 2)


@pytest.mark.parametrize(
    ("policy", "field", "says"),
    [
        ({"startBelow": 50}, "deadline", "required"),
        ({"pauseAbove": 50}, "deadline", "required"),
        ({"startBelow": 50, "deadline": "soon"}, "deadline", "2026-12-01T00:00:00Z"),
        ({"startBelow": 50, "deadline": "2026-12-01T00:00:00"}, "deadline", "zone"),
        ({"startBelow": 90, "pauseAbove": 80, "deadline": "2026-12-01T00:00:00Z"}, "pauseAbove", "more than"),
        ({"startBelow": -1, "deadline": "2026-12-01T00:00:00Z"}, "startBelow", "greater"),
        ({"budgetGrams": 0}, "budgetGrams", "greater"),
        ({"onBudget": "explode"}, "onBudget", "suspend"),
        ({"zone": "ATLANTIS"}, "zone", "gramsPerKilowattHour"),
        ({"pue": -1.2}, "pue", "greater"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(policy: dict[str, Any], field: str, says: str) -> None:
    found = check_job(manifest(checkpoint=CHECKPOINT, carbonPolicy=policy)).problems
    assert [item.field for item in found] == [f"spec.carbonPolicy.{field}"]
    assert says in found[0].message


@pytest.mark.parametrize("policy", [{"pauseAbove": 80, "deadline": "2026-12-01T00:00:00Z"},
                                    {"budgetGrams": 80, "onBudget": "suspend"}])  # fmt: skip
def test_what_cannot_save_is_not_paused(policy: dict[str, Any]) -> None:
    (found,) = check_job(manifest(carbonPolicy=policy)).problems
    assert "spec.checkpoint" in found.message

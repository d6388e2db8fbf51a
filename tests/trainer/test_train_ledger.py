"""The rank's side of the goodput ledger against clocks that are not its own, and what the operator makes of it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from gang import Gang, make_recipe
from trireme_api.heartbeat import Heartbeat
from trireme_api.protocol import ExitCode, Spent
from trireme_operator.decide.ledger import RUNNING, Book


def last(gang: Gang) -> tuple[Heartbeat, Spent]:
    beat = gang.heartbeat()
    assert beat is not None
    assert beat.spent is not None
    return beat, beat.spent


def test_the_states_sum_to_the_wall_time_and_each_has_its_own(corpus: Path, tmp_path: Path) -> None:
    gang = Gang(tmp_path, make_recipe(corpus, steps=12), every=3, fault="slow_data_and_slow_save").run()
    beat, spent = last(gang)
    assert beat.phases is not None
    assert beat.phases.started is not None
    assert beat.phases.loaded is not None
    wall = beat.time - beat.phases.started
    assert sum(spent.seconds.values()) == pytest.approx(wall, rel=0.01), "by the clock of the day"
    rows = [row for row in gang.rows() if "loss" in row]
    assert spent.seconds["data-wait"] == pytest.approx(12 * 0.2, rel=0.1)
    assert spent.seconds["checkpoint-blocked"] >= 4 * 0.3
    assert spent.seconds["init"] >= beat.phases.loaded - beat.phases.started
    loop = spent.seconds["step"] + spent.seconds["data-wait"] + spent.seconds["compile"]
    assert loop == pytest.approx(sum(row["seconds"] for row in rows), rel=0.01), "by the step log"
    between = rows[-1]["time"] - rows[0]["time"]
    saved = spent.seconds["checkpoint-blocked"]
    steady = loop - rows[0]["seconds"]
    assert steady < between < (steady + saved) * 1.01, "by the times in the step log"
    assert (spent.from_step, spent.step, spent.saved_step) == (0, 12, 12)
    told = gang.events("ended")[0]["seconds"]
    assert told["data-wait"] == pytest.approx(spent.seconds["data-wait"], abs=0.01)


def test_the_work_that_a_kill_costs_is_found_when_training_resumes(corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(corpus, steps=60)
    first = Gang(tmp_path, recipe, every=3, fault="slow_data").start()
    first.until(lambda beat: beat.checkpoint and beat.step >= beat.checkpoint.step + 2 >= 5, "two steps to lose")
    first.signal(signal.SIGKILL)
    first.wait()
    _, before = last(first)
    second = Gang(tmp_path, {**recipe, "until": {"steps": (before.step or 0) + 3}}, every=3, attempt=2).run()
    beat, after = last(second)
    resumed = second.events("resumed")[0]["step"]
    assert after.from_step == resumed

    book = Book(0, RUNNING)
    book.row(1)
    book.advance(round(1000 * sum(before.seconds.values())))
    book.explain(before)
    book.rows[-1].close(failed=True)
    book.row(2)
    book.advance(book.since + round(1000 * sum(after.seconds.values())))
    book.explain(after)
    found = book.status()
    assert before.step is not None
    assert found.lost_steps == before.step - resumed > 0
    assert first.codes == [-signal.SIGKILL]
    assert before.saved_seconds is not None
    if before.saved_step == resumed:
        assert found.seconds["lost"] == pytest.approx(before.seconds["step"] - before.saved_seconds, abs=0.01)
    assert found.seconds["step"] + found.seconds["lost"] == pytest.approx(
        before.seconds["step"] + after.seconds["step"], abs=0.01
    )
    assert beat.phase == "done"


def test_a_clean_stop_loses_no_step(corpus: Path, tmp_path: Path) -> None:
    first = Gang(tmp_path, make_recipe(corpus, steps=60), every=50, fault="slow_data").start().until_step(4)
    first.signal(signal.SIGTERM)
    assert first.wait() == [ExitCode.SAVED_AND_STOPPED]
    _, spent = last(first)
    assert spent.saved_step == spent.step
    assert spent.saved_seconds == pytest.approx(spent.seconds["step"], abs=0.2)

"""The goodput ledger: whatever is reported, restarted or set wrong, each second is in one state and sums are exact."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import FITS, NOW, Scene, failure, heard, pod
from trireme_api.job import TrainingJobStatus
from trireme_api.ledger import LEDGER_STATES, GoodputStatus
from trireme_api.protocol import (
    SPENT_STATES,
    AgentState,
    CheckpointRef,
    EnergyReading,
    RankReport,
    Reached,
    Report,
    Spent,
)
from trireme_operator.decide.bookkeeping import up_to
from trireme_operator.decide.ledger import KEPT_ATTEMPTS, MAX_SKEW_MS, RUNNING, Book, effective, milliseconds, shares
from trireme_operator.decide.views import job_of
from trireme_operator.observe.store import Store
from trireme_operator.serve.metrics import JobCollector, Metrics

STATES = [*(state for state in LEDGER_STATES if state not in SPENT_STATES), RUNNING]
WILD = st.one_of(
    st.floats(-10, 1e5), st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 0.0]), st.floats(0, 30)
)
TOLD = st.builds(
    Spent,
    seconds=st.dictionaries(st.sampled_from([*SPENT_STATES, "nonsense"]), WILD),
    state=st.sampled_from([*SPENT_STATES, "nonsense"]),
    from_step=st.none() | st.integers(-5, 10**20),
    step=st.none() | st.integers(-5, 500),
    saved_step=st.none() | st.integers(-5, 10**20),
    saved_seconds=st.none() | WILD,
)
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("time"), st.floats(-200, 2000) | st.sampled_from([0.0, 1e7, -1e7])),
        st.tuples(st.just("state"), st.sampled_from(STATES)),
        st.tuples(st.just("told"), TOLD),
        st.tuples(st.just("attempt"), st.booleans()),
        st.tuples(st.just("operator restarts"), st.none()),
    ),
    max_size=60,
)


@dataclass
class World:
    """A ledger beside the plainest account of wall time there can be."""

    now: int = 1_800_000_000_000
    reached: int = 1_800_000_000_000
    wall: int = 0
    attempt: int = 1
    book: Book = field(default_factory=lambda: Book(1_800_000_000_000, "queued"))

    def __post_init__(self) -> None:
        self.book.row(self.attempt)

    def move(self, kind: str, what: object) -> None:
        if kind == "time":
            assert isinstance(what, float)
            self.now += round(what * 1000)
            if self.now >= self.reached:
                self.wall += self.now - self.reached
                self.reached = self.now
            elif self.reached - self.now > MAX_SKEW_MS:
                self.reached = self.now
            self.book.advance(self.now)
        elif kind == "state":
            self.book.state = str(what)
        elif kind == "told":
            assert isinstance(what, Spent)
            if self.book.rows[-1].unexplained_as:
                self.book.explain(what)
        elif kind == "attempt":
            self.book.rows[-1].close(bool(what))
            self.attempt += 1
            self.book.row(self.attempt)
            self.book.state = "recovering"
        else:
            text = self.book.status().model_dump_json(by_alias=True, exclude_none=True)
            self.book = Book.of(GoodputStatus.model_validate(json.loads(text)), 0.0)

    def check(self) -> None:
        totals = self.book.totals()
        assert sum(totals.values()) == self.wall
        assert min(totals.values()) >= 0
        assert set(totals) == set(LEDGER_STATES)
        for row in self.book.rows:
            assert min(row.ms.values(), default=0) >= 0
            assert row.unexplained <= row.ms.get(row.unexplained_as, 0)
        status = self.book.status()
        assert len(status.attempts) <= KEPT_ATTEMPTS
        assert sum(status.seconds.values()) == pytest.approx(self.wall / 1000, abs=1e-6 * max(1, self.wall / 1e6))
        assert status.ratio is None or 0 <= status.ratio <= 1
        assert len(status.model_dump_json(by_alias=True, exclude_none=True)) < 30_000, "status stays small"


@settings(max_examples=400)
@given(MOVES)
def test_every_second_is_in_exactly_one_state(moves: list[tuple[str, object]]) -> None:
    world = World()
    for kind, what in moves:
        world.move(kind, what)
        world.check()


@settings(max_examples=200)
@given(MOVES)
def test_an_operator_restarted_after_every_move_keeps_the_same_books(moves: list[tuple[str, object]]) -> None:
    steady, restarted = World(), World()
    for kind, what in moves:
        steady.move(kind, what)
        restarted.move(kind, what)
        restarted.move("operator restarts", None)
    assert steady.book.status() == restarted.book.status()


@given(st.dictionaries(st.sampled_from(SPENT_STATES), st.integers(1, 10**9)), st.integers(0, 10**9))
def test_shares_lose_no_millisecond_and_keep_proportions(due: dict[str, int], free: int) -> None:
    given_out = shares(due, free)
    assert sum(given_out.values()) == min(free, sum(due.values()))
    for state, amount in due.items():
        scale = min(1.0, free / sum(due.values()))
        assert abs(given_out[state] - amount * scale) <= 1.001


# --- what it says of runs whose truth is known ------------------------------------------------------------------------


@dataclass
class Run:
    """A truthful trainer seen by an operator with a delay."""

    book: Book
    now: int
    began: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    step: int = 0
    from_step: int | None = None
    saved: tuple[int, float] | None = None

    def passes(self, state: str, seconds: float) -> None:
        self.now += round(seconds * 1000)
        self.seconds[state] = round(self.seconds.get(state, 0.0) + seconds, 3)

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.passes("step", seconds)
            self.step += 1

    def save(self, seconds: float) -> None:
        self.saved = self.step, self.seconds["step"]
        self.passes("checkpoint-blocked", seconds)

    def tell(self, state: str = "step") -> None:
        self.book.advance(self.now)
        saved = self.saved or (None, None)
        told = Spent(dict(self.seconds), state, self.from_step, self.step, saved[0], saved[1])
        self.book.explain(told)


def running(book: Book, now: int, state: str = "init") -> Run:
    book.state = RUNNING
    book.rows[-1].unexplained_as = state
    return Run(book, now)


def one_attempt(book: Book, now: int, resumed: int, then: int, save_at: int | None = None) -> Run:
    run = running(book, now)
    run.passes("init", 10.0)
    run.step = run.from_step = resumed
    run.tell("compile")
    run.passes("compile", 5.0)
    run.step += 1
    while run.step < then:
        run.passes("data-wait", 0.1)
        run.steps(1, 1.0)
        if run.step == save_at:
            run.save(0.5)
        if run.step % 4 == 0:
            run.tell()
    run.tell()
    return run


def test_steps_done_again_move_from_step_to_lost() -> None:
    book = Book(0, "queued")
    book.row(1)
    book.advance(30_000)
    run = one_attempt(book, 30_000, 0, 21, save_at=11)
    run.now += 400  # a step that is never done
    book.advance(run.now)
    book.rows[-1].close(failed=True)
    book.row(2)
    book.state = "recovering"
    book.advance(run.now + 8_000)
    assert book.totals()["lost"] == 400, "what else is lost is known when it is known where the next one resumes"
    run = one_attempt(book, run.now + 8_000, 11, 31)
    book.rows[-1].close(failed=False)
    found = {state: ms / 1000 for state, ms in book.totals().items() if ms}
    assert found == {
        "queued": 30.0, "init": 20.0, "compile": 10.0, "data-wait": 3.9, "checkpoint-blocked": 0.5, "recovering": 8.0,
        "step": pytest.approx(10.0 + 19.0), "lost": pytest.approx(10.0 + 0.4),
    }  # fmt: skip
    assert sum(found.values()) == pytest.approx(run.now / 1000)
    assert book.status().lost_steps == 10
    assert effective(book.totals()) == pytest.approx(29.0 / (run.now / 1000 - 30.0))


def test_a_checkpoint_that_is_no_good_takes_work_of_older_attempts_too() -> None:
    book = Book(0, "queued")
    book.row(1)
    now = one_attempt(book, 0, 0, 41, save_at=31).now
    book.rows[-1].close(failed=True)
    book.row(2)
    now = one_attempt(book, now, 31, 51).now
    assert book.status().lost_steps == 10
    book.rows[-1].close(failed=True)
    book.row(3)
    one_attempt(book, now, 11, 12)
    assert book.status().lost_steps == 10 + 20 + 20
    assert book.totals()["step"] == pytest.approx(10_000, abs=1), "steps 2 to 11"
    assert book.totals()["lost"] == pytest.approx(10_000 + 20_000 + 19_000, abs=1), "the first of each is `compile`"


def test_work_beyond_the_kept_rows_can_still_be_lost() -> None:
    book, now = Book(0, "queued"), 0
    for attempt in range(1, KEPT_ATTEMPTS + 6):
        book.row(attempt)
        now = one_attempt(book, now, 10 * (attempt - 1), 10 * attempt).now
        book.rows[-1].close(failed=False)
    assert book.older is not None
    assert (book.older.from_step, book.older.step) == (0, 50)
    before = book.totals()
    book.row(99)
    one_attempt(book, now, 25, 26)
    assert book.status().lost_steps == 10 * (KEPT_ATTEMPTS + 5) - 25
    assert book.totals()["lost"] == pytest.approx(before["step"] * (1 - 25 / (10 * (KEPT_ATTEMPTS + 5))), rel=0.03)


def test_a_clean_stop_loses_nothing() -> None:
    book = Book(0, "queued")
    book.row(1)
    run = one_attempt(book, 0, 0, 15, save_at=15)
    book.rows[-1].close(failed=False)
    book.row(2)
    one_attempt(book, run.now, 15, 20)
    assert "lost" not in book.status().seconds
    assert book.status().lost_steps == 0


def test_a_rollback_within_an_attempt_is_lost_time() -> None:
    book = Book(0, "starting")
    book.row(1)
    run = one_attempt(book, 0, 0, 20)
    run.seconds["step"] = round(run.seconds["step"] - 5.0, 3)
    run.seconds["lost"] = 5.0
    run.passes("step", 2.0)
    run.tell()
    assert (book.totals()["step"], book.totals()["lost"]) == (16_000, 5_000)
    assert sum(book.totals().values()) == run.now


def test_an_operator_that_was_away_learns_the_rest_from_the_ranks() -> None:
    book = Book(0, "starting")
    book.row(1)
    run = running(book, 0)
    run.passes("init", 10.0)
    run.from_step = 0
    run.tell("step")
    away = Book.of(book.status(), 0.0)
    run.book = away
    run.steps(600, 1.0)
    run.save(3.0)
    run.tell()
    assert away.totals() | {"init": 10_000, "step": 600_000, "checkpoint-blocked": 3_000} == away.totals()


def test_an_operator_away_while_the_ranks_began_gives_back_what_it_took_for_waiting() -> None:
    book = Book(0, "starting")
    book.row(1)
    book.advance(100_000)
    run = running(book, 100_000)
    run.seconds, run.from_step, run.step = {"init": 10.0, "step": 70.0}, 0, 70
    run.tell()
    found = {state: ms for state, ms in book.totals().items() if ms}
    assert found == {"starting": 20_000, "init": 10_000, "step": 70_000}


# --- within reconcile -------------------------------------------------------------------------------------------------


def total(status: TrainingJobStatus) -> float:
    assert status.goodput is not None
    return sum(status.goodput.seconds.values())


def wall(status: TrainingJobStatus) -> float:
    assert status.goodput is not None
    return (milliseconds(status.goodput.since, 0) - milliseconds(status.start_time, 0)) / 1000


def tell(scene: Scene, spent: Spent, state: AgentState = AgentState.RUNNING, **fields: object) -> None:
    exits = fields.pop("exits", None)
    for slot in (0, 1):
        uid = f"pod-{slot}-{scene.status.slots[slot].incarnation}"
        scene.heard[uid] = heard(
            uid, scene.status.attempt, state, scene.now, spent=spent, ranks=[RankReport(0, exit=exits)], **fields
        )  # type: ignore[arg-type]


RECIPE = {
    "recipe": {
        "model": {"preset": "opt-125m"}, "data": {"sources": [{"path": "pvc://c/d"}]}, "batch": {"tokens": 524288},
        "until": {"tokens": 180e9},
    },
    "checkpoint": {"uri": "pvc://c/x"},
    "template": {},
}  # fmt: skip


def test_a_life_with_a_failure() -> None:
    scene = Scene(**RECIPE)
    scene.admission = None
    scene.settle()
    scene.now += 100
    scene.admission = FITS
    scene.settle()
    for slot in scene.status.slots:
        made = pod("job", slot.index, 1, phase="Pending")
        scene.pods[made.uid] = made
    scene.settle()
    scene.now += 40
    for uid in list(scene.pods):
        scene.change_pod(uid, phase="Running")
    scene.settle()
    scene.now += 5
    tell(scene, Spent({"init": 0.5}, "init"))
    scene.settle()
    scene.now += 60
    tell(
        scene, Spent({"init": 9.0, "compile": 3.0, "step": 45.0}, "step", 0, 46, 36, 35.0),
        checkpoint=CheckpointRef(36, "step-36"),
    )  # fmt: skip
    scene.settle()
    assert scene.status.goodput is not None
    assert scene.status.goodput.state == RUNNING
    scene.now += 4
    tell(
        scene, Spent({"init": 9.0, "compile": 3.0, "step": 48.0}, "step", 0, 49, 36, 35.0), AgentState.EXITED,
        failure=failure(rank=0), exits=1,
    )  # fmt: skip
    scene.settle()
    goodput = scene.status.goodput
    assert goodput is not None
    assert (scene.status.phase, goodput.state) == ("Recovering", "recovering")
    assert goodput.seconds["step"] == pytest.approx(48.0, abs=0.01)
    scene.now += 10
    tell(scene, Spent({"init": 0.2}, "init"))
    scene.settle()
    scene.now += 30
    tell(scene, Spent({"init": 8.0, "compile": 2.0, "step": 20.0}, "step", 36, 57))
    scene.settle()
    goodput = scene.status.goodput
    assert goodput is not None
    assert goodput.lost_steps == 13
    assert goodput.seconds["step"] - goodput.attempts[-1].unexplained == pytest.approx(35.0 + 20.0, abs=0.01)
    assert 13.0 <= goodput.seconds["lost"] <= 20.0, "and the step that broke off"
    assert goodput.seconds["recovering"] == pytest.approx(10.0, abs=3.0)
    assert goodput.seconds["pulling"] == pytest.approx(40.0, abs=3.0)
    assert goodput.seconds["queued"] == pytest.approx(100.0, abs=5.0)
    assert total(scene.status) == pytest.approx(wall(scene.status), abs=1e-6)
    scene.now += 1
    tell(
        scene, Spent({"init": 8.0, "compile": 2.0, "step": 21.0}, "step", 36, 58), AgentState.EXITED, exits=0
    )  # fmt: skip
    scene.settle()
    goodput = scene.status.goodput
    assert scene.status.phase == "Succeeded"
    assert goodput is not None
    assert goodput.state is None
    assert goodput.summary == f"{goodput.ratio:.1%}"
    assert [row.attempt for row in goodput.attempts] == [1, 2]
    assert "Goodput" in scene.notes
    assert scene.notes.count("AttemptEnded") == 2
    scene.now += 1000
    assert scene.decide().status is None, "the books are closed"


@pytest.mark.parametrize(("told", "before"), [(49, None), (49, 49), (48, 49), (None, 49)])
def test_steps_done_before_a_pod_went_are_lost_though_they_are_told_after_it(
    told: int | None, before: int | None
) -> None:
    """The pod of rank 1 is gone and the next attempt decided on before rank 0's agent, which tells every few seconds,
    has said how far they came, if it says so at all; its first word of the next attempt follows at once."""
    scene, store = Scene(**RECIPE).run(), Store()

    def hear(
        attempt: int, state: AgentState, spent: Spent | None = None, slots: tuple[int, ...] = (0, 1),
        before: Reached | None = None,
    ) -> None:
        for slot in slots:
            uid = f"pod-{slot}-{scene.status.slots[slot].incarnation}"
            report = Report(uid, attempt, state, spent=spent, ranks=[RankReport(0)], before=before)
            store.hear(uid, report, scene.now)
            scene.heard[uid] = store.heard[uid]

    training = {"init": 9.0, "compile": 3.0, "step": 45.0}
    scene.now += 60
    hear(1, AgentState.RUNNING, Spent(training, "step", 0, 46, 36, 35.0))
    scene.settle()
    scene.now += 4
    scene.change_pod("pod-1-1", phase="Failed")
    scene.settle()
    assert (scene.status.phase, scene.status.attempt) == ("Recovering", 2)
    if told is not None:
        hear(1, AgentState.EXITED, Spent(training | {"step": told - 1.0}, "step", 0, told, 36, 35.0), (0,))
    hear(2, AgentState.WAITING, None, (0,), Reached(1, before) if before is not None else None)
    scene.settle()
    scene.pods.pop("pod-1-1")
    scene.settle()
    scene.create_all()
    scene.now += 10
    hear(2, AgentState.RUNNING, Spent({"init": 0.2}, "init"))
    scene.settle()
    scene.now += 30
    hear(2, AgentState.RUNNING, Spent({"init": 8.0, "compile": 2.0, "step": 20.0}, "step", 36, 57))
    scene.settle()
    goodput = scene.status.goodput
    assert goodput is not None
    assert goodput.lost_steps == 13
    assert total(scene.status) == pytest.approx(wall(scene.status), abs=1e-6)


def test_a_users_own_script_is_step_while_it_runs() -> None:
    scene = Scene().run()
    scene.now += 50
    scene.hear_all(AgentState.RUNNING, energy={"cpu": EnergyReading(5.0, "declared")})
    scene.settle()
    goodput = scene.status.goodput
    assert goodput is not None
    assert goodput.seconds["step"] >= 50
    assert total(scene.status) == pytest.approx(wall(scene.status), abs=1e-6)


def test_nothing_is_written_for_time_that_only_passes() -> None:
    scene = Scene(runPolicy={"suspend": True})
    scene.settle()
    for _ in range(5):
        scene.now += 3600
        assert scene.decide().status is None
    goodput = scene.status.goodput
    assert goodput is not None
    assert up_to(goodput, scene.now).seconds["suspended"] >= 5 * 3600
    scene.edit(runPolicy={"suspend": False})
    scene.admission = None
    scene.settle()
    goodput = scene.status.goodput
    assert goodput is not None
    assert goodput.state == "queued"
    assert goodput.seconds["suspended"] >= 5 * 3600


@pytest.mark.parametrize(
    "garbage",
    [
        {"state": "running", "since": "2027-01-15T08:00:00Z"}, {"state": "no such", "since": "soon", "attempts": []},
        {"seconds": {"step": -5.0}, "attempts": [{"attempt": -3, "seconds": {"x": 1.0, "step": -1.0}}]},
    ],
)  # fmt: skip
def test_a_garbled_ledger_begins_again_and_stops_nothing(garbage: dict[str, object]) -> None:
    scene = Scene().run()
    scene.obj["status"]["goodput"] = garbage
    scene.now += 50
    scene.hear_all(AgentState.RUNNING, spent=Spent({"init": 1.0}))
    scene.settle()
    goodput = scene.status.goodput
    assert goodput is not None
    assert all(value >= 0 for value in goodput.seconds.values())
    assert goodput.state == RUNNING


def test_metrics_count_on_between_writes() -> None:
    scene = Scene().run()
    store, metrics = Store(), Metrics()
    metrics.registry.register(JobCollector(store, clock=lambda: scene.now + 100))
    store.put_job(scene.obj)
    names = {"namespace": "ns", "job": "job"}
    value = metrics.registry.get_sample_value
    by_state = {state: value("trireme_job_seconds_total", {**names, "state": state}) for state in LEDGER_STATES}
    assert by_state["eval"] == 0
    assert sum(v for v in by_state.values() if v) == pytest.approx(scene.now + 100 - NOW, abs=0.01)
    assert (by_state["step"] or 0) > 100
    assert value("trireme_job_lost_steps", names) == 0
    assert job_of(scene.obj).status.goodput is not None

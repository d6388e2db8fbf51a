"""The operator's hang watch: what is a hang and what is not, who is named, and what happens before the kill."""

from __future__ import annotations

import pytest
from operator_cases import NOW, Scene, failure
from trireme_api.hang import HangPolicy
from trireme_api.protocol import Action, AgentState, Cause, PhaseTime, RankReport, RankStack, Report, Stacks
from trireme_operator.decide.assignments import Crew
from trireme_operator.decide.gang import places
from trireme_operator.decide.hangs import FLOOR_SECONDS, step_limit
from trireme_operator.decide.trail import MAX_SIGHTINGS, Trail, follow
from trireme_operator.decide.views import Heard

STEP = 2.0


class Told:
    """A running gang whose agents report by hand."""

    def __init__(self, nodes: int = 2, **spec: object) -> None:
        self.scene = Scene(name="job", replicas=nodes, **spec)
        self.scene.run()

    def tell(
        self, slot: int, age: float, step: int = 40, *, phase: str = "step", state: AgentState = AgentState.RUNNING,
        first_step: float | None = 1.0, step_seconds: float | None = STEP, **fields: object,
    ) -> None:  # fmt: skip
        scene = self.scene
        uid = f"pod-{slot}-1"
        ranks = fields.pop("ranks", None) or [RankReport(0, 7, None, step, phase, age, step_seconds)]
        report = Report(
            uid, scene.status.attempt, state, ranks=ranks, phases=PhaseTime(first_step=first_step), **fields
        )  # type: ignore[arg-type]
        before = scene.heard.get(uid)
        trail = follow(before.trail if before else Trail(), report, scene.now)
        scene.heard[uid] = Heard(report, scene.now, scene.now, trail)

    def stall(self, until: float, *, begin: float = 0.0, every: float = 1.0, **fields: object) -> float | None:
        """Both agents tell of ranks that stand still; the age at which the operator calls it a hang, or None."""
        age = begin
        while age <= until:
            self.scene.now += every if age > begin else 0.0
            for slot in range(len(self.scene.status.slots)):
                self.tell(slot, age, **fields)
            self.scene.decide()
            if self.scene.status.hang is not None:
                return age
            age += every
        return None


def test_a_gang_that_stands_still_is_a_hang_within_15_seconds_or_three_steps() -> None:
    assert Told().stall(30) == 14
    assert Told().stall(60, step_seconds=10.0) == 30
    assert Told(hangPolicy={"stepTimeout": 50}).stall(60) == 50


@pytest.mark.parametrize(
    ("what", "fields", "hang_at"),
    [
        ("loading has the time of a start", {"phase": "load"}, 40),
        ("saving, too", {"phase": "checkpoint"}, 40),
        ("the first step, too", {"first_step": None, "step": 0, "step_seconds": None}, 40),
        ("and steps nobody has measured yet", {"step_seconds": None}, 40),
        ("a step", {}, 14),
    ],
)
def test_the_limit_is_that_of_the_phase(what: str, fields: dict[str, object], hang_at: float) -> None:
    told = Told(hangPolicy={"startSeconds": 40})
    assert told.stall(60, **fields) == hang_at, what


def test_a_restarted_operator_goes_by_the_step_time_it_wrote() -> None:
    told = Told()
    told.tell(0, 0.0, progress=None)
    status = told.scene.status
    assert status.progress is None
    obj = told.scene.obj
    obj["status"] = {**obj["status"], "progress": {"step": 40, "stepSeconds": 6.0}}
    assert told.stall(60, step_seconds=None) == 18


def test_no_single_report_makes_a_hang() -> None:
    told = Told()
    for slot in (0, 1):
        told.tell(slot, 0.1)
    told.scene.now += 500
    for slot in (0, 1):
        told.tell(slot, 500.0)  # e.g. the machine was paused: nobody moved yet, and the clock did
    told.scene.decide()
    assert told.scene.status.hang is None
    told.scene.now += 1.0
    for slot in (0, 1):
        told.tell(slot, 0.2, step=41)
    told.scene.decide()
    assert told.scene.status.hang is None


def test_silence_of_all_agents_is_no_hang() -> None:
    told = Told()
    for slot in (0, 1):
        told.tell(slot, 0.5)
    told.scene.now += 3600
    told.scene.decide()
    assert (told.scene.status.hang, told.scene.status.attempt) == (None, 1)


def test_one_rank_that_moves_means_that_the_gang_goes_on() -> None:
    told = Told()
    for age in range(60):
        told.scene.now += 1
        told.tell(0, float(age))
        told.tell(1, 0.1, step=100 + age)
        told.scene.decide()
    assert told.scene.status.hang is None


def test_a_pod_whose_agent_fell_silent_is_the_suspect_and_is_replaced() -> None:
    told = Told()
    told.tell(1, 0.1)
    for age in range(60):
        told.tell(0, float(age))
        told.scene.decide()
        if told.scene.status.hang is not None:
            break
        told.scene.now += 1
    assert told.scene.status.hang is not None
    assert told.scene.status.hang.silent == [1]
    told.tell(0, 60.0, stacks=Stacks("/logs/hang", [RankStack(0, "sleeping", "proc")]))
    told.scene.decide()
    status = told.scene.status
    assert status.last_failure is not None
    assert (status.last_failure.cause, status.last_failure.missing_ranks) == (Cause.HANG, [1])
    assert (status.restarts.pod, status.slots[1].incarnation, status.slots[0].incarnation) == (1, 2, 1)


def test_stacks_are_asked_for_and_awaited_before_the_gang_is_restarted() -> None:
    told = Told()
    told.stall(20)
    scene = told.scene
    assert scene.status.attempt == 1
    crew = Crew(scene.job, places(scene.job, scene.seen()))
    given = crew.assignment("pod-1-1")
    assert (given.action, given.dump) == (Action.RUN, True)
    assert "Hang" in scene.notes
    waits = RankStack(0, "sleeping", "faulthandler", True, "all_reduce")
    scene.now += 1
    told.tell(0, 15.0, stacks=Stacks("pvc://runs/a/hangs/attempt-1", [waits]))
    scene.decide()
    assert scene.status.attempt == 1, "the other pod's stacks are still to come"
    told.tell(1, 15.0, stacks=Stacks("pvc://runs/a/hangs/attempt-1", [RankStack(0, "stopped", "faulthandler")]))
    scene.decide()
    failed = scene.status.last_failure
    assert scene.status.attempt == 2
    assert failed is not None
    assert (failed.cause, failed.rule, failed.rank, failed.pod) == (Cause.HANG, "hang-watch", 1, "job-1-1")
    assert failed.missing_ranks == [1]
    assert failed.stacks == "pvc://runs/a/hangs/attempt-1"
    assert "stopped" in failed.message
    assert scene.status.restarts.process == 1
    assert Crew(scene.job, places(scene.job, scene.seen())).assignment("pod-1-1").dump is None


def test_stacks_that_do_not_come_are_not_awaited_for_ever() -> None:
    told = Told()
    told.stall(20)
    told.scene.now += 7
    told.scene.decide()
    assert told.scene.status.attempt == 2
    assert told.scene.status.last_failure is not None
    assert told.scene.status.last_failure.stacks is None


def test_after_a_ranks_own_watch_the_other_pods_stacks_are_gathered_too() -> None:
    told = Told()
    scene = told.scene
    told.tell(1, 12.0)
    own = failure(Cause.HANG, message="rank 0: no step for 12 s", rank=0, exit=71, missing=[1])
    mine = Stacks("/logs/hang", [RankStack(0, "gone", "faulthandler")])
    told.tell(0, 12.0, state=AgentState.EXITED, failure=own, stacks=mine)
    scene.decide()
    assert (scene.status.attempt, scene.status.hang is not None) == (1, True)
    told.tell(1, 13.0, stacks=Stacks("/logs/hang", [RankStack(0, "sleeping", "faulthandler", False, "sleep")]))
    scene.decide()
    assert scene.status.attempt == 2
    failed = scene.status.last_failure
    assert failed is not None
    assert (failed.missing_ranks, failed.rank, failed.pod, failed.exit) == ([1], 1, "job-1-1", 71)


WAITS, WORKS = RankStack(0, "sleeping", "x", True), RankStack(0, "running", "x", False, "read in data.py")
UNTOLD = RankStack(0, "sleeping", "proc")


@pytest.mark.parametrize(
    ("stacks", "steps", "named"),
    [
        ((WAITS, WORKS), (40, 40), [1]),
        ((WORKS, WAITS), (40, 40), [0]),
        ((WAITS, WAITS), (40, 40), []),
        ((WORKS, WORKS), (40, 40), []),
        ((UNTOLD, UNTOLD), (41, 40), [1]),
        ((UNTOLD, UNTOLD), (40, 40), []),
        ((RankStack(0, "uninterruptible", "proc"), WAITS), (40, 40), [0]),
    ],
)
def test_who_is_named(stacks: tuple[RankStack, RankStack], steps: tuple[int, int], named: list[int]) -> None:
    told = Told()
    age = 0.0
    while told.scene.status.hang is None:
        told.scene.now += 1
        age += 1
        for slot in (0, 1):
            told.tell(slot, age, steps[slot])
        told.scene.decide()
    for slot in (0, 1):
        told.tell(slot, age, steps[slot], stacks=Stacks("/x", [stacks[slot]]))
    told.scene.decide()
    assert told.scene.status.last_failure is not None
    assert told.scene.status.last_failure.missing_ranks == named


def test_a_hang_that_was_found_is_decided_once_over_a_restart_of_the_operator() -> None:
    told = Told()
    told.stall(20)
    told.scene.heard.clear()
    told.scene.now += 1
    told.scene.decide()
    assert told.scene.status.attempt == 2
    told.scene.decide()
    assert (told.scene.status.attempt, told.scene.status.restarts.process) == (2, 1)


def test_the_limit() -> None:
    auto = HangPolicy()
    assert step_limit(auto, 0.05) == FLOOR_SECONDS
    assert step_limit(auto, 20.0) == 60.0
    assert step_limit(auto, None) == 600.0
    assert step_limit(HangPolicy(step_timeout=7), None) == 7.0


def test_a_long_trail_forgets_none_of_its_beginning() -> None:
    trail = Trail()
    for second in range(1000):
        report = Report("u", 1, AgentState.RUNNING, ranks=[RankReport(0, 1, None, 3, "step", float(second))])
        trail = follow(trail, report, NOW + second)
    mark = trail.marks[0]
    assert len(mark.sightings) <= MAX_SIGHTINGS
    assert mark.stood_since(0.0) == NOW
    assert mark.stood_since(500.0) == pytest.approx(NOW + 500, abs=40)
    assert mark.last.age == 999
    report = Report("u", 1, AgentState.RUNNING, ranks=[RankReport(0, 1, None, 4, "step", 0.1)])
    assert follow(trail, report, NOW + 1000).marks[0].stood_since(1.0) is None
    assert follow(trail, report, NOW + 1000).stepped

"""The trainer's own hang watch: a rank that stands still is named by the others, all stacks exist, all exit 71."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest
from gang import Gang, make_recipe
from trireme_api.hang import HangPolicy
from trireme_api.heartbeat import flight_name, stacks_name
from trireme_api.protocol import Cause, Env, ExitCode
from trireme_trainer.lifecycle import hang
from trireme_trainer.lifecycle.hang import FLOOR_SECONDS, HangWatch, Position, behind, limit
from trireme_trainer.telemetry.heartbeat import Pulse
from trireme_trainer.telemetry.pace import Pace

SHORT = {Env.HANG_POLICY: json.dumps({"stepTimeout": 4})}


def stacks(gang: Gang, rank: int) -> str:
    return (gang.work / "heartbeats" / stacks_name(rank)).read_text()


def test_a_rank_that_sleeps_is_named_and_everyone_leaves_with_71(corpus: Path, tmp_path: Path) -> None:
    recipe = make_recipe(corpus, steps=500)
    gang = Gang(tmp_path, recipe, world=2, every=1000, fault="sleeps_in_step_8", environment=SHORT).start()
    gang.until_step(7)
    began = time.monotonic()
    assert gang.wait() == [ExitCode.HANG, ExitCode.HANG]
    assert time.monotonic() - began < 15
    for rank in (0, 1):
        beat = gang.heartbeat(rank)
        assert beat is not None
        told = beat.failure
        assert told is not None, gang.logs()
        assert (told.cause, told.exit, told.missing) == (Cause.HANG, ExitCode.HANG, [1]), told
        assert "after step 7" in told.message
        assert "rank 1 has begun" in told.message
        assert "last collective here: gloo:" in told.message
    assert "all_reduce" in stacks(gang, 0)
    assert "faults.py" in stacks(gang, 1)
    record = json.loads((gang.work / "heartbeats" / flight_name(0)).read_text())
    assert record["entries"]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_by_the_other(corpus: Path, tmp_path: Path, stopped: int) -> None:
    """Rank 0 serves the store as well: then it is the store that does not answer."""
    gang = Gang(tmp_path, make_recipe(corpus, steps=5000), world=2, every=10_000, environment=SHORT).start()
    gang.until_step(6)
    other = 1 - stopped
    gang.signal(signal.SIGSTOP, [stopped])
    began = time.monotonic()
    gang.ranks[other].join(30)
    assert gang.ranks[other].exitcode == ExitCode.HANG, gang.logs()
    assert time.monotonic() - began < 12
    beat = gang.heartbeat(other)
    assert beat is not None
    assert beat.failure is not None
    assert beat.failure.missing == [stopped], beat.failure
    # What the agent does: the handler writes the stacks of a process that cannot do anything by itself.
    gang.signal(signal.SIGUSR2, [stopped])
    gang.signal(signal.SIGCONT, [stopped])
    until = time.monotonic() + 5
    while "train.py" not in stacks(gang, stopped) and time.monotonic() < until:
        time.sleep(0.02)
    assert "train.py" in stacks(gang, stopped)
    gang.wait()


def test_a_slow_rank_is_not_killed_and_its_own_time_tells_it_apart(corpus: Path, tmp_path: Path) -> None:
    gang = Gang(tmp_path, make_recipe(corpus, steps=60), world=2, every=1000, fault="slow", environment=SHORT).run()
    own = []
    for rank in (0, 1):
        beat = gang.heartbeat(rank)
        assert beat is not None
        assert beat.own_seconds is not None
        own.append(beat.own_seconds)
    assert own[1] > 0.2
    assert own[1] > 1.5 * own[0], own


def test_the_limit_goes_by_phase_and_by_what_steps_take() -> None:
    auto = HangPolicy(start_seconds=100)
    assert limit(auto, "step", [0.1, 0.1]) == 100
    assert limit(auto, "step", [0.1, 0.1, 90.0]) == FLOOR_SECONDS
    assert limit(auto, "step", [20.0] * 5) == 60
    assert limit(auto, "checkpoint", [0.1] * 5) == 100
    assert limit(HangPolicy(step_timeout=30), "step", [0.1] * 5) == 30


def at(collectives: int, waits: bool = True) -> Position:
    return Position(step=7, collectives=collectives, waits=waits)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({0: at(9), 1: at(9), 2: at(9)}, [3]),
        ({0: at(9), 1: at(8), 2: at(9), 3: at(9)}, [1]),
        ({0: at(9), 1: at(9), 2: at(9), 3: at(9, waits=False)}, [3]),
        ({0: at(9), 1: at(9), 2: at(9), 3: at(9)}, []),
        ({rank: at(9, waits=False) for rank in range(4)}, []),
        ({0: at(9)}, []),
        ({2: at(9), 3: at(7)}, [0, 1]),
    ],
)
def test_who_is_behind(said: dict[int, Position], named: list[int]) -> None:
    assert behind(said, 4)[0] == named


def pulse(tmp_path: Path) -> Pulse:
    return Pulse(tmp_path, local_rank=0, rank=0, attempt=1, started=time.time())


def stepped(pulse: Pulse) -> Pulse:
    for step in range(1, 6):
        pulse.beat("step", step=step)
    return pulse


def test_every_beat_begins_the_count_anew_and_a_pause_of_the_process_does_not_count(tmp_path: Path) -> None:
    beating = stepped(pulse(tmp_path))
    watch = HangWatch(beating, HangPolicy(step_timeout=4))
    assert not watch.look(0.1)
    assert [watch.look(1.0) for _ in range(3)] == [False] * 3
    beating.beat("step", step=6)
    assert [watch.look(1.0) for _ in range(4)] == [False] * 4
    assert watch.look(1.0)
    beating.beat("checkpoint")
    assert [watch.look(1.0) for _ in range(40)] == [False] * 40


def test_the_thread_ends_the_process_with_71_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    left = threading.Event()
    monkeypatch.setattr(hang, "_stack_file", [(tmp_path / "stacks").open("w")])

    def leave(code: int) -> None:
        codes.append(code)
        left.set()

    beating = stepped(pulse(tmp_path))
    began = time.monotonic()
    with HangWatch(beating, HangPolicy(step_timeout=1), directory=tmp_path, leave=leave):
        assert left.wait(10)
    assert codes == [71]
    assert 0.9 < time.monotonic() - began < 5
    assert "test_hang.py" in (tmp_path / "stacks").read_text()
    told = json.loads((tmp_path / "rank-0.json").read_text())["failure"]
    assert (told["cause"], told["exit"]) == ("hang", 71)


def test_pace_leaves_out_what_was_waited_for() -> None:
    pace = Pace()
    found = None
    for look in range(200):
        found = pace.look(0.1, waits=look % 4 != 0, step=look // 10)
    assert found == pytest.approx(0.25, abs=0.06)

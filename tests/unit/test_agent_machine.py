"""The agent's state machine: what follows from what, and what holds after any sequence of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from trireme_agent.machine import AskToStop, Command, Ended, Kill, Leave, Machine, Start
from trireme_api.protocol import Action, AgentState, Assignment, Cause, Failure


def assignment(attempt: int, action: Action = Action.RUN, grace: float = 60.0) -> Assignment:
    return Assignment(attempt=attempt, action=action, procs_per_node=2, grace_seconds=grace)


def crash(local_rank: int, code: int = 1, cascade: bool = False) -> Ended:
    return Ended(local_rank, code, Failure(Cause.UNKNOWN, f"r{local_rank}", exit=code, cascade=cascade))


def running(attempt: int = 1, grace: float = 60.0) -> Machine:
    machine = Machine(patience=100.0)
    assert machine.assigned(assignment(attempt, grace=grace), 0.0) == [Start(assignment(attempt, grace=grace))]
    machine.started([0, 1])
    return machine


def test_hold_then_run() -> None:
    machine = Machine(100.0)
    assert machine.assigned(assignment(1, Action.HOLD), 0.0) == []
    assert (machine.state, machine.attempt) == (AgentState.WAITING, 1)
    assert machine.assigned(assignment(1), 0.0) == [Start(assignment(1))]
    assert machine.assigned(assignment(1, Action.HOLD), 0.0) == [], "an answer overtaken by a later one"
    assert machine.assigned(assignment(1), 0.0) == []


def test_a_failed_rank_lets_its_peers_settle_and_then_kills_them() -> None:
    machine = running()
    assert machine.ended([crash(1)], 10.0) == []
    assert machine.state is AgentState.STOPPING
    assert machine.tick(10.1, 0.0) == []
    assert machine.tick(10.4, 0.0) == [Kill(fast=True)]
    assert machine.tick(10.5, 0.0) == [], "once"
    machine.ended([crash(0, -9)], 10.6)
    assert machine.root is not None
    assert (machine.state, machine.root.message, machine.exit_code) == (AgentState.EXITED, "r1", None)
    for _ in range(3):
        assert machine.ended([], 11.0) == []
        assert machine.state is AgentState.EXITED


def test_after_a_hang_peers_get_time_to_dump() -> None:
    machine = running()
    machine.ended([crash(0, 71)], 10.0)
    assert machine.tick(12.0, 0.0) == []
    assert machine.tick(13.1, 0.0) == [Kill(fast=True)]


def test_a_later_root_replaces_a_cascade_but_not_after_our_own_kill() -> None:
    machine = running()
    machine.ended([crash(0, 1, cascade=True)], 10.0)
    machine.ended([crash(1, 3)], 10.1)
    assert machine.root is not None
    assert machine.root.exit == 3
    machine = running()
    machine.ended([crash(0, 1, cascade=True)], 10.0)
    machine.tick(11.0, 0.0)
    machine.ended([crash(1, -9)], 11.1)
    assert machine.root is not None
    assert machine.root.exit == 1


def test_a_newer_attempt_waits_for_the_old_ranks_to_be_gone() -> None:
    machine = running()
    assert machine.assigned(assignment(2, Action.HOLD), 5.0) == [Kill(fast=False)]
    assert machine.assigned(assignment(2), 5.1) == []
    assert machine.attempt == 1
    assert machine.ended([crash(0, -9)], 5.2) == []
    assert machine.ended([crash(1, -9)], 5.3) == [Start(assignment(2))]
    assert (machine.attempt, machine.root) == (2, None)


def test_restart_after_failure_and_stop_after_failure() -> None:
    machine = running()
    machine.ended([crash(0), crash(1)], 1.0)
    assert machine.assigned(assignment(2), 2.0) == [Start(assignment(2))]
    machine = running()
    machine.ended([crash(0, -11), crash(1)], 1.0)
    assert machine.assigned(assignment(1, Action.STOP), 2.0) == [Leave(139)]


def test_all_done() -> None:
    machine = running()
    assert machine.ended([Ended(0, 0)], 1.0) == []
    assert machine.ended([Ended(1, 0)], 1.0) == [Leave(0)]
    assert machine.assigned(assignment(2), 2.0) == [Start(assignment(2))], "another pod failed at the very end"
    assert machine.exit_code is None


def test_save_and_stop_in_time_too_late_and_twice() -> None:
    machine = running()
    assert machine.save_and_stop(0.0) == [AskToStop()]
    assert machine.save_and_stop(1.0) == []
    machine.ended([Ended(0, 75)], 2.0)
    assert machine.ended([Ended(1, 75)], 2.0) == [Leave(75)]
    machine = running(grace=10.0)
    machine.save_and_stop(0.0)
    assert machine.tick(8.9, 0.0) == []
    assert machine.tick(9.1, 0.0) == [Kill(fast=True)]
    assert machine.ended([crash(0, -9), crash(1, -9)], 9.2) == [Leave(137)]
    assert machine.root is not None
    assert "did not save and stop within 9 s" in machine.root.message


def test_ranks_that_just_die_of_the_sigterm_are_stopped_not_failed() -> None:
    machine = running()
    machine.save_and_stop(0.0)
    assert machine.ended([crash(0, -15), crash(1, 143)], 0.1) == [Leave(143)]
    assert machine.root is None


def test_a_crash_while_saving_is_a_failure_and_nobody_waits_for_a_decision() -> None:
    machine = running()
    machine.save_and_stop(0.0)
    machine.ended([crash(0, 74)], 1.0)
    assert machine.tick(1.5, 0.0) == [Kill(fast=True)]
    assert machine.ended([crash(1, -9)], 1.6) == [Leave(74)]


def test_after_a_stop_request_no_newer_attempt_is_taken() -> None:
    machine = running()
    machine.save_and_stop(0.0)
    assert machine.assigned(assignment(2), 0.1) == []
    machine = running()
    machine.assigned(assignment(2, Action.HOLD), 0.0)
    machine.save_and_stop(0.1)
    assert machine.ended([crash(0, -9), crash(1, -9)], 0.2) == [Leave(143)]


def test_one_rank_told_by_its_peers_is_waited_for() -> None:
    machine = running()
    machine.ended([Ended(0, 75)], 0.0)
    assert machine.state is AgentState.STOPPING
    assert machine.ended([Ended(1, 75)], 1.0) == [], "why they were asked to is the coordinator's to say"
    assert machine.state is AgentState.EXITED
    assert machine.assigned(assignment(1, Action.SAVE_AND_STOP), 1.5) == [Leave(75)]


def test_ranks_that_save_for_another_size_leave_their_pod_to_the_next_attempt() -> None:
    machine = running()
    assert machine.assigned(assignment(1, Action.SAVE_AND_HOLD), 0.0) == [AskToStop()]
    machine.ended([Ended(0, 75)], 1.0)
    assert machine.ended([Ended(1, 75)], 1.0) == []
    assert (machine.state, machine.root, machine.exit_code) == (AgentState.EXITED, None, None)
    assert machine.assigned(assignment(2, Action.HOLD), 2.0) == []
    assert machine.state is AgentState.WAITING
    assert machine.assigned(assignment(2), 3.0) == [Start(assignment(2))]


def test_ranks_that_know_no_saving_are_ended_for_another_size_and_no_failure() -> None:
    machine = running()
    machine.assigned(assignment(1, Action.SAVE_AND_HOLD), 0.0)
    assert machine.ended([crash(0, -15), crash(1, 143)], 0.1) == []
    assert (machine.state, machine.root) == (AgentState.EXITED, None)


def test_ranks_that_are_done_while_asked_to_save_are_done() -> None:
    machine = running()
    machine.assigned(assignment(1, Action.SAVE_AND_HOLD), 0.0)
    assert machine.ended([Ended(0, 0), Ended(1, 0)], 0.1) == [Leave(0)]


def test_who_saved_and_hears_nothing_any_more_leaves() -> None:
    machine = running()
    machine.assigned(assignment(1, Action.SAVE_AND_HOLD), 0.0)
    machine.ended([Ended(0, 75), Ended(1, 75)], 10.0)
    assert machine.tick(20.0, 10.0) == []
    assert machine.tick(200.0, 190.0) == [Leave(75)]


def test_patience_ends_only_a_failed_pod_that_hears_nothing() -> None:
    machine = running()
    assert machine.tick(1000.0, 1000.0) == [], "training goes on"
    machine.ended([crash(0, 9), crash(1, 9)], 1000.0)
    assert machine.tick(1001.0, 1000.0) == [], "just failed"
    assert machine.tick(1200.0, 50.0) == [], "somebody answers"
    assert machine.tick(1200.0, 1200.0) == [Leave(9)]


class AnyOrder(RuleBasedStateMachine):
    """Assignments in any order, ranks ending in any way, signals at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(patience=100.0)
        self.now = 0.0
        self.alive: set[int] = set()
        self.left: int | None = None
        self.killed = False
        self.highest = 0

    def do(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Start):
                assert not self.alive, "two attempts at once"
                assert command.assignment.action is Action.RUN
                assert command.assignment.attempt == self.machine.attempt
                self.alive, self.killed, self.left = {0, 1}, False, None
                self.machine.started([0, 1])
            elif isinstance(command, Kill):
                assert self.alive
                self.killed = True
            elif isinstance(command, AskToStop):
                assert self.alive
            elif isinstance(command, Leave):
                assert not self.alive, "the agent left its ranks behind"
                self.left = command.code

    @rule(attempt=st.integers(1, 4), action=st.sampled_from(list(Action)))
    def assign(self, attempt: int, action: Action) -> None:
        before = self.machine.attempt
        self.do(self.machine.assigned(assignment(attempt, action), self.now))
        assert self.machine.attempt >= before

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 1), code=st.sampled_from([0, 75, 1, 71, -9, -15, 143]), cascade=st.booleans())
    def end(self, which: int, code: int, cascade: bool) -> None:
        local_rank = sorted(self.alive)[which % len(self.alive)]
        self.alive.discard(local_rank)
        end = Ended(local_rank, code) if code in (0, 75) else crash(local_rank, code, cascade)
        self.do(self.machine.ended([end], self.now))

    @rule(seconds=st.sampled_from([0.1, 1.0, 100.0]), heard=st.booleans())
    def tick(self, seconds: float, heard: bool) -> None:
        self.now += seconds
        self.do(self.machine.ended([], self.now))
        self.do(self.machine.tick(self.now, 0.0 if heard else self.now))

    @rule()
    def sigterm(self) -> None:
        self.do(self.machine.save_and_stop(self.now))

    @rule()
    def second_sigterm(self) -> None:
        self.do(self.machine.terminate_now())

    @invariant()
    def consistent(self) -> None:
        machine = self.machine
        assert machine.live == self.alive
        self.highest = max(self.highest, machine.attempt)
        assert machine.attempt == self.highest
        if self.alive:
            assert machine.state in (AgentState.RUNNING, AgentState.STOPPING)
            assert machine.exit_code is None
        else:
            assert machine.state in (AgentState.WAITING, AgentState.EXITED)
        if machine.leaving and not self.alive:
            assert machine.exit_code is not None, "told to go, nothing runs, and yet it stays"
        if machine.state is AgentState.EXITED and machine.root is None and machine.exit_code is None:
            asked = machine.held is not None and machine.held.action is Action.SAVE_AND_HOLD
            assert 75 in machine.codes.values() or asked, "nothing runs, nothing is awaited, and yet it stays"
        if machine.root is not None and machine.exit_code is not None:
            assert machine.exit_code not in (0, 75), "a failure was reported as success"


AnyOrder.TestCase.settings = settings(max_examples=300, stateful_step_count=30)
test_any_order = AnyOrder.TestCase

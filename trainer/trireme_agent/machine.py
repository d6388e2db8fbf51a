"""What the agent decides: a state machine without I/O, clock or processes.

It is told what happened and answers with what to do. `now` is monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Dict, List, Optional, Sequence, Set, Tuple, Union

from trireme_api.protocol import Action, AgentState, Assignment, Cause, ExitCode, Failure

from trireme_agent.failure import prefer, shell_code

SETTLE = 0.3
"""Seconds between the first failed rank and the killing of its peers, to see how they end."""
SETTLE_HANG = 3.0
"""After exit 71 the peers are dumping their stacks, too."""
ORDER = {Action.HOLD: 0, Action.RUN: 1, Action.SAVE_AND_HOLD: 2, Action.SAVE_AND_STOP: 3, Action.STOP: 4}
TERMINATED = 143


@dataclass(frozen=True)
class Start:
    assignment: Assignment


@dataclass(frozen=True)
class AskToStop:
    """Stop file and SIGTERM: agree on a step, save, exit 75."""


@dataclass(frozen=True)
class Kill:
    fast: bool
    """False: a short SIGTERM first."""


@dataclass(frozen=True)
class Leave:
    """The agent's work is done: report, then exit with `code`."""

    code: int


@dataclass(frozen=True)
class Dump:
    """Save the stacks of all local ranks."""


Command = Union[Start, AskToStop, Kill, Leave, Dump]


class Stopping(Enum):
    FAILED = "a rank failed; its peers are let go"
    SAVING = "asked to save and stop"
    REPLACED = "a newer attempt waits"
    STOPPED = "told to stop"


@dataclass
class Ended:
    """One rank's end, with its failure if it is one by itself."""

    local_rank: int
    code: int
    failure: Optional[Failure] = None


class Machine:
    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.held: Optional[Assignment] = None
        self.state = AgentState.WAITING
        self.root: Optional[Failure] = None
        self.codes: Dict[int, int] = {}
        self.live: Set[int] = set()
        self.stopping: Optional[Stopping] = None
        self.leaving = False
        """No restart follows: told to save and stop, to stop, or terminated."""
        self.exit_code: Optional[int] = None
        self._pending: Optional[Assignment] = None
        self._deadline: Optional[float] = None
        self._killed = False
        self._failed_at: Optional[float] = None

    @property
    def attempt(self) -> int:
        return self.held.attempt if self.held else 0

    @property
    def own_doing(self) -> bool:
        """Whether a rank that ends now does so by itself, not because this agent ended it."""
        return not self._killed and self.stopping not in (Stopping.REPLACED, Stopping.STOPPED)

    def assigned(self, assignment: Assignment, now: float) -> List[Command]:
        """A newer attempt replaces what runs; within an attempt only later actions count; anything older is stale."""
        newest = self._pending or self.held
        if newest is not None and _order(assignment) <= _order(newest):
            return []
        if newest is None or assignment.attempt > newest.attempt:
            if self.leaving:
                return []
            self.exit_code = None
            self._pending = assignment
            if not self.live:
                return self._adopt()
            already_killed = self._killed
            self._stop(Stopping.REPLACED)
            return [] if already_killed else [Kill(fast=False)]
        if self._pending is not None:
            self._pending = assignment
            return []
        asked = assignment.dump and self.held is not None and not self.held.dump and self.live
        self.held = assignment
        return [*([Dump()] if asked else []), *self._act(now)]

    def _adopt(self) -> List[Command]:
        assert self._pending is not None
        self.held, self._pending = self._pending, None
        self.state = AgentState.WAITING
        self.root, self.codes, self.stopping = None, {}, None
        self._deadline, self._killed, self._failed_at = None, False, None
        return self._act(0.0)

    def _act(self, now: float) -> List[Command]:
        assert self.held is not None
        action = self.held.action
        if action is Action.RUN and self.state is AgentState.WAITING:
            self.state = AgentState.STARTING
            return [Start(self.held)]
        if action is Action.SAVE_AND_STOP:
            return self.save_and_stop(now)
        if action is Action.SAVE_AND_HOLD:
            return self._save(now) if self.live and self.stopping is None else []
        if action is Action.STOP:
            self.leaving = True
            if self.live:
                self._stop(Stopping.STOPPED)
                self._killed = True
                return [Kill(fast=False)]
            return self._end(self._code(TERMINATED if not self.codes else None))
        return []

    def started(self, local_ranks: Sequence[int]) -> None:
        self.live = set(local_ranks)
        self.state = AgentState.RUNNING

    def save_and_stop(self, now: float) -> List[Command]:
        """From the coordinator, or SIGTERM to the pod. A second call changes nothing."""
        if self.leaving:
            return []
        self.leaving = True
        self._pending = None
        if not self.live:
            return self._end(self._code(ExitCode.SAVED_AND_STOPPED if not self.codes else None))
        if self.stopping is Stopping.FAILED:
            return []
        if self.stopping is Stopping.REPLACED:
            self._stop(Stopping.STOPPED)
            return []
        return self._save(now)

    def _save(self, now: float) -> List[Command]:
        self._stop(Stopping.SAVING, now + (_time_to_save(self.held.grace_seconds) if self.held else 0.0))
        return [AskToStop()]

    def terminate_now(self) -> List[Command]:
        """A second SIGTERM or SIGINT: no more patience."""
        self.leaving = True
        self._pending = None
        if not self.live:
            return self._end(self._code(TERMINATED if not self.codes else None))
        self._stop(Stopping.STOPPED)
        self._killed = True
        return [Kill(fast=True)]

    def ended(self, ends: Sequence[Ended], now: float) -> List[Command]:
        if not ends:
            return []
        own_doing, hung_before = self.own_doing, self._hung
        for end in ends:
            self.live.discard(end.local_rank)
            self.codes[end.local_rank] = end.code
            asked = self.stopping is Stopping.SAVING and end.code in (-15, TERMINATED)
            if own_doing and end.failure is not None and not asked:
                self.root = prefer(self.root, end.failure)
        dump: List[Command] = [Dump()] if self._hung and not hung_before else []
        if not self.live:
            return [*dump, *self._all_ended(now)]
        if own_doing and self.root is not None and self.stopping is not Stopping.FAILED:
            self._stop(Stopping.FAILED, now + (SETTLE_HANG if self.root.exit == ExitCode.HANG else SETTLE))
        elif self.stopping is None and ExitCode.SAVED_AND_STOPPED in self.codes.values():
            # One rank saved and stopped unasked by us (told through its peers): the others are about to.
            assert self.held is not None
            self._stop(Stopping.SAVING, now + _time_to_save(self.held.grace_seconds))
        return dump

    @property
    def _hung(self) -> bool:
        return self.root is not None and self.root.exit == ExitCode.HANG

    def _all_ended(self, now: float) -> List[Command]:
        if self._pending is not None and not self.leaving:
            return self._adopt()
        self.stopping = None
        if self.leaving or (self.root is None and not self._goes_on()):
            return self._end(self._code(None))
        self.state = AgentState.EXITED
        self._failed_at = now
        return []

    def _goes_on(self) -> bool:
        """Whether ranks that ended without a failure may be started again: the coordinator has said so, or it may be
        about to, for ranks that save together hear of it through their peers first."""
        asked = self.held is not None and self.held.action is Action.SAVE_AND_HOLD
        codes = set(self.codes.values())
        return ExitCode.SAVED_AND_STOPPED in codes or (asked and codes != {0})

    def tick(self, now: float, unheard: float) -> List[Command]:
        """`unheard`: seconds since the coordinator last answered."""
        if self.live and self._deadline is not None and now >= self._deadline and not self._killed:
            self._killed = True
            if self.stopping is Stopping.SAVING:
                assert self.held is not None
                first = self.held.node_rank * self.held.procs_per_node
                who = ", ".join(str(first + local_rank) for local_rank in sorted(self.live))
                limit = _time_to_save(self.held.grace_seconds)
                message = f"rank {who} did not save and stop within {limit:g} s and was killed"
                self.root = prefer(self.root, Failure(Cause.UNKNOWN, message, rank=first + min(self.live), exit=-9))
            return [Kill(fast=True)]
        waited = now - self._failed_at if self._failed_at is not None else 0.0
        if self.exit_code is None and min(unheard, waited) > self._patience and not self.live:
            return self._end(self._code(None))
        return []

    def _stop(self, why: Stopping, deadline: Optional[float] = None) -> None:
        self.stopping = why
        self.state = AgentState.STOPPING
        self._deadline = deadline

    def _end(self, code: int) -> List[Command]:
        self.state = AgentState.EXITED
        self.exit_code = code
        return [Leave(code)]

    def _code(self, if_none_ran: Optional[int]) -> int:
        """The worst rank's meaning: a failure, else killed, else saved and stopped, else done."""
        if if_none_ran is not None:
            return int(if_none_ran)
        if self.root is not None and self.root.exit is not None:
            return shell_code(self.root.exit)
        codes = [shell_code(code) for code in self.codes.values()]
        others = [code for code in codes if code not in (ExitCode.DONE, ExitCode.SAVED_AND_STOPPED)]
        if others:
            return TERMINATED if set(others) <= {137, TERMINATED} else others[0]
        return int(max(codes, default=0))


def _time_to_save(grace: float) -> float:
    """A tenth of the grace, at most 5 s, is the agent's: to kill, to tell, and to write its last words."""
    return grace - min(5.0, grace / 10)


def _order(assignment: Assignment) -> Tuple[int, int, bool]:
    return assignment.attempt, ORDER[assignment.action], bool(assignment.dump)

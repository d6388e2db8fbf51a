"""What a rank says to its agent: the heartbeat file and those beside it.

Standard library only and Python 3.9 syntax: travels with the agent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from trireme_api.protocol import CheckpointRef, Failure, PhaseTime, Progress, Spent
from trireme_api.wire import Message


@dataclass
class Heartbeat(Message):
    """`$TRIREME_HEARTBEAT_DIR/rank-<local rank>.json`, replaced atomically at least once per step."""

    step: int
    phase: str
    """start | rendezvous | init | load | compile | data | step | checkpoint | eval | done"""
    time: float
    attempt: int = 0
    progress: Optional[Progress] = None
    checkpoint: Optional[CheckpointRef] = None
    """The newest committed one."""
    phases: Optional[PhaseTime] = None
    spent: Optional[Spent] = None
    failure: Optional[Failure] = None
    """Written before a rank ends on purpose with a non-zero code."""
    stack_signal: Optional[int] = None
    """SIGUSR1 or SIGUSR2: on it the rank writes the stacks of its threads to `stacks_name` beside this file."""
    own_seconds: Optional[float] = None


def heartbeat_name(local_rank: int) -> str:
    return f"rank-{local_rank}.json"


def stacks_name(local_rank: int) -> str:
    return f"stacks-{local_rank}.txt"


def flight_name(local_rank: int) -> str:
    """torch's flight recorder, written by the trainer beside its stacks when it sees a hang."""
    return f"flight-{local_rank}.json"

"""The local ranks as processes: start, watch, signal, and leave nothing behind.

Every rank is the leader of its own session, so its process group holds all it started. What leaves the group (a
daemon with a session of its own) comes back to the agent as an orphan and is killed when the attempt ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Protocol, Sequence, Set

from trireme_api.protocol import ExitCode

from trireme_agent import processes


@dataclass
class RankExit:
    local_rank: int
    code: int
    """Negative: signal."""
    note: str = ""
    """Set when the process could not be started at all."""


class Standby(Protocol):
    """A process that waits, already a session leader, to become a rank."""

    pid: int

    def wake(self, environment: Dict[str, str]) -> None: ...


@dataclass
class Launch:
    """One rank to start. `output` is the write end of its log pipe; the caller keeps ownership."""

    local_rank: int
    command: Sequence[str]
    environment: Dict[str, str]
    output: int
    standby: Optional[Standby] = None


Spawn = Callable[[Launch], int]
"""Starts a rank as a session leader and returns its pid; raises OSError."""


def spawn(launch: Launch) -> int:
    if launch.standby is not None:
        launch.standby.wake(launch.environment)
        return launch.standby.pid
    process = subprocess.Popen(
        list(launch.command), env=launch.environment, stdin=subprocess.DEVNULL, stdout=launch.output,
        stderr=subprocess.STDOUT, start_new_session=True, close_fds=True,
    )
    # The supervisor reaps by pid; Popen must neither wait for it nor warn that nobody did.
    process.returncode = 0
    return process.pid


class Supervisor:
    """Not thread-safe: one thread starts, polls and kills."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._live: Dict[int, int] = {}
        """pid → local rank"""
        self._standby: Set[int] = set()
        self._unborn: List[RankExit] = []
        self._kill_at: Optional[float] = None
        self.pids: Dict[int, int] = {}
        """local rank → pid of the newest attempt, ended or not."""

    @property
    def live(self) -> List[int]:
        return sorted(self._live.values())

    @property
    def live_pids(self) -> Set[int]:
        return set(self._live)

    def start(self, launches: Sequence[Launch], how: Spawn = spawn) -> None:
        """Starts all; one that cannot be started is an exit with the shell's code for it, seen at the next poll."""
        if self._live:
            raise RuntimeError("ranks of an older attempt are still alive")
        self.pids = {}
        self._kill_at = None
        for launch in launches:
            try:
                pid = how(launch)
            except FileNotFoundError as error:
                self._cannot(launch, ExitCode.NOT_FOUND, f"{launch.command[0]}: {error.strerror or error}")
            except PermissionError as error:
                self._cannot(launch, ExitCode.NOT_EXECUTABLE, f"{launch.command[0]}: {error.strerror or error}")
            except OSError as error:
                self._cannot(launch, 1, f"cannot start {launch.command[0]}: {error}")
            else:
                self._standby.discard(pid)
                self._live[pid] = launch.local_rank
                self.pids[launch.local_rank] = pid

    def _cannot(self, launch: Launch, code: int, note: str) -> None:
        self._unborn.append(RankExit(launch.local_rank, int(code), note))

    def keep(self, pid: int) -> None:
        """A child that is no rank (a warm standby): reaped when it ends, left alone by the sweep."""
        self._standby.add(pid)

    def keeps(self, pid: int) -> bool:
        """Whether that child is still alive, as far as polls have seen."""
        return pid in self._standby

    def poll(self) -> List[RankExit]:
        """Reaps every ended child, ours or adopted, and returns the ranks among them."""
        exits, self._unborn = self._unborn, []
        if self._kill_at is not None and self._clock() >= self._kill_at:
            self._signal_all(signal.SIGKILL)
            self._kill_at = None
        while True:
            pid = self._ended_child()
            if pid is None:
                return exits
            if pid in self._live:
                # Before it is reaped: its number cannot belong to anyone else yet.
                processes.signal_group(pid, signal.SIGKILL)
            try:
                _, status = os.waitpid(pid, 0)
            except ChildProcessError:
                continue
            self._standby.discard(pid)
            if pid in self._live:
                exits.append(RankExit(self._live.pop(pid), os.waitstatus_to_exitcode(status)))

    @staticmethod
    def _ended_child() -> Optional[int]:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return None
        return found.si_pid if found is not None else None

    def signal(self, number: int) -> None:
        """To the ranks themselves, not to their children: a rank decides what its helpers should know."""
        for pid in list(self._live):
            processes.signal_process(pid, number)

    def kill(self, grace: float = 0.0) -> None:
        """SIGTERM now and SIGKILL after `grace` seconds (by later polls), to the whole groups; 0: SIGKILL at once."""
        if not self._live:
            return
        if grace <= 0:
            self._signal_all(signal.SIGKILL)
            self._kill_at = None
        elif self._kill_at is None:
            self._signal_all(signal.SIGTERM)
            self._kill_at = self._clock() + grace

    def _signal_all(self, number: int) -> None:
        for pid in list(self._live):
            processes.signal_group(pid, number)

    def sweep(self, limit: float = 2.0) -> int:
        """Kills what ended ranks left behind outside their groups; returns how many. Only with no rank alive."""
        killed = 0
        until = self._clock() + limit
        while True:
            self.poll()
            # Processes of a killed orphan's own children come to us only once it is gone, hence the loop.
            left = [s for s in processes.children(os.getpid(), except_for=self._standby) if s.state != "Z"]
            if not left or self._clock() >= until:
                return killed
            for stat in left:
                processes.signal_process(stat.pid, signal.SIGKILL)
                killed += 1
            time.sleep(0.005)

    def close(self) -> None:
        """Nothing of ours is alive afterwards, standby processes included."""
        self._signal_all(signal.SIGKILL)
        for pid in list(self._standby):
            processes.signal_group(pid, signal.SIGKILL)
        until = self._clock() + 5.0
        while (self._live or self._standby) and self._clock() < until:
            self.poll()
            time.sleep(0.005)
        with contextlib.suppress(OSError):
            self.sweep()

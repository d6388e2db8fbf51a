"""The trainer's own hang watch: a thread that sees no step for too long writes all stacks and torch's flight recorder,
asks the store which rank the others wait for, and ends this rank with 71.

It is a little quicker than the operator's watch, because it knows more: its own step times exactly, and from every rank
that is still alive how many collectives it has begun. It counts only time in which it ran itself, so a paused process
does not take its own pause for a hang.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from trireme_api.hang import HangPolicy
from trireme_api.heartbeat import flight_name, stacks_name
from trireme_api.protocol import Cause, Env, ExitCode

from trireme_trainer.telemetry.heartbeat import Pulse
from trireme_trainer.telemetry.pace import Pace, waits_for_peers

log = logging.getLogger(__name__)
STACK_SIGNAL = signal.SIGUSR2
FACTOR = 3.0
FLOOR_SECONDS = 12.0
STEPS_TO_LEARN = 3
TICK = 0.1
LINGER_SECONDS = 1.0
LONGEST_TICK = 1.0
"""More than this between two looks means that this process did not run; the rest is not counted."""
STORE_SECONDS = 3.0
ASKERS = 8
"""At most about so many ranks read what all have said."""


@dataclass(frozen=True)
class Position:
    """Where a rank that stands still says it is."""

    step: int
    collectives: int
    """Begun since the process group was made, over all groups."""
    waits: bool
    """Whether its main thread is in a collective."""


def answer_with_stacks(env: Mapping[str, str]) -> int | None:
    """From now on STACK_SIGNAL writes the stacks of all threads where the agent looks for them (without an agent: to
    stderr). Works in a process that hangs, for it needs no interpreter. Returns the signal, None where it cannot."""
    directory = env.get(Env.HEARTBEAT_DIR)
    file: TextIO = sys.stderr
    try:
        if directory:
            Path(directory).mkdir(parents=True, exist_ok=True)
            # Never closed: the handler writes to its descriptor.
            file = open(Path(directory) / stacks_name(_local_rank(env)), "w")  # noqa: SIM115
        faulthandler.register(STACK_SIGNAL, file=file, all_threads=True)
    except (OSError, ValueError, AttributeError):
        return None
    _stack_file.append(file)
    return int(STACK_SIGNAL) if directory else None


_stack_file: list[TextIO] = []


def _local_rank(env: Mapping[str, str]) -> int:
    text = env.get(Env.LOCAL_RANK, "")
    return int(text) if text.isdecimal() else 0


def limit(policy: HangPolicy, phase: str, intervals: Sequence[float]) -> float:
    """Seconds without a step after which this rank hangs; `intervals`: seconds of the newest steps."""
    if phase != "step" or len(intervals) < STEPS_TO_LEARN:
        return float(policy.start_seconds)
    if policy.step_timeout != "auto":
        return float(policy.step_timeout)
    return max(FLOOR_SECONDS, FACTOR * statistics.median(intervals))


def behind(said: Mapping[int, Position], size: int) -> tuple[list[int], str]:
    """(ranks the others wait for, why), from what each rank said, if it said anything; no ranks where it does not tell.

    The collective a rank never began is the one the others are in; a rank that says nothing does not even run.
    """
    absent = [rank for rank in range(size) if rank not in said]
    if absent and len(absent) <= size / 2:
        return absent, "gives no sign of life"
    if absent:
        return [], ""
    least = min(position.collectives for position in said.values())
    most = max(position.collectives for position in said.values())
    if least < most:
        ranks = [rank for rank in sorted(said) if said[rank].collectives == least]
        return ranks, f"has begun {least} collectives, others {most}"
    busy = [rank for rank in sorted(said) if not said[rank].waits]
    if busy and len(busy) < size:
        return busy, "is in no collective, the others are"
    return [], ""


class Board:
    """What ranks that stand still tell one another, through the store they met at."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size

    @classmethod
    def of_world(cls, rank: int, size: int) -> Board | None:
        """On a connection of its own: the one of the process group may be held by a thread that waits."""
        if size == 1:
            return None
        import torch.distributed as dist

        store: Any = dist.distributed_c10d._get_default_store()
        return cls(store.clone(), rank, size)

    def tell(self, position: Position) -> None:
        with suppress(Exception):  # a store that is gone or hangs: the others notice by themselves
            _within(STORE_SECONDS, lambda: self._store.set(_key(self._rank), json.dumps(asdict(position))))

    def ask(self) -> tuple[list[int], str]:
        if self._rank % max(1, self._size // ASKERS):
            return [], ""
        try:
            said = _within(STORE_SECONDS, self._read)
        except TimeoutError:
            return ([0], "holds the store and does not answer") if self._rank else ([], "")
        except Exception as error:
            log.warning("the store is gone, so nobody can be named: %s", error)
            return [], ""
        return behind(said, self._size)

    def linger(self) -> None:
        """The first end breaks the collective that the others are in: each first has time to see the hang itself, and
        the rank that serves the store leaves last."""
        time.sleep(LINGER_SECONDS if self._rank else 2 * LINGER_SECONDS)

    def _read(self) -> dict[int, Position]:
        said = {}
        for rank in range(self._size):
            if self._store.check([_key(rank)]):
                said[rank] = Position(**json.loads(self._store.get(_key(rank))))
        return said


def _key(rank: int) -> str:
    return f"trireme/hang/{rank}"


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """What `work` returns or raises; TimeoutError when it takes longer: who serves the store may be who hangs."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, name="hang-board", daemon=True).start()
    return done.result(seconds)


class HangWatch:
    """`with` it around training."""

    def __init__(
        self, pulse: Pulse, policy: HangPolicy, *, board: Board | None = None, pace: Pace | None = None,
        directory: Path | None = None, local_rank: int = 0, leave: Callable[[int], object] = os._exit,
    ) -> None:  # fmt: skip
        self._pulse, self._policy, self._board, self._pace, self._leave = pulse, policy, board, pace, leave
        self._directory, self._local_rank = directory, local_rank
        self._main = threading.main_thread().ident or 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang-watch", daemon=True)
        self._ending = False
        self._quiet = 0.0
        self._seen = -1
        self._told = 0.0

    def __enter__(self) -> HangWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._ending:
            # A peer's end has broken the collective and thrown the main thread out: it is a hang all the same.
            self._thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(TICK):
            now = time.monotonic()
            if self.look(min(now - before, LONGEST_TICK)) and not self._closed.is_set():
                self._ending = True
                try:
                    self._end()
                finally:  # whatever cannot be told or written, a rank that hangs must not stay
                    self._leave(ExitCode.HANG)
                return
            before = now

    def look(self, passed: float) -> bool:
        """One look, `passed` seconds after the last; True when this rank hangs."""
        pulse = self._pulse
        waits = waits_for_peers(self._main)
        if self._pace is not None:
            pulse.own_seconds = self._pace.look(passed, waits, pulse.step)
        if pulse.beats != self._seen:
            self._seen, self._quiet, self._told = pulse.beats, 0.0, 0.0
            return False
        self._quiet += passed
        most = limit(self._policy, pulse.phase, pulse.intervals)
        if self._board is not None and self._quiet >= max(most / 2, self._told + 1.0):
            self._told = self._quiet
            self._board.tell(Position(pulse.step, collectives_begun(), waits))
        return self._quiet >= most

    def _end(self) -> None:
        pulse = self._pulse
        missing, why = self._board.ask() if self._board is not None else ([], "")
        who = f": rank {', '.join(map(str, missing))} {why}" if missing else ""
        last, record = flight_record()
        at = f" (last collective here: {last})" if last else ""
        message = f"no step for {self._quiet:.0f} s after step {pulse.step}, in phase {pulse.phase}{who}{at}"
        self._write(record)
        log.error("%s", message)
        pulse.fail(Cause.HANG, message, exit_code=ExitCode.HANG, missing=missing or None)
        sys.stdout.flush()
        if self._board is not None:
            self._board.linger()

    def _write(self, record: bytes) -> None:
        file = _stack_file[-1] if _stack_file else sys.stderr
        try:
            faulthandler.dump_traceback(file=file, all_threads=True)
            if record and self._directory is not None:
                (self._directory / flight_name(self._local_rank)).write_bytes(record)
        except (OSError, ValueError) as error:
            log.warning("stacks could not be written: %s", error)


def collectives_begun() -> int:
    """By this rank, over all its groups."""
    if "torch.distributed" not in sys.modules:
        return 0
    import torch.distributed as dist

    total = 0
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    for group in groups:
        try:
            total += group._get_sequence_number_for_group()
        except RuntimeError:  # a backend that does not count
            continue
    return total


def flight_record() -> tuple[str, bytes]:
    """(the newest collective in words, the whole record as JSON); empty where this torch keeps none."""
    if "torch.distributed" not in sys.modules:
        return "", b""
    try:
        import torch._C._distributed_c10d as c10d

        dump: Any = getattr(c10d, "_dump_fr_trace_json", None)
        record: bytes = dump() if dump is not None else b"{}"
        entries = json.loads(record).get("entries", [])
    except (ImportError, RuntimeError, ValueError):
        return "", b""
    if not entries:
        return "", b""
    last = max(entries, key=lambda entry: entry.get("record_id", 0))
    return f"{last.get('profiling_name')} {last.get('collective_seq_id')}, {last.get('state')}", record

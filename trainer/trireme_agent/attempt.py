"""The ranks of one attempt with everything that belongs to them: folder, pipes, logs, heartbeats, OOM count."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from typing import Collection, Dict, List, Optional

from trireme_api.protocol import Assignment, MemoryShards, PhaseTime, RankReport, Reached, Stacks, by_set, parse_shard

from trireme_agent.cgroup import oom_kills
from trireme_agent.environment import global_rank, rank_environment
from trireme_agent.failure import Evidence, classify
from trireme_agent.heartbeats import Heartbeats
from trireme_agent.logs import RankLog, Stream
from trireme_agent.machine import Ended
from trireme_agent.settings import Settings
from trireme_agent.stacks import Dump, Target, lasting_folder
from trireme_agent.supervisor import Launch, RankExit, Supervisor
from trireme_agent.warm import WarmPool

TAIL_SETTLE = 0.2
"""Longest wait for the last lines of a failed rank; its failure is told within half a second of its end."""


class Attempt:
    def __init__(self, settings: Settings, assignment: Assignment) -> None:
        self.assignment = assignment
        self._settings = settings
        self.folder = os.path.join(settings.work_dir, f"attempt-{assignment.attempt}")
        self.stop_file = os.path.join(self.folder, "stop")
        self.heartbeats = Heartbeats(self.folder, assignment.procs_per_node, assignment.attempt)
        self.phases = PhaseTime(assigned=time.time())
        self.memory: List[MemoryShards] = []
        """As it was at the barrier: what the ranks of this attempt can resume from."""
        self.exits: Dict[int, RankExit] = {}
        self._logs: Dict[int, RankLog] = {}
        self._oom_before: Optional[int] = None
        self._dump: Optional[Dump] = None

    def start(self, supervisor: Supervisor, stream: Stream, warm: WarmPool) -> None:
        """Raises OSError when the folder or the pipes cannot be made."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.heartbeats.prepare()
        self._oom_before = oom_kills()
        launches: List[Launch] = []
        try:
            for local_rank in range(self.assignment.procs_per_node):
                launches.append(self._launch(local_rank, stream, warm))
            supervisor.start(launches)
        finally:
            for launch in launches:
                if launch.output >= 0:
                    os.close(launch.output)
        self.phases.started = time.time()

    def _launch(self, local_rank: int, stream: Stream, warm: WarmPool) -> Launch:
        rank = global_rank(self.assignment, local_rank)
        environment = rank_environment(
            self._settings.environment, self.assignment, local_rank, heartbeat_dir=self.folder,
            stop_file=self.stop_file, error_file=self._error_file(local_rank), log_dir=self._settings.log_dir,
        )
        standby = warm.take()
        if standby is not None:
            read_end, write_end = standby.output, -1
        else:
            read_end, write_end = os.pipe()
        stream.lines.attempt = self.assignment.attempt
        self._logs[local_rank] = RankLog(rank, self.assignment.attempt, read_end, stream, self._settings.log_dir)
        return Launch(local_rank, self._settings.command, environment, write_end, standby)

    def _error_file(self, local_rank: int) -> str:
        return os.path.join(self.folder, f"error-{local_rank}.json")

    def ask_to_stop(self) -> None:
        try:
            with open(self.stop_file, "w", encoding="ascii"):
                pass
        except OSError:
            pass  # SIGTERM, which follows, says the same

    def ended(self, found: RankExit, *, pod_stopping: bool) -> Ended:
        """Gathers what is known about this end and judges it."""
        self.exits[found.local_rank] = found
        log = self._logs[found.local_rank]
        if found.code in (0, 75):
            return Ended(found.local_rank, found.code)
        tail = [found.note] if found.note else log.tail(TAIL_SETTLE)
        self.heartbeats.poll()
        beat = self.heartbeats.beat(found.local_rank)
        oom_now = oom_kills()
        evidence = Evidence(
            rank=log.rank,
            exit=found.code,
            tail=tail,
            oom_killed=oom_now is not None and self._oom_before is not None and oom_now > self._oom_before,
            told=beat.failure if beat else None,
            recorded=_recorded(self._error_file(found.local_rank)),
            pod_stopping=pod_stopping,
            at=time.time(),
        )
        return Ended(found.local_rank, found.code, classify(evidence))

    def rank_reports(self, pids: Dict[int, int]) -> List[RankReport]:
        reports = []
        for local_rank in range(self.assignment.procs_per_node):
            beat, found = self.heartbeats.beat(local_rank), self.exits.get(local_rank)
            reports.append(
                RankReport(
                    local_rank=local_rank,
                    pid=pids.get(local_rank),
                    exit=found.code if found else None,
                    step=beat.step if beat else None,
                    phase=beat.phase if beat else None,
                    heartbeat_age=self.heartbeats.age(local_rank),
                    step_seconds=self.heartbeats.step_seconds(local_rank),
                    own_seconds=beat.own_seconds if beat else None,
                )
            )
        return reports

    def dump_stacks(self, pids: Dict[int, int]) -> None:
        """Begins to save the stacks of all ranks; `pids` of those that live. Once per attempt: the first tell most."""
        if self._dump is not None:
            return
        targets = []
        for local_rank in range(self.assignment.procs_per_node):
            beat = self.heartbeats.beat(local_rank)
            targets.append(Target(local_rank, pids.get(local_rank), beat.stack_signal if beat else None))
        folder = lasting_folder(self._settings.environment, self._settings.log_dir, self.assignment.attempt)
        self._dump = Dump(self.folder, folder, global_rank(self.assignment, 0), targets)
        self._dump.start()

    def tick(self, live: Collection[int]) -> None:
        """`live`: pids of ranks that are not reaped."""
        if self._dump is not None:
            self._dump.tick(live)

    @property
    def stacks(self) -> Optional[Stacks]:
        return self._dump.result if self._dump is not None else None

    @property
    def dump_problem(self) -> str:
        return self._dump.problem if self._dump is not None else ""

    def phase_times(self) -> PhaseTime:
        """The ranks' phases, with assigned, stopped and started as this agent saw them."""
        mine = self.phases
        return dataclasses.replace(
            self.heartbeats.phases(), assigned=mine.assigned, stopped=mine.stopped, started=mine.started
        )

    def last_word(self) -> Optional[Reached]:
        """How far its ranks came, now that they have ended: they may have gone on after the last look at them."""
        self.heartbeats.poll()
        return self.heartbeats.reached()

    def remove(self) -> None:
        """Its folder goes when a newer attempt has begun; logs stay."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _recorded(path: str) -> Optional[str]:
    """The traceback in an error file of torch.distributed.elastic's `@record`."""
    try:
        with open(path, encoding="utf-8") as file:
            message = json.loads(file.read(1024 * 1024)).get("message")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(message, dict):
        extra = message.get("extraInfo")
        text = extra.get("py_callstack") if isinstance(extra, dict) else None
        return text if isinstance(text, str) else str(message.get("message", "")) or None
    return message if isinstance(message, str) else None


def held_in_memory(folder: Optional[str]) -> List[MemoryShards]:
    """Checkpoint shards in this pod's memory by their names alone; whether they are intact, ranks find out."""
    try:
        names = os.listdir(folder) if folder else []
    except OSError:
        return []
    return by_set(shard for shard in map(parse_shard, names) if shard is not None)

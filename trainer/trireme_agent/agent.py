"""The agent's loop: signals, ended processes and assignments in; decisions of the machine carried out; reports out."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import signal
import socket
import time
from typing import Deque, Dict, List, Optional, Sequence

from trireme_api.protocol import AgentState, Assignment, Cause, Env, Failure, Reached, Report

from trireme_agent import processes, termination
from trireme_agent.attempt import Attempt, held_in_memory
from trireme_agent.energy import Accountant
from trireme_agent.link import Link
from trireme_agent.logs import Stream
from trireme_agent.machine import AskToStop, Command, Dump, Ended, Kill, Leave, Machine, Start
from trireme_agent.metrics import MetricsServer, relayed, render
from trireme_agent.settings import Settings
from trireme_agent.supervisor import Supervisor
from trireme_agent.warm import WarmPool

TICK = 0.25
QUICK_TICK = 0.02
"""While something is about to be killed."""
FLUSH_SECONDS = 30.0
FLUSH_WHEN_LEAVING = 10.0
FORWARDED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Agent:
    def __init__(self, settings: Settings, stream: Stream) -> None:
        self._settings = settings
        self._stream = stream
        self._machine = Machine(settings.patience)
        self._supervisor = Supervisor()
        self._warm = WarmPool(settings, self._supervisor)
        self._attempt: Optional[Attempt] = None
        self._assignments: Deque[Assignment] = collections.deque()
        self._energy = Accountant(settings.declared, settings.environment, rapl_root=settings.powercap)
        self._link = Link(settings, self._deliver, stream.say)
        self._wake_read, self._wake_write = socket.socketpair()
        self._starts = 0
        self._stopped_at: Optional[float] = None
        self._before: Optional[Reached] = None
        self._terminated = False
        self._report: Optional[Report] = None
        self._published: object = None
        self._stacks_told: object = None

    def run(self) -> int:
        """Until the ranks have ended for good; returns the exit code. Leaves no process behind."""
        processes.adopt_orphans()
        self._listen()
        metrics = self._serve_metrics()
        self._energy.start()
        self._publish()
        self._link.start()
        try:
            code = self._loop()
        finally:
            self._supervisor.close()
            self._energy.close()
            self._link.close()
            if metrics is not None:
                metrics.close()
        self._last_words(code)
        return code

    def _loop(self) -> int:
        while True:
            self._wait()
            now = time.monotonic()
            commands = self._signals(now)
            commands += self._machine.ended(self._ended(), now)
            while self._assignments:
                commands += self._machine.assigned(self._assignments.popleft(), now)
            commands += self._machine.tick(now, self._link.unheard())
            self._carry_out(commands, now)
            if self._attempt is not None:
                self._attempt.tick(self._supervisor.live_pids)
            self._publish()
            self._keep_warm()
            if self._machine.exit_code is not None and self._delivered():
                return self._machine.exit_code

    # --- in ---------------------------------------------------------------------------------------------------------

    def _deliver(self, assignment: Assignment) -> None:
        """Called by the link's threads."""
        self._assignments.append(assignment)
        with contextlib.suppress(OSError):  # full: the loop is awake already
            self._wake_write.send(b"\0")

    def _listen(self) -> None:
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, *FORWARDED):
            # PID 1 gets only signals it has a handler for; the number arrives through the wake-up socket.
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)

    def _wait(self) -> None:
        busy = self._machine.stopping is not None or self._assignments
        select.select([self._wake_read], [], [], QUICK_TICK if busy else TICK)

    def _signals(self, now: float) -> List[Command]:
        try:
            numbers = self._wake_read.recv(4096)
        except BlockingIOError:
            return []
        commands: List[Command] = []
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                name = signal.Signals(number).name
                if self._terminated:
                    self._stream.say(f"{name} again: killing the ranks")
                    commands += self._machine.terminate_now()
                else:
                    self._terminated = True
                    self._stream.say(f"{name}: saving and stopping")
                    commands += self._machine.save_and_stop(now)
            elif number in FORWARDED:
                self._supervisor.signal(number)
        return commands

    def _ended(self) -> List[Ended]:
        exits = self._supervisor.poll()
        if exits and not self._supervisor.live:
            left = self._supervisor.sweep()
            if left:
                self._stream.say(f"killed {left} processes that ranks left behind")
        if not exits or self._attempt is None:
            return []
        ended = [self._attempt.ended(found, pod_stopping=self._terminated) for found in exits]
        if not self._supervisor.live:
            self._stopped_at = time.time()
        for end in ended:
            if end.failure is not None and self._machine.own_doing:
                self._stream.say(end.failure.message)
        return ended

    # --- out --------------------------------------------------------------------------------------------------------

    def _carry_out(self, commands: Sequence[Command], now: float) -> None:
        # A failure is told before its consequences are dealt with.
        self._publish()
        for command in commands:
            if isinstance(command, Start):
                self._start(command.assignment, now)
            elif isinstance(command, Kill):
                self._supervisor.kill(0.0 if command.fast else self._settings.kill_grace)
            elif isinstance(command, AskToStop) and self._attempt is not None:
                self._stream.say("asking the ranks to save and stop")
                self._attempt.ask_to_stop()
                self._supervisor.signal(signal.SIGTERM)
            elif isinstance(command, Dump) and self._attempt is not None:
                self._stream.say("hang: saving the stacks of all ranks")
                live = set(self._supervisor.live)
                self._attempt.dump_stacks({rank: pid for rank, pid in self._supervisor.pids.items() if rank in live})
            elif isinstance(command, Leave):
                self._stream.say(f"ranks have ended for good; exit {command.code}")

    def _start(self, assignment: Assignment, now: float) -> None:
        attempt = self._current_attempt(assignment)
        ranks = list(range(assignment.procs_per_node))
        first = assignment.node_rank * assignment.procs_per_node
        self._stream.say(
            f"attempt {assignment.attempt}: starting ranks {first} to {first + ranks[-1]} of "
            f"{assignment.world_size * assignment.procs_per_node}, master {assignment.master_address}:"
            f"{assignment.master_port}"
        )
        self._starts += 1
        self._machine.started(ranks)
        try:
            attempt.start(self._supervisor, self._stream, self._warm)
        except OSError as error:
            message = f"ranks cannot be started: {error}"
            failure = Failure(Cause.INFRASTRUCTURE, message, rank=first, exit=1, at=time.time())
            self._stream.say(failure.message)
            self._supervisor.kill()
            self._machine.ended([Ended(rank, 1, failure) for rank in ranks], now)

    def _current_attempt(self, assignment: Assignment) -> Attempt:
        if self._attempt is None or self._attempt.assignment.attempt != assignment.attempt:
            previous, self._attempt = self._attempt, Attempt(self._settings, assignment)
            if previous is not None:
                self._attempt.phases.stopped = self._stopped_at
                self._before = previous.last_word() or self._before
                previous.remove()
        self._attempt.assignment = assignment
        return self._attempt

    def _keep_warm(self) -> None:
        if self._attempt is None or self._machine.stopping:
            return
        # A spare has nothing else to do; beside ranks that still start, a warm process would only slow them down.
        if not self._attempt.assignment.spare and self._attempt.phase_times().first_step is None:
            return
        was = self._warm.enabled
        self._warm.refill(self._attempt.assignment.procs_per_node)
        if was and not self._warm.enabled:
            self._stream.say(f"warm start does not work here and is off: {self._warm.problem}")

    def _publish(self) -> None:
        held = self._machine.held
        if held is not None:
            self._current_attempt(held)
        if self._attempt is not None:
            self._attempt.heartbeats.poll()
        self._report = report = self._make_report()
        news = (
            report.attempt, report.state, report.failure, report.checkpoint, report.phases, self._machine.exit_code,
            [(rank.pid, rank.exit) for rank in report.ranks], report.stacks,
            self._attempt.heartbeats.unease() if self._attempt is not None and self._machine.live else 0,
        )
        urgent, self._published = news != self._published, news
        self._link.publish(report, urgent=urgent, regular=held is not None and held.node_rank == 0)
        if report.stacks is not None and report.stacks is not self._stacks_told and self._attempt is not None:
            self._stacks_told = report.stacks
            self._stream.say(self._attempt.dump_problem or f"stacks saved: {report.stacks.path}")
        if urgent and report.failure is not None:
            self._last_words(self._machine.exit_code)

    def _make_report(self) -> Report:
        machine, attempt = self._machine, self._attempt
        report = Report(
            pod_uid=self._settings.pod_uid, attempt=machine.attempt, state=machine.state,
            energy=self._energy.readings(), hardware=self._energy.hardware(), failure=machine.root, before=self._before,
        )
        if attempt is not None:
            pids: Dict[int, int] = self._supervisor.pids if attempt.phases.started else {}
            report.ranks = attempt.rank_reports(pids)
            if machine.state == AgentState.WAITING:
                attempt.memory = held_in_memory(self._settings.environment.get(Env.MEMORY_DIR))
            report.memory = attempt.memory
            report.progress = attempt.heartbeats.progress()
            report.spent = attempt.heartbeats.spent()
            report.checkpoint = attempt.heartbeats.checkpoint()
            report.phases = attempt.phase_times()
            report.stacks = attempt.stacks
        return report

    def _delivered(self) -> bool:
        """Sends the last report; False when its answer brought a newer attempt, so that there is no leaving yet."""
        machine = self._machine
        # With nobody to ask for so long already, a decision to leave is not held up further.
        out_of_patience = machine.root is not None and not machine.leaving
        seconds = 1.0 if out_of_patience else FLUSH_WHEN_LEAVING if machine.leaving else FLUSH_SECONDS
        if not self._link.flush(seconds):
            self._stream.say("the last report could not be delivered")
        now = time.monotonic()
        while self._assignments:
            self._carry_out(machine.assigned(self._assignments.popleft(), now), now)
        return machine.exit_code is not None

    def _last_words(self, code: Optional[int]) -> None:
        report = self._report
        if report is None:
            return
        termination.write(
            self._settings.termination_log,
            termination.render(
                attempt=report.attempt, state=report.state, exit_code=code, failure=report.failure,
                progress=report.progress, checkpoint=report.checkpoint,
            ),
        )

    def _metrics(self) -> str:
        text = render(self._report, self._link.unheard(), self._starts)
        port = self._settings.environment.get(Env.METRICS_PORT, "")
        return text + relayed(int(port)) if port.isdigit() else text

    def _serve_metrics(self) -> Optional[MetricsServer]:
        if self._settings.metrics_port is None:
            return None
        try:
            server = MetricsServer(self._settings.metrics_port, self._metrics)
        except OSError as error:
            self._stream.say(f"no metrics: port {self._settings.metrics_port}: {error.strerror}")
            return None
        if self._settings.metrics_port == 0:
            self._stream.say(f"metrics at port {server.port}")
        return server


def folder_writable(settings: Settings) -> Optional[str]:
    """One line when the agent cannot keep its files, else None."""
    try:
        os.makedirs(settings.work_dir, exist_ok=True)
    except OSError as error:
        return f"TRIREME_HEARTBEAT_DIR={settings.work_dir!r}: {error.strerror}; mount an emptyDir there"
    if not os.access(settings.work_dir, os.W_OK):
        return f"TRIREME_HEARTBEAT_DIR={settings.work_dir!r} is not writable; mount an emptyDir there"
    return None

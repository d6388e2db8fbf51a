"""`trireme run`: the same recipe and the same agent as in a cluster, on this machine without one."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from trireme_agent import processes
from trireme_agent.__main__ import STOP_WITH_PARENT
from trireme_agent.nvml import gpu_devices
from trireme_api.protocol import Env, ExitCode

from trireme_cli import sessions
from trireme_cli.finite import FiniteRange
from trireme_cli.local_coordinator import LocalCoordinator
from trireme_cli.local_display import Display, show_summary
from trireme_cli.local_plan import Options, Plan, lacking, next_attempt, note_attempt, plan_command, plan_recipe

INTERRUPTED = 130
LOOK_SECONDS = 1.0
"""Between two looks for the next mega-batch."""
MEANING: dict[int, str] = {
    ExitCode.DONE: "done",
    ExitCode.BAD_RECIPE: "the recipe is wrong",
    ExitCode.BAD_DATA: "the data is wrong",
    ExitCode.NON_FINITE: "the loss did not stay finite",
    ExitCode.HANG: "hung",
    ExitCode.CHECKPOINT_IO: "checkpoints could not be written or read",
    ExitCode.SAVED_AND_STOPPED: "saved and stopped; the same command goes on from there",
}


class RunCommand(click.Command):
    """Takes what follows `--` as it is: that is the user's own command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own: list[str] = []
        if "--" in args:
            at = args.index("--")
            args, own = args[:at], args[at + 1 :]
            if not own:
                raise click.UsageError("no command after `--`", ctx)
        ctx.obj = own
        return super().parse_args(ctx, args)


class Claim(click.ParamType[tuple[str, Path]]):
    name = "CLAIM=DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        claim, equals, folder = str(value).partition("=")
        if not (claim and equals and folder) or "/" in claim or claim.startswith("."):
            self.fail(f"{value!r} is not CLAIM=DIR, e.g. corpus=/data/corpus", param, ctx)
        if not Path(folder).is_dir():
            self.fail(f"{folder!r} is not a directory", param, ctx)
        return claim, Path(folder)


@click.command(cls=RunCommand)
@click.argument("recipe", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--nproc", type=click.IntRange(1, 256), help="Ranks to start. Left out: one per GPU, or 1.")
@click.option("--checkpoint", metavar="DIR", help="Where checkpoints go (a path or URL). Left out: below --dir.")
@click.option("--every", type=click.IntRange(1), metavar="N", help="A checkpoint every N steps.")
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Checkpoints kept.")
@click.option("--max-restarts", type=click.IntRange(0), default=3, show_default=True, help="Restarts after failures.")
@click.option("--data-root", type=click.Path(path_type=Path), metavar="DIR", help="Relative data paths start here.")
@click.option("--pvc", "claims", type=Claim(), multiple=True, help="Where pvc://CLAIM/… is here. Repeatable.")
@click.option("--dir", "directory", type=click.Path(path_type=Path), help="Logs and state. Left out: trireme-run/NAME.")
@click.option("--grace", type=FiniteRange(1), default=120.0, show_default=True, help="Seconds ranks get to save.")
@click.option("--warm", is_flag=True, help="Keep a second process per rank imported, for faster restarts.")
@click.option("--quiet", "-q", is_flag=True, help="Do not show the ranks' own output; it is in the logs.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON; all else goes to stderr.")
@click.pass_context
def run(
    ctx: click.Context, /, recipe: Path | None, max_restarts: int, grace: float, quiet: bool, as_json: bool,
    claims: tuple[tuple[str, Path], ...], nproc: int | None, **given: Any,
) -> int:  # fmt: skip
    """Train RECIPE (a recipe or a TrainingJob in YAML) on this machine, or run your own script under the same care:

    \b
      trireme run recipe.yaml --nproc 2
      trireme run --nproc 2 -- python my_script.py

    Ranks that fail are restarted from the newest checkpoint. Ctrl-C saves and stops; a second Ctrl-C stops at once.
    Exit code: 0 done, 75 saved and stopped, 130 stopped without saving, otherwise that of the rank that failed.
    """
    own: list[str] = ctx.obj
    if bool(own) == (recipe is not None):
        raise click.UsageError("give either a recipe or your own command after `--`", ctx)
    options = Options(nproc=nproc or _visible_gpus() or 1, claims=dict(claims), **given)
    plan = plan_recipe(recipe, options, os.environ) if recipe is not None else plan_command(own, options, os.environ)
    console = Console(stderr=as_json, highlight=False)
    with plan.scratch:
        result = LocalRun(plan, options, console, max_restarts, grace, quiet).run()
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        show_summary(console, result)
    return int(result["exit"])


def _visible_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    return len(gpu_devices())


class LocalRun:
    def __init__(
        self, plan: Plan, options: Options, console: Console, max_restarts: int, grace: float, quiet: bool
    ) -> None:
        self._plan = plan
        self._owner, first = next_attempt(plan.directory)
        self._coordinator = LocalCoordinator(
            procs=options.nproc, first_attempt=first, max_restarts=max_restarts, grace_seconds=grace,
            on_event=self._event,
        )  # fmt: skip
        self._first = self._noted = first
        self._display = Display(console, self._coordinator.view, quiet=quiet)
        self._waits_for = ""
        self._look_at = 0.0
        self._interrupts = 0
        self._kill_at: float | None = None

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        sessions.begin(self._plan.directory, self._first, self._plan.told)
        before = {number: signal.signal(number, self._interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self._display:
                code = self._supervise(self._start())
        finally:
            self._coordinator.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        result = self._result(code, time.monotonic() - began)
        sessions.end(self._plan.directory, self._first, result)
        return result

    def _start(self) -> subprocess.Popen[bytes]:
        scratch = Path(self._plan.scratch.name)
        token = scratch / "token"
        token.touch(mode=0o600)
        token.write_text(self._coordinator.token)
        environment = {
            **self._plan.environment,
            Env.COORDINATOR: self._coordinator.url,
            Env.TOKEN_FILE: str(token),
            Env.JOB_UID: self._owner,
            STOP_WITH_PARENT: "1",
        }
        # A session of its own: Ctrl-C is ours to turn into "save and stop".
        return subprocess.Popen(
            [sys.executable, "-m", "trireme_agent", "--", *self._plan.command], env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def _supervise(self, agent: subprocess.Popen[bytes]) -> int:
        lines: queue.Queue[str] = queue.Queue(1000)
        reader = threading.Thread(target=_read, args=(agent, lines), daemon=True)
        reader.start()
        try:
            while agent.poll() is None or reader.is_alive() or not lines.empty():
                self._show(lines)
                self._display.tick()
                self._next_session()
                if self._coordinator.attempt != self._noted:
                    self._noted = self._coordinator.attempt
                    note_attempt(self._plan.directory, self._owner, self._noted)
                if self._kill_at is not None and time.monotonic() > self._kill_at:
                    agent.kill()
        finally:
            if agent.poll() is None:
                agent.terminate()
                agent.wait()
            self._clear_away()
        return agent.returncode

    def _next_session(self) -> None:
        """Of `anytime`: waits for the mega-batches of the next session, then starts it."""
        recipe = self._plan.recipe
        if recipe is None or recipe.stream is None or not self._coordinator.saved or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        checkpoint = self._coordinator.view.checkpoint
        step = checkpoint.step if checkpoint else 0
        if not recipe.stream.begins(step):
            return
        where = lacking(self._plan, step)
        if not where:
            self._coordinator.next_session()
        if where != self._waits_for:
            self._waits_for = where
            self._event(f"step {step}: waits for {where}" if where else f"step {step}: the next mega-batch is there")

    def _show(self, lines: queue.Queue[str]) -> None:
        try:
            line = lines.get(timeout=0.1)
            while True:
                self._display.rank_line(line)
                line = lines.get_nowait()
        except queue.Empty:
            pass

    def _clear_away(self) -> None:
        """Ranks that outlived their agent, which happens only when the agent itself was killed."""
        for pid in self._coordinator.view.pids:
            stat = processes.read_stat(pid)
            if stat is not None and stat.session == pid:
                processes.signal_group(pid, signal.SIGKILL)

    def _interrupted(self, _number: int, _frame: object) -> None:
        self._interrupts += 1
        # The coordinator's lock may be held by the very thread this handler interrupts.
        first = self._interrupts == 1
        threading.Thread(
            target=self._coordinator.request_stop if first else self._coordinator.request_kill, daemon=True
        ).start()
        self._display.note = "saving and stopping; Ctrl-C again stops at once" if first else "stopping"
        if not first:
            self._kill_at = time.monotonic() + 5.0

    def _event(self, text: str) -> None:
        self._display.event(text)

    def _result(self, code: int, seconds: float) -> dict[str, Any]:
        view = self._coordinator.view
        report = view.report
        if code < 0:
            message, code = f"the agent was killed by signal {-code}", 128 - code
        elif self._interrupts and code not in (0, ExitCode.SAVED_AND_STOPPED):
            message, code = "stopped without saving", INTERRUPTED
        else:
            message = MEANING.get(code, f"failed with exit code {code}")
        if view.verdict is not None and not view.verdict.restart:
            message += f" ({view.verdict.reason})"
        return {
            "name": self._plan.name,
            "exit": code,
            "message": message,
            "seconds": round(seconds, 3),
            "attempt": self._coordinator.attempt,
            "restarts": view.restarts,
            "progress": report.progress.to_json() if report and report.progress else None,
            "phases": report.phases.to_json() if report and report.phases else None,
            "checkpoint": view.checkpoint.to_json() if view.checkpoint else None,
            "failures": [
                {"attempt": f.attempt, "step": f.step, **f.failure.to_json()} for f in view.failures
            ],
            "energy": {name: {"joules": joules, "source": source} for name, (joules, source) in view.energy.items()},
            "logs": str(self._plan.directory / "logs"),
        }  # fmt: skip


def _read(agent: subprocess.Popen[bytes], lines: queue.Queue[str]) -> None:
    assert agent.stdout is not None
    for line in agent.stdout:
        lines.put(line.decode("utf-8", "replace").rstrip("\n"))

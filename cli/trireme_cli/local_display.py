"""What `trireme run` shows: the ranks' lines, one live line of progress, and a summary at the end."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from trireme_api.protocol import AgentState, Progress

from trireme_cli.local_coordinator import View
from trireme_cli.sessions import why

PLAIN_SECONDS = 10.0
"""Without a terminal, a line of progress at most this often."""


class Display:
    """Lines go through here from several threads; rich's console serialises them."""

    def __init__(self, console: Console, view: View, *, quiet: bool) -> None:
        self._console = console
        self._view = view
        self._quiet = quiet
        self._began = time.monotonic()
        self._shown_at = self._began
        self._shown_step = 0
        self._live: Live | None = None
        self.note = ""

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, refresh_per_second=4, transient=True, get_renderable=self._line
            )  # fmt: skip
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def rank_line(self, line: str) -> None:
        if not self._quiet or line.startswith("[agent]"):
            self._console.print(Text(line), soft_wrap=True)

    def event(self, text: str) -> None:
        self._console.print(Text(f"trireme: {text}", style="bold"), soft_wrap=True)

    def tick(self) -> None:
        """Without a terminal: now and then a line."""
        report = self._view.report
        if self._live is not None or report is None or report.progress is None:
            return
        now = time.monotonic()
        if report.progress.step != self._shown_step and now - self._shown_at >= PLAIN_SECONDS:
            self._shown_at, self._shown_step = now, report.progress.step
            self._console.print(Text(f"trireme: {describe(report.progress)}"), soft_wrap=True)

    def _line(self) -> Text:
        report = self._view.report
        parts = []
        if report is None:
            parts.append("starting the agent")
        elif report.progress is not None:
            parts.append(describe(report.progress))
        elif report.state is AgentState.RUNNING:
            phases = sorted({rank.phase for rank in report.ranks if rank.phase})
            parts.append(f"ranks are up ({', '.join(phases)})" if phases else "ranks are up")
        else:
            parts.append(f"ranks: {report.state.value}")
        if self._view.restarts:
            parts.append(f"restarts {self._view.restarts}")
        if self.note:
            parts.append(self.note)
        seconds = time.monotonic() - self._began
        return Text("  ".join([f"▸ {duration(seconds)}", *parts]), style="bold cyan", overflow="ellipsis", no_wrap=True)


def describe(progress: Progress) -> str:
    """`step 120/1000  loss 5.3021  12,345 tok/s …`; what is not known is left out."""
    total = f"/{progress.total_steps}" if progress.total_steps else ""
    parts = [f"step {progress.step}{total}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
        if progress.total_steps and progress.tokens and progress.step and progress.tokens_per_second > 0:
            left = (progress.total_steps - progress.step) * progress.tokens / progress.step
            parts.append(f"{duration(left / progress.tokens_per_second)} left")
    if progress.tflops is not None:
        parts.append(f"{progress.tflops:.3g} TFLOPS")
    if progress.mfu is not None:
        parts.append(f"MFU {progress.mfu:.1%}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_summary(console: Console, result: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows(result):
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)


def rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    found = [("result", str(result["message"])), ("time", duration(result["seconds"]))]
    progress = result.get("progress")
    if progress:
        found.append(("progress", describe(Progress.from_json(progress))))
    for failure in result["failures"]:
        found.append(("failure", f"attempt {failure['attempt']}: {why(failure)}"))
    found.append(("restarts", str(result["restarts"])))
    if result.get("checkpoint"):
        found.append(("checkpoint", f"step {result['checkpoint']['step']} in {result['checkpoint']['path']}"))
    for name, reading in sorted(result["energy"].items()):
        joules = reading.get("joules")
        amount = f"{joules:,.0f} J ({joules / 3600:.2g} Wh)" if joules is not None else "not measured"
        found.append((f"energy {name}", f"{amount}, source {reading['source']}"))
    found.append(("logs", result["logs"]))
    return found

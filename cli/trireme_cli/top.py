"""`trireme top`: all jobs in one table that follows them."""

from __future__ import annotations

import json
import time
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from trireme_operator.decide.clock import duration

from trireme_cli.explanation import JobView
from trireme_cli.finite import FiniteRange
from trireme_cli.kube import Connect, Kube, KubeProblem, connected

LEAST_SECONDS = 1.0
"""Between two requests: a table on a wall must not cost the API server more than a person would."""
_ORDER = ("Recovering", "Failed", "Invalid", "Running", "Starting", "Suspending", "Pending", "Suspended", "Succeeded")
_STYLE = {
    "Recovering": "bold yellow", "Failed": "bold red", "Invalid": "red", "Running": "green", "Starting": "cyan",
    "Pending": "yellow", "Succeeded": "dim",
}  # fmt: skip


@click.command("top")
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="Jobs of all namespaces.")
@click.option("--interval", type=FiniteRange(LEAST_SECONDS), default=2.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Print the table once. So it is where the output is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print the jobs once, as JSON.")
@connected
def command(everywhere: bool, interval: float, once: bool, as_json: bool, kube: Connect) -> None:
    """Show what all jobs are doing, those in trouble first. Ctrl-C ends it."""
    cluster = kube()
    jobs = _jobs(cluster, everywhere)
    console = Console(highlight=False)
    if as_json:
        click.echo(json.dumps([_plain(job) for job in jobs], indent=2))
    elif once or not console.is_terminal:
        # On a pipe a line is as long as it needs to be.
        wide = console if console.is_terminal else Console(highlight=False, width=1000)
        wide.print(table(jobs, everywhere, time.time()) if jobs else _none(cluster, everywhere))
    else:
        _follow(cluster, everywhere, interval, console, jobs)


def _follow(cluster: Kube, everywhere: bool, interval: float, console: Console, jobs: list[JobView]) -> None:
    trouble = ""
    with Live(console=console, auto_refresh=False, screen=True) as live:
        try:
            while True:
                shown = table(jobs, everywhere, time.time())
                shown.caption = trouble or f"{len(jobs)} jobs; every {interval:g} s; Ctrl-C ends"
                live.update(shown, refresh=True)
                time.sleep(interval)
                try:
                    jobs, trouble = _jobs(cluster, everywhere), ""
                except KubeProblem as error:  # a cluster that is away for a moment must not end the view
                    trouble = f"as of the last answer; {error.format_message()}"
        except KeyboardInterrupt:
            return


def _jobs(cluster: Kube, everywhere: bool) -> list[JobView]:
    return sorted((JobView.of(obj) for obj in cluster.jobs(everywhere)), key=urgency)


def urgency(job: JobView) -> tuple[int, str, str]:
    """Those first that somebody should look at."""
    place = _ORDER.index(job.phase) if job.phase in _ORDER else len(_ORDER)
    return place, job.namespace, job.name


def _none(cluster: Kube, everywhere: bool) -> str:
    return "no TrainingJobs" + ("" if everywhere else f" in namespace {cluster.namespace!r}; -A shows all namespaces")


HEAD = (
    "NAME", "PHASE", "NODES", "STEP", "LOSS", "TOK/S", "MFU", "RESTARTS", "GOODPUT", "CO2E", "ETA", "AGE", "WHY",
)  # fmt: skip


def row(job: JobView, everywhere: bool, now: float) -> tuple[str, ...]:
    """Cells as in `HEAD`; empty where nothing is known."""
    status, progress = job.status, job.status.progress
    step = loss = speed = mfu = left = ""
    if progress is not None:
        total = f"/{progress.total_steps}" if progress.total_steps else ""
        step = f"{progress.step}{total}"
        loss = f"{progress.loss:.4g}" if progress.loss is not None else ""
        speed = f"{progress.tokens_per_second:,.0f}" if progress.tokens_per_second is not None else ""
        mfu = f"{progress.mfu:.1%}" if progress.mfu is not None else ""
        left = progress.remaining or ""
    return (
        f"{job.namespace}/{job.name}" if everywhere else job.name,
        job.phase,
        status.node_summary,
        step,
        loss,
        speed,
        mfu,
        str(status.restart_count),
        (status.goodput.summary or "") if status.goodput is not None else "",
        status.carbon.summary or "",
        left,
        duration(now - job.created) if job.created is not None else "",
        status.explanation,
    )


def table(jobs: list[JobView], everywhere: bool, now: float) -> Table:
    shown = Table(box=None, pad_edge=False, expand=False)
    left = {"NAME", "PHASE", "WHY"}
    for name in HEAD:
        shown.add_column(
            name, justify="left" if name in left else "right", no_wrap=True,
            overflow="ellipsis" if name == "WHY" else "fold", min_width=None if name == "WHY" else len(name),
        )  # fmt: skip
    for job in jobs:
        cells = row(job, everywhere, now)
        styles = (_STYLE.get(job.phase, "") if name == "PHASE" else "" for name in HEAD)
        shown.add_row(*(Text(cell, style=style) for cell, style in zip(cells, styles, strict=True)))
    return shown


def _plain(job: JobView) -> dict[str, Any]:
    status = job.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    keep = ("phase", "reason", "explanation", "attempt", "nodeSummary", "progress", "restartCount", "updatedAt")
    found: dict[str, Any] = {"name": job.name, "namespace": job.namespace}
    found |= {name: status[name] for name in keep if name in status}
    goodput, carbon = job.status.goodput, job.status.carbon
    return found | {"goodput": goodput.ratio if goodput is not None else None, "carbonGrams": carbon.grams}

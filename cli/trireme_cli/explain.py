"""`trireme explain NAME`: what a job is doing, why, what failed, what is left, what happens next."""

from __future__ import annotations

import json
import time

import click

from trireme_cli.explanation import JobView, Section, explain, to_json
from trireme_cli.kube import Connect, connected


@click.command("explain")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@connected
def command(name: str, as_json: bool, kube: Connect) -> None:
    """Say of the TrainingJob NAME: what it does and why, what failed last, what is left, what happens next."""
    job = JobView.of(kube().job(name))
    now = time.time()
    if as_json:
        click.echo(json.dumps(to_json(job, now), indent=2))
        return
    click.echo(f"TrainingJob {job.namespace}/{job.name}")
    for section in explain(job, now):
        click.echo(text(section))


def text(section: Section) -> str:
    """The section as lines, values in one column."""
    width = max(len(name) for name, _ in section.rows)
    title = [f"\n{section.title}:"] if section.title else []
    return "\n".join([*title, *(f"  {name:<{width}}  {value}".rstrip() for name, value in section.rows)])

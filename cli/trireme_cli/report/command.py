"""`trireme report`: the logbook of a run as one page."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import click
from trireme_api import carbon
from trireme_api.schema import InvalidSpec

from trireme_cli import notes
from trireme_cli.finite import FiniteRange
from trireme_cli.kube import Connect, Kube, connected
from trireme_cli.refusals import refuse
from trireme_cli.report import sources
from trireme_cli.report.local import of_directory
from trireme_cli.report.page import page
from trireme_cli.report.story import Story, of_job


@click.command("report")
@click.argument("name", required=False)
@click.option("--local", type=click.Path(path_type=Path), metavar="DIR", help="Of a directory of `trireme run`.")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Left out: NAME-report.html.")
@click.option("--steps", metavar="DIR", help="Checkpoint directory or URL with the step log, if the pods cannot tell.")
@click.option("--zone", help="With --local: zone of the grid, e.g. SE, for carbon.")
@click.option("--grams-per-kwh", type=FiniteRange(0), help="With --local: overrides the zone's table.")
@click.option("--pue", type=FiniteRange(1), default=carbon.PUE, show_default=True, help="With --local.")
@click.option("--json", "as_json", is_flag=True, help="Print what the page would tell as JSON; write no page.")
@connected
def command(
    name: str | None, local: Path | None, output: Path | None, steps: str | None, zone: str | None,
    grams_per_kwh: float | None, pue: float, as_json: bool, kube: Connect,
) -> None:  # fmt: skip
    """Write the logbook of the TrainingJob NAME as one self-contained HTML page: attempts, failures, decisions and
    notes; loss with restarts, throughput, goodput, memory, energy, carbon, configuration, environment.

    \b
      trireme report opt-125m -o opt-125m.html
      trireme report --local trireme-run/recipe --zone SE
    """
    if (name is None) == (local is None):
        raise click.UsageError("give either the name of a TrainingJob or --local DIR")
    if local is not None:
        refuse(("steps",), "is of a TrainingJob; the step log of --local is found by itself")
        story = _local(local, zone, grams_per_kwh, pue)
    else:
        assert name is not None
        refuse(("zone", "grams_per_kwh", "pue"), "is of --local; of a TrainingJob, spec.carbonPolicy says it")
        story = _cluster(kube(), name, steps)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(story), indent=1))
        return
    path = output or Path(f"{story.name}-report.html")
    path.write_text(page(story), encoding="utf-8")
    click.echo(f"{path}: {path.stat().st_size / 1024:,.0f} KiB")
    if story.steps is None and story.steps_missing:
        click.echo(f"without loss and throughput: {story.steps_missing}", err=True)


def _cluster(kube: Kube, name: str, steps: str | None) -> Story:
    job = kube.job(name)
    pods = kube.pods(job)
    if steps is not None:
        log, missing = sources.read_uri(steps), ""
    else:
        found, missing = sources.of_cluster(kube, job, pods)
        log = found  # type: ignore[assignment]
    written = notes.read(job["metadata"].get("annotations") or {})
    return of_job(job, kube.events(job), pods, written, log, missing, time.time())


def _local(directory: Path, zone: str | None, grams: float | None, pue: float) -> Story:
    try:
        intensity = carbon.intensity(zone, grams)
    except carbon.UnknownZone as error:
        raise InvalidSpec("--zone", str(error)) from None
    try:
        return of_directory(directory, intensity, pue, time.time())
    except FileNotFoundError:
        raise click.UsageError(
            f"--local {directory}: no sessions of `trireme run` here (its --dir, by default trireme-run/NAME)"
        ) from None

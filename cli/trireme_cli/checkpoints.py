"""`trireme checkpoints`: what a checkpoint directory holds, and whether every byte of it is as it was written."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click
from trireme_api.quantity import size

from trireme_cli.refusals import CheckpointProblem

if TYPE_CHECKING:
    from trireme_trainer.checkpoint import Candidate, CheckpointStore


@click.group()
def checkpoints() -> None:
    """List and verify checkpoints. URI is a job's checkpoint.uri: a path, pvc://claim/dir or any fsspec URL.

    Nothing in a checkpoint is executed or unpickled, and nothing is changed. Exit code 74: something is not good.
    """


@checkpoints.command("list")
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def list_(uri: str, as_json: bool) -> None:
    """Committed checkpoints, newest first, and what else lies beside them. Reads manifests, not the data."""
    from trireme_trainer.checkpoint import CheckpointError

    try:
        store = _store(uri)
        found = [_row(store, candidate) for candidate in store.candidates()]
        others = {"unfinished": store.files.leftovers(), "setAside": store.files.bad()}
    except CheckpointError as error:
        raise CheckpointProblem(str(error)) from None
    if as_json:
        click.echo(json.dumps({"root": store.files.path(""), "checkpoints": found, **others}, indent=1))
        return
    if found:
        click.echo(f"{'STEP':>10}  {'ATTEMPT':>7}  {'RANKS':>5}  {'FILES':>5}  {'SIZE':>9}  {'WRITTEN':<19}  STATE")
    for row in found:
        click.echo(_line(row))
    for directory in others["unfinished"]:
        click.echo(f"{directory}: being written, or left by a save that was cut short; the next attempt removes it")
    for directory in others["setAside"]:
        click.echo(f"{directory}: found damaged and set aside; the reason is in its BAD.json")
    if not found:
        click.echo("no committed checkpoint")


@checkpoints.command("verify")
@click.argument("uri")
@click.option("--step", type=click.IntRange(min=0), help="Only the checkpoint of this step. Left out: all of them.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(uri: str, step: int | None, as_json: bool) -> None:
    """Read every file of committed checkpoints and compare size and sha256 with the manifest.

    A checkpoint that fails would be passed over by a load, which then takes the one before it.
    """
    from trireme_trainer.checkpoint import CheckpointError

    try:
        store = _store(uri)
        wanted = [c for c in store.candidates() if step is None or c.step == step]
        if not wanted:
            which = "no committed checkpoint" if step is None else f"no committed checkpoint of step {step}"
            raise CheckpointProblem(f"{store.files.path('')}: {which}; see: trireme checkpoints list {uri}")
        results = [_verified(store, candidate, quiet=as_json) for candidate in wanted]
    except CheckpointError as error:
        raise CheckpointProblem(str(error)) from None
    if as_json:
        click.echo(json.dumps({"root": store.files.path(""), "checkpoints": results}, indent=1))
    bad = [result for result in results if not result["good"]]
    if bad:
        raise CheckpointProblem(f"{len(bad)} of {len(results)} checkpoints not usable: {bad[0]['problems'][0]}")


def _store(uri: str) -> CheckpointStore:
    from trireme_trainer.checkpoint import CheckpointStore

    store = CheckpointStore(uri)
    if not store.exists():
        raise CheckpointProblem(f"{store.files.path('')}: no checkpoint directory here")
    return store


def _row(store: CheckpointStore, candidate: Candidate) -> dict[str, Any]:
    manifest, problem = store.inspect(candidate)
    row: dict[str, Any] = {"step": candidate.step, "path": candidate.path, "problem": str(problem) if problem else None}
    if manifest is not None:
        row |= {
            "attempt": manifest.attempt,
            "worldSize": manifest.world_size,
            "files": len(manifest.files),
            "bytes": manifest.size,
            "created": manifest.created,
            "versions": dict(manifest.versions),
        }
    return row


def _line(row: dict[str, Any]) -> str:
    if row["problem"]:
        return f"{row['step']:>10}  {row['problem']}"
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["created"]))
    return (
        f"{row['step']:>10}  {row['attempt']:>7}  {row['worldSize']:>5}  {row['files']:>5}  "
        f"{size(row['bytes']):>9}  {written:<19}  committed"
    )


def _verified(store: CheckpointStore, candidate: Candidate, *, quiet: bool) -> dict[str, Any]:
    start = time.perf_counter()
    manifest, _ = store.inspect(candidate)
    problems = [str(problem) for problem in store.verify(candidate)]
    seconds = time.perf_counter() - start
    total = manifest.size if manifest is not None else 0
    if not quiet and not problems:
        click.echo(f"{candidate.path}: good; {size(total)} in {seconds:.2f} s ({size(total / seconds)}/s)")
    if not quiet:
        for problem in problems:
            click.echo(problem)
    return {
        "step": candidate.step,
        "path": candidate.path,
        "good": not problems,
        "problems": problems,
        "bytes": total,
        "seconds": round(seconds, 4),
    }

"""`trireme validate`: every problem of a manifest or recipe, each in one line, before anything is spent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from trireme_api.job import KIND, InvalidSpecs
from trireme_api.protocol import ExitCode
from trireme_api.schema import InvalidSpec
from trireme_api.validation import check_job, check_recipe

from trireme_cli.documents import is_job, is_recipe, parse_recipe, read
from trireme_cli.local_data import lines, look


@dataclass(frozen=True)
class Verdict:
    """What was found in one document of one file."""

    file: str
    document: int
    """From 1, as they stand in the file."""
    kind: str
    name: str
    problems: tuple[InvalidSpec, ...]
    sources: tuple[dict[str, Any], ...] = ()
    """Of a recipe whose data are on this machine: language, share and epochs of each source."""


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--json", "as_json", is_flag=True, help="Print the verdict on each document as JSON.")
def validate(files: tuple[str, ...], as_json: bool) -> int:
    """Check TrainingJobs and recipes in YAML FILES (- is standard input) with the rules the operator uses.

    \b
      trireme validate job.yaml
      kubectl get tj opt-125m -o yaml | trireme validate -

    Each problem is one line, `FILE: FIELD: what is wrong and what would be right`. Other kinds in a file are passed
    over. Of a recipe whose data are on this machine, the share and epochs of each source are told. Exit code 64 when
    anything was found, or when no file holds a TrainingJob or a recipe.
    """
    verdicts = [verdict for file in files for verdict in judge(file)]
    if as_json:
        click.echo(json.dumps([_plain(verdict) for verdict in verdicts], indent=2, ensure_ascii=False))
    bad = 0
    for verdict in verdicts:
        bad += bool(verdict.problems)
        if as_json:
            continue
        for problem in verdict.problems:
            click.echo(f"{verdict.file}: {problem}", err=True)
        if not verdict.problems:
            click.echo(f"{verdict.file}: {verdict.kind} {verdict.name}".rstrip() + ": valid")
            for line in lines(list(verdict.sources)):
                click.echo(f"  {line}")
    if not verdicts and not as_json:
        click.echo(f"error: no TrainingJob and no recipe in {', '.join(files)}", err=True)
    return int(ExitCode.BAD_RECIPE) if bad or not verdicts else 0


def judge(file: str) -> Iterator[Verdict]:
    """The verdicts on all documents of a file that are ours. Raises OSError."""
    try:
        documents = read(file)
    except InvalidSpec as error:
        yield Verdict(file, 1, "", "", (error,))
        return
    for number, document in enumerate(documents, start=1):
        if is_job(document):
            metadata = document.get("metadata")
            name = str(metadata.get("name", "")) if isinstance(metadata, dict) else ""
            yield Verdict(file, number, KIND, name, check_job(document).problems)
        elif is_recipe(document):
            yield _of_recipe(document, Verdict(file, number, "recipe", Path(file).stem, ()))
        elif document is not None and not isinstance(document, dict):
            found = InvalidSpec("document", f"expected an object with fields, got {type(document).__name__}")
            yield Verdict(file, number, "", "", (found,))


def _of_recipe(document: dict[str, Any], verdict: Verdict) -> Verdict:
    try:
        recipe = parse_recipe(document)
    except InvalidSpecs as error:
        return replace(verdict, problems=tuple(error.found))
    found = tuple(check_recipe(recipe))
    if found:
        return replace(verdict, problems=found)
    try:
        return replace(verdict, sources=tuple(look(recipe)))
    except InvalidSpec as error:
        return replace(verdict, problems=(error,))


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {
        "file": verdict.file,
        "document": verdict.document,
        "kind": verdict.kind,
        "name": verdict.name,
        "valid": not verdict.problems,
        **({"sources": list(verdict.sources)} if verdict.sources else {}),
        "problems": [{"field": problem.field, "message": problem.message} for problem in verdict.problems],
    }

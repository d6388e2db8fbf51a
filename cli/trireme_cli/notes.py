"""Notes that people add to a job's logbook.

They are annotations of the TrainingJob, one each: whoever may edit the job may write them, no further right and no
object to clean up is needed, two people who write at once lose nothing, and they end with the job. Annotations are
bounded (256 KiB for all of an object's), so notes are, too. Of a local run they are lines of `notes.jsonl`.
"""

from __future__ import annotations

import getpass
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
from trireme_operator.decide.clock import seconds, stamp

from trireme_cli.kube import Connect, connected

PREFIX = "note.trireme.dev/"
MAX_CHARACTERS = 1000
MAX_NOTES = 100
LOCAL_NAME = "notes.jsonl"


@dataclass(frozen=True)
class Note:
    at: float
    """Unix seconds."""
    by: str
    text: str


def annotation(note: Note) -> tuple[str, str]:
    """Key and value. The key sorts by time and is unique though two write in the same moment."""
    when = stamp(note.at).replace("-", "").replace(":", "").replace("Z", "")
    value = json.dumps({"at": stamp(note.at), "by": note.by, "text": note.text}, ensure_ascii=False)
    return f"{PREFIX}{when}-{secrets.token_hex(2)}", value


def read(annotations: Mapping[str, str]) -> list[Note]:
    """Notes by time; what cannot be read as one is shown as it stands."""
    return sorted(
        (_note(value) for key, value in annotations.items() if key.startswith(PREFIX)), key=lambda note: note.at
    )


def read_local(directory: Path) -> list[Note]:
    try:
        lines = (directory / LOCAL_NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return sorted((_note(line) for line in lines if line.strip()), key=lambda note: note.at)


def _note(value: str) -> Note:
    try:
        data = json.loads(value)
        return Note(seconds(data["at"]) or 0.0, str(data["by"]), str(data["text"]))
    except (ValueError, KeyError, TypeError):
        return Note(0.0, "?", value)


@click.command("note")
@click.argument("name", required=False)
@click.argument("text", required=False)
@click.option("--by", metavar="WHO", default=None, help="Left out: your login name.")
@click.option("--local", type=click.Path(path_type=Path), metavar="DIR", help="Of a directory of `trireme run`.")
@connected
def command(name: str | None, text: str | None, by: str | None, local: Path | None, kube: Connect) -> None:
    """Add TEXT to the logbook of the TrainingJob NAME, where `trireme report` shows it among the decisions.

    \b
      trireme note opt-125m "learning rate halved after the spike at step 1200"
      trireme note --local trireme-run/recipe "started on battery"
    """
    if local is not None:
        if text is not None:
            raise click.UsageError("with --local give the text alone")
        name, text = None, name
    if not text or (local is None and not name):
        raise click.UsageError("give the job's name and the text of the note")
    if len(text) > MAX_CHARACTERS:
        raise click.UsageError(f"the note has {len(text)} characters, at most {MAX_CHARACTERS} are kept; shorten it")
    note = Note(time.time(), by or _login(), text)
    if local is not None:
        if not local.is_dir():
            raise click.UsageError(f"--local {local}: there is no such directory")
        line = json.dumps({"at": stamp(note.at), "by": note.by, "text": note.text}, ensure_ascii=False)
        with (local / LOCAL_NAME).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        click.echo(f"noted in {local}; trireme report --local {local} shows it")
        return
    assert name is not None
    cluster = kube()
    job = cluster.job(name)
    if len(read(job["metadata"].get("annotations") or {})) >= MAX_NOTES:
        raise click.UsageError(
            f"job {name!r} has all {MAX_NOTES} notes it may have; remove some: kubectl edit tj {name}"
        )
    key, value = annotation(note)
    cluster.annotate(name, {key: value})
    click.echo(f"noted in {cluster.namespace}/{name}; trireme report {name} shows it")


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"

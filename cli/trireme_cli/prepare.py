"""`trireme prepare`: a corpus of text becomes tokenised shards."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from trireme_cli.refusals import BadData

if TYPE_CHECKING:
    from trireme_trainer.data.manifest import Manifest

_PLAIN_PROGRESS_SECONDS = 10.0


@click.command()
@click.argument("inputs", nargs=-1, metavar="INPUT...")
@click.option("--output", "-o", metavar="DIR", help="Where the corpus goes: a local directory or pvc://claim/dir.")
@click.option("--tokenizer", metavar="FILE", help="A tokenizer.json or SentencePiece model. Left out: one is trained.")
@click.option(
    "--train-tokenizer",
    type=click.Choice(["byte-bpe", "sentencepiece"]),
    default="byte-bpe",
    show_default=True,
    help="What is trained where none is given.",
)
@click.option("--vocabulary", default=8192, show_default=True, help="The most tokens a trained tokenizer may have.")
@click.option("--tokenizer-bytes", default=1 << 30, show_default=True, help="Most text it is trained on.")
@click.option("--end-of-document", metavar="TOKEN", help="Ends each document. Left out: </s>, or what the file has.")
@click.option("--language", metavar="TAG", help="What the text is written in, e.g. sw: for mixtures and evaluation.")
@click.option("--valid-fraction", default=0.01, show_default=True, help="Share of the documents held out.")
@click.option("--shard-tokens", default=1 << 27, show_default=True, help="A shard is full at so many tokens.")
@click.option(
    "--document-separator",
    "separator",
    metavar="TEXT",
    help="Cut files into documents at lines that are just TEXT; blank-line: at blank ones. Left out: a file is one.",
)
@click.option("--text-field", default="text", show_default=True, help="Field of a .jsonl row that holds the text.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Of directories, only files like *.txt. Repeatable.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Of directories, not files like this. Repeatable.")
@click.option("--overwrite", is_flag=True, help="Remove what prepare made in DIR before, finished or not.")
@click.option("--verify", "verified", metavar="DIR", help="Check every byte of a prepared corpus instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def prepare(
    inputs: tuple[str, ...],
    output: str | None,
    separator: str | None,
    overwrite: bool,
    verified: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn text into tokenised, memory-mapped, checksummed shards that a recipe's data.sources can name.

    INPUT is a file or a directory (all files below it): UTF-8 text, .gz of it, or .jsonl with one document per row.
    Plain text only: HTML and other markup is not stripped, it would be learnt as it is.

    Interrupted, the same command goes on where it stopped; the result is the same, bit by bit.
    """
    from trireme_trainer.data.errors import DataError
    from trireme_trainer.storage import StorageError

    try:
        if verified is not None:
            if inputs or output:
                raise click.UsageError("--verify DIR takes no INPUT and no --output")
            _verify(verified, as_json)
            return
        if not inputs:
            raise click.UsageError("no input: name files or directories of text")
        if not output:
            raise click.UsageError("--output DIR is required")
        _prepare(list(inputs), output, overwrite, as_json, separator=separator, **options)
    except (DataError, StorageError) as error:
        raise BadData(str(error)) from None


def _prepare(inputs: list[str], output: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    from trireme_trainer.data.prepare import Options, prepare
    from trireme_trainer.data.workspace import discard

    if overwrite:
        discard(output)
    begin = time.monotonic()
    with _progress_bar() as (progress, notice):
        prepared = prepare(inputs, output, Options(**options), progress, notice)
    if as_json:
        result = prepared.manifest.model_dump(by_alias=True)
        result |= {"directory": prepared.directory, "fresh": prepared.fresh, "shardsKept": prepared.shards_kept}
        click.echo(json.dumps(result, indent=1))
        return
    if not prepared.fresh:
        click.echo(f"{prepared.directory}: already prepared from this input, nothing to do")
    elif prepared.shards_kept:
        click.echo(f"kept {prepared.shards_kept} shards finished by an earlier run")
    click.echo(_summary(prepared.directory, prepared.manifest, time.monotonic() - begin))


def _summary(directory: str, manifest: Manifest, seconds: float) -> str:
    lines = [
        f"corpus       {directory}",
        *([f"language     {manifest.language}"] if manifest.language else []),
        f"documents    {manifest.documents:,} ({manifest.valid.documents:,} held out)",
        f"tokens       {manifest.tokens:,} ({manifest.valid.tokens:,} held out)",
        f"             {manifest.bytes_per_token:.2f} bytes of text each",
        f"vocabulary   {manifest.vocabulary:,}",
        f"entropy      {manifest.unigram_entropy:.4f} nats per token (unigram; a model that learns must fall below it)",
        f"fingerprint  {manifest.fingerprint}",
        f"time         {seconds:.1f} s",
    ]
    if unknown := manifest.tokenizer.unknown_tokens:
        share = unknown / manifest.train.tokens
        lines.append(f"note         {unknown:,} tokens ({share:.2%}) are <unk>: text that the tokenizer cannot write")
    if manifest.input.skipped_empty_documents:
        lines.append(f"skipped      {manifest.input.skipped_empty_documents:,} empty documents")
    if not manifest.valid.documents and manifest.input.options["validFraction"]:
        lines.append(
            f"note         nothing is held out: only {manifest.documents} documents; cut them with --document-separator"
        )
    return "\n".join(lines)


def _verify(path: str, as_json: bool) -> None:
    from trireme_trainer.data.manifest import read_manifest
    from trireme_trainer.data.shards import check_files
    from trireme_trainer.storage import is_local, resolve_path

    if not is_local(path):
        raise BadData(f"--verify {path}: give a local directory or pvc://claim/dir")
    directory = resolve_path(path)
    manifest = read_manifest(directory)
    total = len(manifest.files())
    done = 0
    with _progress_bar() as (progress, _):

        def seen(_: str) -> None:
            nonlocal done
            done += 1
            progress("verifying", done, total)

        problems = check_files(directory, manifest, contents=True, seen=seen)
    if as_json:
        result = {"directory": directory, "fingerprint": manifest.fingerprint, "files": total, "problems": problems}
        click.echo(json.dumps(result, indent=1))
    elif not problems:
        click.echo(f"{directory}: {total} files, all as written; fingerprint {manifest.fingerprint}")
    if problems:
        if not as_json:
            for problem in problems:
                click.echo(problem)
        raise BadData(f"{directory}: {len(problems)} of {total} files are not as written; prepare it again")


@contextmanager
def _progress_bar() -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str], None]]]:
    """Progress and notices on stderr: a bar on a terminal, a line every ten seconds in a log."""
    if not sys.stderr.isatty():
        yield _plain_progress(), lambda text: click.echo(text, err=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield progress, lambda text: bar.console.print(text, markup=False, highlight=False)


def _plain_progress() -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _PLAIN_PROGRESS_SECONDS:
            last = time.monotonic()
            click.echo(f"{what}: {100 * done // max(total, 1)} %", err=True)

    return progress

"""Reading text: which files, and which documents in each. Plain UTF-8 text only; markup is not stripped."""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, cast

from trireme_trainer.data.errors import DataError

BLANK_LINE = "blank-line"
_CONVERT = "convert it to UTF-8 (iconv -t UTF-8) or leave it out with --exclude"


@dataclass(frozen=True)
class Reading:
    """How a file is cut into documents."""

    separator: str | None = None
    """None: one document per file. "blank-line": at blank lines. Anything else: at lines that are just this text."""
    text_field: str = "text"
    """The field of a .jsonl row that holds the document."""


def find_files(
    inputs: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = (), output: str | None = None
) -> list[str]:
    """Files named, and files under directories named, each once: inputs in the order given, a directory's files by
    the bytes of their names. `include` and `exclude` are patterns on the path below the directory or on its last part,
    and apply to directories only. Hidden files and `output` are left out. Raises DataError naming what is not there.
    """
    found: dict[str, str] = {}
    for given in inputs:
        if os.path.isdir(given):
            paths = list(_walk(given, include, exclude, os.path.realpath(output) if output else None))
            if not paths:
                raise DataError(f"{given}: no files to read in this directory")
        elif os.path.exists(given):
            paths = [given]
        else:
            raise DataError(f"{given}: no such file or directory")
        for path in paths:
            if not os.path.isfile(path):
                raise DataError(f"{path}: not a regular file, or a link to nothing; leave it out with --exclude")
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise DataError("no input: name files or directories of text")
    return list(found.values())


def _walk(top: str, include: Sequence[str], exclude: Sequence[str], output: str | None) -> Iterator[str]:
    below = []
    for directory, names, files in os.walk(top):
        names[:] = [
            n for n in names if not n.startswith(".") and os.path.realpath(os.path.join(directory, n)) != output
        ]
        below += [os.path.relpath(os.path.join(directory, n), top) for n in files if not n.startswith(".")]
    for name in sorted(below, key=os.fsencode):
        if (not include or _matches(name, include)) and not _matches(name, exclude):
            yield os.path.join(top, name)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(os.path.basename(name), p) for p in patterns)


def read_documents(path: str, reading: Reading) -> Iterator[str]:
    """The documents of one file, each without trailing white space ("" where nothing is left, for the caller to count).

    Gzip is undone for names in .gz; .jsonl (.ndjson) holds one JSON object per line. Raises DataError naming the file
    and the byte offset (in the unpacked file) for text that is not UTF-8, and for a file with no text at all.
    """
    try:
        with _open(path) as file:
            empty = True
            for text in _cut(file, path, reading):
                text = text.rstrip()
                empty = empty and not text
                yield text
            if empty:
                what = "white space only" if file.tell() else "empty file"
                raise DataError(f"{path}: {what}; remove it or leave it out with --exclude")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); replace it or leave it out with --exclude") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open(path: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb")


def _cut(file: IO[bytes], path: str, reading: Reading) -> Iterator[str]:
    plain_name = path.removesuffix(".gz")
    if plain_name.endswith((".jsonl", ".ndjson")):
        yield from _rows(file, path, reading.text_field)
    elif reading.separator is None:
        yield _decode(file.read(), 0, path)
    else:
        yield from _sections(file, path, reading.separator)


def _rows(file: IO[bytes], path: str, field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file, start=1):
        where = f"{path}: line {number} (byte {offset})"
        text = _decode(line, offset, path)
        offset += len(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise DataError(f"{where}: no text in field {field!r}; name the right one with --text-field")
        try:
            row[field].encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: field {field!r} holds half of a surrogate pair ({error.reason})") from None
        yield row[field]


def _sections(file: IO[bytes], path: str, separator: str) -> Iterator[str]:
    offset = 0
    lines: list[str] = []
    for line in file:
        text = _decode(line, offset, path)
        offset += len(line)
        bare = text.rstrip("\r\n")
        if (not bare.strip()) if separator == BLANK_LINE else bare == separator:
            if lines or separator != BLANK_LINE:
                yield "".join(lines)
            lines = []
        else:
            lines.append(text)
    if lines:
        yield "".join(lines)


def _decode(raw: bytes, offset: int, path: str) -> str:
    nul = raw.find(b"\0")
    if nul >= 0:
        raise DataError(f"{path}: byte 0x00 at offset {offset + nul}: binary or UTF-16, not UTF-8 text; {_CONVERT}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise DataError(f"{path}: byte 0x{raw[error.start]:02x} at offset {at} is not UTF-8 text; {_CONVERT}") from None
    return text.removeprefix("\ufeff") if offset == 0 else text

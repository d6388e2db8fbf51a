"""The output directory of a preparation: one process at a time, and what of it is ours to remove."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import MANIFEST, SENTENCE_PIECES, TOKENIZER
from trireme_trainer.storage import resolve_path

JOURNAL = ".prepare"
_MINE = (MANIFEST, TOKENIZER, SENTENCE_PIECES, JOURNAL)


def discard(output: str) -> None:
    """Removes what `prepare` made in a directory, finished or not, and nothing else. Raises DataError."""
    directory = resolve_path(output)
    if not os.path.isdir(directory):
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(directory, MANIFEST))
        for name in os.listdir(directory):
            stem = name.removesuffix(".partial")
            if stem in _MINE or (stem.startswith(("train-", "valid-")) and stem.endswith((".tokens", ".lengths"))):
                path = os.path.join(directory, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be removed ({error.strerror})") from None


def stamps(files: list[str]) -> list[list[int | str]]:
    """[path, size, time of change] of each file: whether the input is still what was read."""
    found: list[list[int | str]] = []
    for path in files:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        found.append([os.path.realpath(path), status.st_size, status.st_mtime_ns])
    return found


@contextlib.contextmanager
def locked(directory: str) -> Iterator[None]:
    """The directory, made if need be, for one process alone; a directory made here and left empty is removed again."""
    new = not os.path.isdir(directory)
    os.makedirs(directory, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{directory}: another trireme prepare is writing here; wait for it") from None
        yield
    finally:
        os.close(descriptor)
        if new:
            with contextlib.suppress(OSError):
                os.rmdir(directory)

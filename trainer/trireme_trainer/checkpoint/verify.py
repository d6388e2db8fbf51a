"""Checking the files of a checkpoint against its manifest; the work is shared out among ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from trireme_trainer.checkpoint.files import Files
from trireme_trainer.checkpoint.manifest import FileEntry

CHUNK = 2**22
"""Bytes per read: large enough for network filesystems, small enough to stay in cache while it is hashed."""


@dataclass(frozen=True)
class Problem:
    path: str
    reason: str
    damaged: bool
    """True when the checkpoint itself is bad; False when it could not be read, which may pass."""

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def share(entries: Sequence[FileEntry], rank: int, world: int) -> list[FileEntry]:
    """This rank's part: largest first, each to the rank with the fewest bytes so far; the same answer on every rank."""
    loads = [0] * world
    mine = []
    for entry in sorted(entries, key=lambda e: (-e.size, e.name)):
        least = loads.index(min(loads))
        loads[least] += max(entry.size, 1)
        if least == rank:
            mine.append(entry)
    return mine


def check_files(files: Files, directory: str, entries: Iterable[FileEntry], threads: int = 2) -> list[Problem]:
    """Reads every file whole. Hashing and reading release the interpreter lock, so threads help."""
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="verify") as pool:
        found = pool.map(lambda entry: _check(files, directory, entry), entries)
        return [problem for problem in found if problem is not None]


def _check(files: Files, directory: str, entry: FileEntry) -> Problem | None:
    path = f"{files.path(directory)}/{entry.name}"
    try:
        size = files.size(directory, entry.name)
        if size != entry.size:
            word = "truncated" if size < entry.size else "too long"
            return Problem(path, f"{word}: {size} bytes, the manifest says {entry.size}", True)
        digest = hashlib.sha256()
        with files.open_read(directory, entry.name) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        return Problem(path, "missing", True)
    except Exception as error:  # drivers of object stores have exceptions of their own
        return Problem(path, f"cannot be read ({type(error).__name__}: {error})", False)
    if digest.hexdigest() != entry.sha256:
        found = digest.hexdigest()
        return Problem(path, f"content changed: sha256 {found[:12]}…, the manifest says {entry.sha256[:12]}…", True)
    return None

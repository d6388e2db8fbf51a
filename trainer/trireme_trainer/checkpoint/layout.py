"""Names inside a checkpoint root, and what each one means. Pure: no I/O.

On a filesystem with rename:          in an object store:
  step-00000500                         step-00000500.attempt-3/ with COMMITTED.json    a committed checkpoint
  step-00000500.attempt-3.tmp           step-00000500.attempt-3/ without a marker       being written, or abandoned
  step-00000500.attempt-3.bad           step-00000500.attempt-3/ with BAD.json          found damaged, set aside
  step-00000500.attempt-3.trash         (marker removed first)                          being deleted
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

MANIFEST = "MANIFEST.json"
COMMITTED = "COMMITTED.json"
BAD = "BAD.json"
FENCE = "fence.json"
METADATA = ".metadata"

_NAME = re.compile(r"step-(\d{8,12})(?:\.attempt-(\d{1,9}))?(?:\.(tmp|bad|trash))?")
_FILE = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,127}")


class Kind(Enum):
    PLAIN = ""
    TEMPORARY = "tmp"
    BAD = "bad"
    TRASH = "trash"


@dataclass(frozen=True)
class Name:
    step: int
    attempt: int | None
    kind: Kind

    def __str__(self) -> str:
        attempt = "" if self.attempt is None else f".attempt-{self.attempt}"
        return f"step-{self.step:08d}{attempt}" + (f".{self.kind.value}" if self.kind.value else "")


def parse(directory: str) -> Name | None:
    """None for a directory that is not ours: those are never touched."""
    match = _NAME.fullmatch(directory)
    if match is None:
        return None
    step, attempt, kind = match.groups()
    return Name(int(step), None if attempt is None else int(attempt), Kind(kind or ""))


def is_file_name(name: str) -> bool:
    """Whether a manifest may name this file: a plain name, so that no path leads out of the checkpoint."""
    return _FILE.fullmatch(name) is not None and name not in (".", "..")

"""MANIFEST.json: what a checkpoint consists of, and the non-tensor state that goes with it. JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trireme_trainer.checkpoint.errors import DamagedCheckpoint
from trireme_trainer.checkpoint.layout import METADATA, is_file_name

FORMAT = 1
MAX_BYTES = 64 * 2**20
"""A manifest larger than this is refused before it is parsed."""


@dataclass(frozen=True)
class FileEntry:
    name: str
    size: int
    """Bytes."""
    sha256: str
    """Hex, of the whole file."""


@dataclass(frozen=True)
class Manifest:
    step: int
    """Optimiser steps done when the state was taken."""
    attempt: int
    world_size: int
    """Ranks that wrote it; any number can load it."""
    created: float
    """Unix seconds by rank 0's clock; for people, nothing is decided by it."""
    versions: Mapping[str, str]
    """Of what wrote it: trireme, torch, python."""
    files: tuple[FileEntry, ...]
    meta: Mapping[str, Any]
    """The trainer's own: data position, RNG, config digest, tokens seen…"""

    @property
    def size(self) -> int:
        """Bytes of all files together, without the manifest itself."""
        return sum(entry.size for entry in self.files)

    def to_bytes(self) -> bytes:
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps({**body, "digest": _digest(body)}, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises DamagedCheckpoint: torn, changed since it was written, or of a format this version does not know."""
        if len(data) > MAX_BYTES:
            raise DamagedCheckpoint(f"manifest of {len(data)} bytes is larger than {MAX_BYTES}")
        try:
            body = json.loads(data)
        except ValueError as error:
            raise DamagedCheckpoint(f"torn manifest: not JSON ({error}; {len(data)} bytes)") from None
        if not isinstance(body, dict):
            raise DamagedCheckpoint("manifest is not a JSON object")
        digest = body.pop("digest", None)
        if digest != _digest(body):
            raise DamagedCheckpoint("manifest was changed after it was written: its digest does not match")
        if body.pop("format", None) != FORMAT:
            raise DamagedCheckpoint(f"manifest format is not {FORMAT}: written by another version of trireme")
        try:
            files = tuple(FileEntry(**entry) for entry in body.pop("files"))
            manifest = cls(files=files, **body)
        except (TypeError, KeyError) as error:
            raise DamagedCheckpoint(f"manifest lacks fields: {error}") from None
        for entry in files:
            if not is_file_name(entry.name):
                raise DamagedCheckpoint(f"manifest names {entry.name!r}, which is not a plain file name")
        names = [entry.name for entry in files]
        if len(set(names)) != len(names) or METADATA not in names:
            raise DamagedCheckpoint(f"manifest must name every file once, {METADATA} among them")
        return manifest


def check_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A private copy of `meta` as JSON would give it back. Raises TypeError or ValueError for what JSON cannot hold."""
    copy = json.loads(json.dumps(meta, allow_nan=False))
    if not isinstance(copy, dict):
        raise TypeError("checkpoint meta must be an object")
    return copy


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()

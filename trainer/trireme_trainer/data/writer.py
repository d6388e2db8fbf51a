"""Writing one split's shards, so that being killed anywhere costs at most the shard in the making."""

from __future__ import annotations

import hashlib
import json
import os
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import LENGTH_BYTES, TOKEN_BYTES, Shard, Split, file_sha256

_PARTIAL = ".partial"


class Journal:
    """What is finished of a preparation, in a directory beside the shards: one small JSON file per fact, each
    written by rename after what it speaks of is on disk."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def write(self, name: str, value: object) -> None:
        replace_file(os.path.join(self.directory, name), json.dumps(value).encode())

    def read(self, name: str) -> Any:
        """None when it was never written or is not readable as what it was: then that work is done again."""
        try:
            with open(os.path.join(self.directory, name), "rb") as file:
                return json.load(file)
        except (OSError, ValueError):
            return None


def replace_file(path: str, content: bytes) -> None:
    """The file has the old content or the new, never a part. Raises OSError."""
    with open(path + _PARTIAL, "wb") as file:
        file.write(content)
        sync(file)
    os.replace(path + _PARTIAL, path)
    sync_directory(os.path.dirname(path))


def sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Fills shards of at least `shard_tokens` tokens (the last: what is left), whole documents each.

    Shards already in the journal and sound on disk are kept; writing goes on at the input's document number
    `next_document`. `repaired` names a shard that was in the journal but not sound.
    """

    def __init__(self, directory: str, journal: Journal, split: Split, dtype: str, shard_tokens: int) -> None:
        self._directory = directory
        self._journal = journal
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._tokens: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._lengths: list[int] = []
        self._bytes = 0
        self.repaired: str | None = None
        self.next_document = 0
        self.shards = self._finished()

    def add(self, number: int, ids: NDArray[np.uint32], text_bytes: int) -> None:
        """Document `number` of the input: its tokens [n], end-of-document included. Raises OSError."""
        if len(ids) >= 1 << 32:
            raise DataError(f"a document of {len(ids)} tokens: the most is {(1 << 32) - 1}; cut it into documents")
        if self._tokens is None:
            self._tokens = open(self._path(".tokens") + _PARTIAL, "wb")  # noqa: SIM115 - closed by _close
        raw = ids.astype(self._dtype).tobytes()
        self._tokens.write(raw)
        self._digest.update(raw)
        self._lengths.append(len(ids))
        self._bytes += text_bytes
        self.next_document = number + 1
        if self._tokens.tell() >= self._shard_tokens * self._dtype.itemsize:
            self._close()

    def finish(self) -> list[Shard]:
        if self._tokens is not None:
            self._close()
        return self.shards

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._tokens is not None:
            self._tokens.close()

    def _name(self, number: int) -> str:
        return f"{self._split}-{number:05d}"

    def _path(self, suffix: str) -> str:
        return os.path.join(self._directory, self._name(len(self.shards)) + suffix)

    def _close(self) -> None:
        assert self._tokens is not None
        sync(self._tokens)
        self._tokens.close()
        lengths = np.array(self._lengths, dtype="<u4")
        with open(self._path(".lengths") + _PARTIAL, "wb") as file:
            file.write(lengths.tobytes())
            sync(file)
        for suffix in (".tokens", ".lengths"):
            os.replace(self._path(suffix) + _PARTIAL, self._path(suffix))
        sync_directory(self._directory)
        shard = Shard(
            name=self._name(len(self.shards)),
            tokens=int(lengths.sum(dtype=np.int64)),
            documents=len(lengths),
            bytes=self._bytes,
            sha256=self._digest.hexdigest(),
            lengths_sha256=hashlib.sha256(lengths.tobytes()).hexdigest(),
        )
        self._journal.write(shard.name, {"shard": shard.model_dump(), "next": self.next_document})
        self.shards.append(shard)
        self._tokens, self._digest, self._lengths, self._bytes = None, hashlib.sha256(), [], 0

    def _finished(self) -> list[Shard]:
        shards: list[Shard] = []
        while (entry := self._journal.read(self._name(len(shards)))) is not None:
            try:
                shard = Shard.model_validate(entry["shard"])
                sound, following = self._sound(shard), int(entry["next"])
            except (ValueError, TypeError, KeyError, OSError):
                sound = False
            if not sound:
                self.repaired = self._name(len(shards))
                break
            shards.append(shard)
            self.next_document = following
        return shards

    def _sound(self, shard: Shard) -> bool:
        tokens = os.path.join(self._directory, shard.tokens_file)
        lengths = os.path.join(self._directory, shard.lengths_file)
        return (
            os.path.getsize(tokens) == shard.tokens * TOKEN_BYTES[self._dtype.name]
            and os.path.getsize(lengths) == shard.documents * LENGTH_BYTES
            and file_sha256(tokens) == shard.sha256
            and file_sha256(lengths) == shard.lengths_sha256
        )

"""Reading a prepared corpus: memory-mapped token shards and where each document begins."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import MANIFEST, Manifest, Split, SplitPart, file_sha256, read_manifest
from trireme_trainer.data.tokenizer import Encoder, open_encoder


def check_files(
    directory: str, manifest: Manifest, contents: bool, seen: Callable[[str], None] | None = None
) -> list[str]:
    """Every problem of the files the manifest vouches for, one line each: sizes and the tokenizer always, every byte
    when `contents`."""
    problems = []
    for name, size, sha256 in manifest.files():
        path = os.path.join(directory, name)
        try:
            actual = os.path.getsize(path)
            if size >= 0 and actual != size:
                what = "truncated" if actual < size else "longer than it should be"
                problems.append(f"{path}: {what}: {actual} bytes, the manifest says {size}")
            elif (contents or size < 0) and (found := file_sha256(path)) != sha256:
                problems.append(f"{path}: corrupt: sha256 is {found[:16]}…, the manifest says {sha256[:16]}…")
        except FileNotFoundError:
            problems.append(f"{path}: missing")
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
        if seen:
            seen(name)
    return problems


class Corpus:
    """A prepared directory, opened. Sizes of all files are checked; contents too when `verify`.

    Raises DataError naming the first file that is wrong.
    """

    def __init__(self, directory: str, verify: bool = False) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        problems = check_files(directory, self.manifest, contents=verify)
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise DataError(f"{problems[0]}{more}; restore it or prepare the corpus again")
        self.train = Documents(self, "train")
        self.valid = Documents(self, "valid")

    def encoder(self) -> Encoder:
        """Raises DataError where the tokenizer's file cannot be read."""
        return open_encoder(self.tokenizer(), os.path.join(self.directory, self.manifest.tokenizer.file))

    def tokenizer(self) -> bytes:
        """Its file. Raises DataError."""
        path = os.path.join(self.directory, self.manifest.tokenizer.file)
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint


class Documents:
    """The documents of one split, by number. Keeps 16 bytes per document in memory; tokens stay on disk."""

    def __init__(self, corpus: Corpus, split: Split) -> None:
        part: SplitPart = corpus.manifest.split(split)
        dtype = np.dtype(corpus.manifest.dtype).newbyteorder("<")
        self.where = f"{corpus.directory} ({split})"
        self.vocabulary = corpus.manifest.vocabulary
        self.tokens = part.tokens
        self._shards: list[NDArray[np.unsignedinteger]] = []
        lengths = []
        for shard in part.shards:
            path = os.path.join(corpus.directory, shard.tokens_file)
            self._shards.append(np.memmap(path, dtype=dtype, mode="r", shape=(shard.tokens,)))
            found = np.fromfile(os.path.join(corpus.directory, shard.lengths_file), dtype="<u4").astype(np.int64)
            if int(found.sum()) != shard.tokens or (len(found) and int(found.min()) < 1):
                path = os.path.join(corpus.directory, shard.lengths_file)
                raise DataError(f"{path}: corrupt: document lengths do not sum to the shard's tokens; prepare it again")
            lengths.append(found)
        self.lengths: NDArray[np.int64] = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        """[documents]"""
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._shard_tokens = np.cumsum([0] + [shard.tokens for shard in part.shards])

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, begin: int, end: int) -> NDArray[np.unsignedinteger]:
        """Tokens [begin, end) of a document, a view into the memory map."""
        start = int(self._starts[document])
        shard = int(np.searchsorted(self._shard_tokens, start, side="right")) - 1
        offset = start - int(self._shard_tokens[shard])
        return self._shards[shard][offset + begin : offset + end]

    def stream(self, count: int) -> NDArray[np.int64]:
        """The first `count` tokens of the split, in its own order. Raises DataError for a damaged shard."""
        parts, left = [], count
        for shard in self._shards:
            parts.append(np.asarray(shard[:left], dtype=np.int64))
            left -= len(parts[-1])
            if left <= 0:
                break
        tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        self.check_range(tokens)
        return tokens

    def check_range(self, block: NDArray[np.int64]) -> None:
        """A flipped bit can make an id no embedding has; on a GPU that aborts without a name, so refuse it here."""
        if len(block) and int(block.max()) >= self.vocabulary:
            raise DataError(
                f"{self.where}: token id {int(block.max())} in a vocabulary of {self.vocabulary}: a shard is corrupt; "
                f"run trireme prepare --verify on the directory of {MANIFEST}"
            )

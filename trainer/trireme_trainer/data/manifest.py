"""The form of a prepared corpus on disk: `manifest.json` beside its shards.

A shard is two headerless little-endian files: `NAME.tokens` (uint16, or uint32 when the vocabulary needs it), whole
documents one after the other, each ending in the end-of-document token; and `NAME.lengths` (uint32), the tokens of
each document. The manifest is written last, by rename: a directory without one is not finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from trireme_trainer.data.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SENTENCE_PIECES = "tokenizer.model"
Split = Literal["train", "valid"]
TOKEN_BYTES = {"uint16": 2, "uint32": 4}
LENGTH_BYTES = 4


class _Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class Shard(_Part):
    name: str
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    sha256: str
    lengths_sha256: str

    @property
    def tokens_file(self) -> str:
        return self.name + ".tokens"

    @property
    def lengths_file(self) -> str:
        return self.name + ".lengths"


class SplitPart(_Part):
    tokens: int
    documents: int
    bytes: int
    shards: list[Shard]

    @classmethod
    def of(cls, shards: list[Shard]) -> SplitPart:
        return cls(
            tokens=sum(s.tokens for s in shards),
            documents=sum(s.documents for s in shards),
            bytes=sum(s.bytes for s in shards),
            shards=shards,
        )


class TokenizerPart(_Part):
    file: str = TOKENIZER
    sha256: str
    vocabulary: int
    """Ids run from 0 to vocabulary − 1."""
    end_of_document: int
    unknown_tokens: int | None = None
    """Of the training split, those that stand for text the tokenizer cannot write; None: not known."""


class InputPart(_Part):
    """What was prepared and how; equal for equal input, so it holds no paths and no dates."""

    files: int
    sha256: str
    """Over the text of every document in order."""
    skipped_empty_documents: int
    options: dict[str, int | float | str | None]


class Manifest(_Part):
    version: int = FORMAT_VERSION
    fingerprint: str = ""
    """sha256 over everything that decides what a block holds: tokenizer, dtype, and both checksums of every shard.
    Not the language: it decides shares, which are compared themselves."""
    tokens: int
    documents: int
    language: str | None = None
    """A tag such as sw; None: not said, or several."""
    vocabulary: int
    dtype: Literal["uint16", "uint32"]
    unigram_entropy: float
    """Nats per token over the training split: the loss of a model that knows only how frequent each token is."""
    bytes_per_token: float
    """UTF-8 bytes of text per token, training split: turns a loss in nats per token into bits per byte."""
    tokenizer: TokenizerPart
    train: SplitPart
    valid: SplitPart
    input: InputPart

    def split(self, name: Split) -> SplitPart:
        return self.train if name == "train" else self.valid

    def compute_fingerprint(self) -> str:
        content = {
            "version": self.version,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer.model_dump(exclude={"unknown_tokens"}),
            "train": [shard.model_dump(exclude={"bytes"}) for shard in self.train.shards],
            "valid": [shard.model_dump(exclude={"bytes"}) for shard in self.valid.shards],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def sealed(self) -> Manifest:
        return self.model_copy(update={"fingerprint": self.compute_fingerprint()})

    def to_text(self) -> str:
        return json.dumps(self.model_dump(by_alias=True), indent=1, ensure_ascii=False) + "\n"

    def files(self) -> list[tuple[str, int, str]]:
        """(file name, size in bytes or −1 where not recorded, sha256) of all the manifest vouches for."""
        found = [(self.tokenizer.file, -1, self.tokenizer.sha256)]
        for shard in (*self.train.shards, *self.valid.shards):
            found.append((shard.tokens_file, shard.tokens * TOKEN_BYTES[self.dtype], shard.sha256))
            found.append((shard.lengths_file, shard.documents * LENGTH_BYTES, shard.lengths_sha256))
        return found


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Raises DataError when `where` does not hold a manifest of this version whose fingerprint fits its content."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); prepare the corpus again") from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{where}: format version {version!r}, this trireme reads {FORMAT_VERSION}; prepare the corpus again"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}: {field}: {first['msg']}; prepare the corpus again") from None
    if manifest.fingerprint != manifest.compute_fingerprint():
        raise DataError(f"{where}: the fingerprint does not fit, so it was changed; prepare the corpus again")
    return manifest


def read_manifest(directory: str) -> Manifest:
    """The manifest of a prepared directory, checked as by parse_manifest. Raises DataError when there is none."""
    path = os.path.join(directory, MANIFEST)
    try:
        with open(path, "rb") as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.exists(directory):
            hint = "no such directory"
        elif not os.path.isdir(directory):
            hint = "not a directory"
        else:
            hint = f"no {MANIFEST} in it, so it is not a finished corpus"
        raise DataError(f"{directory}: {hint}; make one with: trireme prepare INPUT... --output {directory}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_manifest(text, path)


def file_sha256(path: str) -> str:
    """Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()

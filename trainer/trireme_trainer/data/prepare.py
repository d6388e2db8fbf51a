"""Text to shards: read and check everything, train the tokenizer, encode, and publish by writing the manifest.

The same input and options give the same bytes, in one run or in many interrupted ones: what a run finds finished it
verifies and keeps. Four passes over the text (check, tokenizer, held-out documents, training documents) keep memory
at one batch of documents.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from trireme_api.mixture import LANGUAGE

from trireme_trainer.data import tokenizer
from trireme_trainer.data.documents import Reading, find_files, read_documents
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import (
    MANIFEST,
    InputPart,
    Manifest,
    Shard,
    Split,
    SplitPart,
    TokenizerPart,
    read_manifest,
)
from trireme_trainer.data.order import derive, shuffled
from trireme_trainer.data.tokenizer import Kind
from trireme_trainer.data.tokenizer.byte_bpe import MIN_VOCABULARY
from trireme_trainer.data.workspace import JOURNAL, locked, stamps
from trireme_trainer.data.writer import Journal, ShardWriter, replace_file
from trireme_trainer.storage import StorageError, is_local, resolve_path

_SPLIT_KEY = derive(0x7A11D)
_SAMPLE_KEY = derive(0x5A3713)
_BATCH_CHARS = 1 << 22
_FEW_DOCUMENTS = 10
"""With fewer documents than this none is held out by rounding up: it would be a large part of the corpus."""

Progress = Callable[[str, int, int], None]
"""(what is being done, how much of it is done, how much there is: bytes or documents)"""
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    tokenizer: str | None = None
    """Path of a tokenizer.json or a SentencePiece model; None trains one on the training documents."""
    train_tokenizer: Kind = "byte-bpe"
    vocabulary: int = 8192
    """The most tokens a trained tokenizer may have."""
    tokenizer_bytes: int = 1 << 30
    """About how much text the tokenizer is trained on, drawn evenly from the corpus."""
    end_of_document: str | None = None
    language: str | None = None
    """A tag such as sw, for the manifest."""
    valid_fraction: float = 0.01
    """Share of the documents held out."""
    shard_tokens: int = 1 << 27
    separator: str | None = None
    text_field: str = "text"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def check(self) -> None:
        if self.language is not None and not LANGUAGE.fullmatch(self.language):
            raise DataError(f"--language {self.language!r}: must be a tag such as sw, pt-BR or zh_Hans")
        if not 0 <= self.valid_fraction < 1:
            raise DataError(f"--valid-fraction {self.valid_fraction}: must be at least 0 and less than 1")
        for option, number in (("--shard-tokens", self.shard_tokens), ("--tokenizer-bytes", self.tokenizer_bytes)):
            if number < 1:
                raise DataError(f"{option} {number}: must be at least 1")
        least = MIN_VOCABULARY
        if self.tokenizer is None and self.vocabulary < least:
            raise DataError(f"--vocabulary {self.vocabulary}: must be at least {least} (256 bytes, 5 special tokens)")
        if self.tokenizer is not None and self.train_tokenizer != "byte-bpe":
            raise DataError(f"--train-tokenizer {self.train_tokenizer}: --tokenizer is given, so none is trained")
        if self.separator == "":
            raise DataError("--document-separator: may not be empty; for blank lines give blank-line")


@dataclass(frozen=True)
class Prepared:
    directory: str
    manifest: Manifest
    fresh: bool
    """False when it was there already, made from the same input with the same options."""
    shards_kept: int
    """Finished by an earlier, interrupted run, verified and kept."""


@dataclass(frozen=True)
class _Scan:
    """What the first pass learns."""

    files: list[tuple[int, int]]
    """(documents, bytes of text) of each file; empty documents are not counted."""
    sha256: str
    empty: int

    @property
    def documents(self) -> int:
        return sum(documents for documents, _ in self.files)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


def prepare(
    inputs: Sequence[str], output: str, options: Options, progress: Progress | None = None, notice: Notice | None = None
) -> Prepared:
    """Prepares `inputs` into the directory `output` (a local path or pvc://claim/dir).

    Raises DataError naming the file, option or directory at fault; nothing is published then.
    """
    options.check()
    try:
        if not is_local(output):
            raise DataError(f"--output {output}: must be a local path or pvc://claim/dir; upload it afterwards")
        directory = resolve_path(output)
        files = find_files(inputs, options.include, options.exclude, output=directory)
        with locked(directory):
            return _Preparation(files, directory, options, progress or _silent, notice or _silent).run()
    except StorageError as error:
        raise DataError(f"--output {error}") from None
    except OSError as error:
        where = error.filename or output
        raise DataError(
            f"{where}: cannot be written ({error.strerror}); mend that or give another --output; the same command goes "
            f"on where this one stopped"
        ) from None


class _Preparation:
    def __init__(self, files: list[str], directory: str, options: Options, progress: Progress, notice: Notice) -> None:
        self._files = files
        self._directory = directory
        self._options = options
        self._reading = Reading(options.separator, options.text_field)
        self._progress = progress
        self._notice = notice
        self._journal = Journal(os.path.join(directory, JOURNAL))
        self._given_tokenizer = _read_tokenizer(options.tokenizer) if options.tokenizer else None
        self._stamps = stamps(files)

    def run(self) -> Prepared:
        finished = self._finished()
        scan = self._scan(finished is not None)
        part = InputPart(
            files=len(self._files), sha256=scan.sha256, skipped_empty_documents=scan.empty, options=self._settings()
        )
        if finished is not None:
            if finished.input != part:
                raise DataError(
                    f"{self._directory}: holds a corpus made from other input or options; give another --output, or "
                    f"--overwrite to replace it"
                )
            self._clean()
            return Prepared(self._directory, finished, fresh=False, shards_kept=0)
        encoder = self._encoder(scan)
        valid, kept_valid = self._encode(scan, encoder, "valid")
        train, kept_train = self._encode(scan, encoder, "train")
        if stamps(self._files) != self._stamps:
            raise DataError("the input changed while it was being read; wait until it is at rest, use --overwrite")
        manifest = self._publish(part, encoder, train, valid)
        return Prepared(self._directory, manifest, fresh=True, shards_kept=kept_valid + kept_train)

    def _finished(self) -> Manifest | None:
        return read_manifest(self._directory) if os.path.exists(os.path.join(self._directory, MANIFEST)) else None

    def _settings(self) -> dict[str, int | float | str | None]:
        options = self._options
        given = self._given_tokenizer
        # Not written where left out: corpora of before know nothing of it, and are still found finished.
        language = {"language": options.language} if options.language else {}
        kind = options.train_tokenizer
        return {
            **language,
            **({"trainTokenizer": kind} if kind != "byte-bpe" else {}),
            "tokenizerSha256": hashlib.sha256(given).hexdigest() if given is not None else None,
            "vocabulary": None if given is not None else options.vocabulary,
            "tokenizerBytes": None if given is not None else options.tokenizer_bytes,
            "endOfDocument": options.end_of_document,
            "validFraction": options.valid_fraction,
            "shardTokens": options.shard_tokens,
            "separator": options.separator,
            "textField": options.text_field,
        }

    def _scan(self, finished: bool) -> _Scan:
        plan = {"settings": self._settings(), "files": self._stamps}
        found = self._journal.read("scan")
        if found is not None and found["plan"] == plan:
            return _Scan([(d, b) for d, b in found["files"]], found["sha256"], found["empty"])
        if not finished:
            self._refuse_other_work(found is not None)
        scan = self._read_everything()
        if not finished:
            os.makedirs(self._journal.directory, exist_ok=True)
            self._journal.write("scan", {"plan": plan, **asdict(scan)})
        return scan

    def _refuse_other_work(self, begun: bool) -> None:
        if begun:
            raise DataError(
                f"{self._directory}: holds an unfinished corpus of other or changed input or options; finish it with "
                f"the same command, or give --overwrite to begin anew"
            )
        given = self._options.tokenizer
        for name in sorted(os.listdir(self._directory)):
            path = os.path.join(self._directory, name)
            if name != JOURNAL and not (given and os.path.realpath(given) == os.path.realpath(path)):
                raise DataError(f"{self._directory}: is not empty ({name}); give an empty or new directory as --output")

    def _read_everything(self) -> _Scan:
        digest = hashlib.sha256()
        counts, empty, done = [], 0, 0
        sizes = [int(size) for _, size, _ in self._stamps]
        for path, size in zip(self._files, sizes, strict=True):
            documents = text_bytes = 0
            for text in read_documents(path, self._reading):
                if not text:
                    empty += 1
                    continue
                raw = text.encode()
                digest.update(len(raw).to_bytes(8, "little"))
                digest.update(raw)
                documents += 1
                text_bytes += len(raw)
            counts.append((documents, text_bytes))
            done += size
            self._progress("reading", done, sum(sizes))
        return _Scan(counts, digest.hexdigest(), empty)

    def _documents(self, scan: _Scan, first: int = 0) -> Iterator[tuple[int, str]]:
        """(number, text) of every document from number `first` on; files before it are not opened."""
        number = 0
        for path, (count, _) in zip(self._files, scan.files, strict=True):
            if number + count <= first:
                number += count
                continue
            after = number + count
            for text in read_documents(path, self._reading):
                if text:
                    if number >= first:
                        yield number, text
                    number += 1
            if number != after:
                raise DataError(f"{path}: changed while it was being read; wait until it is at rest, use --overwrite")

    def _held_out(self, scan: _Scan) -> NDArray[np.bool_]:
        wanted = round(scan.documents * self._options.valid_fraction)
        if wanted == 0 and self._options.valid_fraction > 0 and scan.documents >= _FEW_DOCUMENTS:
            wanted = 1
        return _drawn(scan.documents, min(wanted, scan.documents - 1), _SPLIT_KEY)

    def _encoder(self, scan: _Scan) -> tokenizer.Encoder:
        options = self._options
        path = os.path.join(self._directory, tokenizer.FILES[options.train_tokenizer])
        content = self._given_tokenizer
        if content is None:
            done = self._journal.read("tokenizer")
            with contextlib.suppress(OSError), open(path, "rb") as file:
                content = file.read()
                if hashlib.sha256(content).hexdigest() != done:
                    content = None
        if content is None:
            content = tokenizer.train_kind(options.train_tokenizer, self._tokenizer_texts(scan), options.vocabulary)
            self._progress("training the tokenizer", 1, 1)
        where = f"--tokenizer {options.tokenizer}" if options.tokenizer else path
        encoder = tokenizer.open_encoder(content, where, options.end_of_document)
        replace_file(os.path.join(self._directory, encoder.file), content)
        self._journal.write("tokenizer", encoder.sha256)
        return encoder

    def _tokenizer_texts(self, scan: _Scan) -> Iterator[str]:
        share = min(1.0, self._options.tokenizer_bytes / scan.bytes)
        wanted = _drawn(scan.documents, max(1, math.ceil(share * scan.documents)), _SAMPLE_KEY) & ~self._held_out(scan)
        if not wanted.any():
            wanted = ~self._held_out(scan)
        done = 0
        for number, text in self._documents(scan):
            done += len(text.encode())
            if wanted[number]:
                yield text
            self._progress("training the tokenizer", done, scan.bytes + 1)

    def _encode(self, scan: _Scan, encoder: tokenizer.Encoder, split: Split) -> tuple[list[Shard], int]:
        wanted = self._held_out(scan) if split == "valid" else ~self._held_out(scan)
        what = f"encoding {split}"
        with ShardWriter(self._directory, self._journal, split, encoder.dtype, self._options.shard_tokens) as writer:
            kept, begin = len(writer.shards), writer.next_document
            if writer.repaired:
                self._notice(f"{writer.repaired}: damaged since it was written; making it again")
            batch: list[tuple[int, str]] = []
            chars = 0
            for number, text in self._documents(scan, begin):
                if wanted[number]:
                    batch.append((number, text))
                    chars += len(text)
                if chars >= _BATCH_CHARS:
                    _write(batch, encoder, writer)
                    batch, chars = [], 0
                    self._progress(what, number, scan.documents)
            _write(batch, encoder, writer)
            self._progress(what, scan.documents, scan.documents)
            return writer.finish(), kept

    def _publish(
        self, part: InputPart, encoder: tokenizer.Encoder, train: list[Shard], valid: list[Shard]
    ) -> Manifest:
        splits = {"train": SplitPart.of(train), "valid": SplitPart.of(valid)}
        counts = self._counts(train, encoder)
        manifest = Manifest(
            tokens=sum(split.tokens for split in splits.values()),
            documents=sum(split.documents for split in splits.values()),
            language=self._options.language,
            vocabulary=encoder.vocabulary,
            dtype="uint16" if encoder.dtype == "uint16" else "uint32",
            unigram_entropy=_entropy(counts),
            bytes_per_token=splits["train"].bytes / splits["train"].tokens,
            tokenizer=TokenizerPart(
                file=encoder.file,
                sha256=encoder.sha256,
                vocabulary=encoder.vocabulary,
                end_of_document=encoder.end_of_document,
                unknown_tokens=None if encoder.unknown is None else int(counts[encoder.unknown]),
            ),
            train=splits["train"],
            valid=splits["valid"],
            input=part,
        ).sealed()
        replace_file(os.path.join(self._directory, MANIFEST), manifest.to_text().encode())
        self._clean()
        return manifest

    def _counts(self, train: list[Shard], encoder: tokenizer.Encoder) -> NDArray[np.int64]:
        """[vocabulary]: how often each token stands in the training split."""
        counts = np.zeros(encoder.vocabulary, dtype=np.int64)
        for shard in train:
            path = os.path.join(self._directory, shard.tokens_file)
            tokens = np.memmap(path, dtype=np.dtype(encoder.dtype).newbyteorder("<"), mode="r")
            for begin in range(0, len(tokens), 1 << 24):
                counts += np.bincount(tokens[begin : begin + (1 << 24)], minlength=encoder.vocabulary)
        return counts

    def _clean(self) -> None:
        shutil.rmtree(os.path.join(self._directory, JOURNAL), ignore_errors=True)


def _drawn(count: int, drawn: int, key: int) -> NDArray[np.bool_]:
    """[count]: True for `drawn` of them, the same ones for the same key."""
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[shuffled(count, key)[:drawn]] = True
    return chosen


def _write(batch: list[tuple[int, str]], encoder: tokenizer.Encoder, writer: ShardWriter) -> None:
    encoded = encoder.encode([text for _, text in batch])
    for (number, text), ids in zip(batch, encoded, strict=True):
        writer.add(number, ids, len(text.encode()))


def _entropy(counts: NDArray[np.int64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _read_tokenizer(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"--tokenizer {path}: cannot be read ({error.strerror})") from None


def _silent(*_: object) -> None:
    return None

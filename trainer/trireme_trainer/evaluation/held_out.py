"""Perplexity of held-out text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from trireme_api.evaluation import HeldOutSource

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.remote import local_copy
from trireme_trainer.data.shards import Corpus, Documents
from trireme_trainer.data.tokenizer import Encoder
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.evaluation.scoring import Request, Score, perplexity
from trireme_trainer.storage import StorageError


@dataclass(frozen=True)
class Text:
    """The tokens of one split in the corpus's order, in windows that follow each other: each token but the very first
    is predicted once, from at most `length` before it."""

    name: str
    language: str | None
    windows: tuple[Request, ...]
    bytes_per_token: float

    @property
    def tokens(self) -> int:
        return sum(window.scored for window in self.windows)


@dataclass(frozen=True)
class Opened:
    where: str
    """Field or option, and path: for errors."""
    source: HeldOutSource
    corpus: Corpus

    @property
    def name(self) -> str:
        return self.source.name or os.path.basename(self.corpus.directory.rstrip("/"))

    @property
    def language(self) -> str | None:
        return self.source.language or self.corpus.manifest.language

    @property
    def documents(self) -> Documents:
        return self.corpus.valid if self.source.split == "valid" else self.corpus.train


def open_sources(
    sources: Sequence[HeldOutSource], field: str, vocabulary: int, encoder: Encoder | None
) -> tuple[list[Opened], Encoder | None]:
    """`field` has {} where the number of the source stands; `vocabulary`: rows of the model's token table; `encoder`:
    of the model, and all sources must be made with it; left out: that of the first, which is returned. Raises
    EvaluationError."""
    found = []
    for i, source in enumerate(sources):
        where = f"{field.format(i)}: {source.path}"
        try:
            corpus = Corpus(local_copy(source.path))
        except (DataError, StorageError) as error:
            raise EvaluationError(f"{field.format(i)}: {error}") from None
        if encoder is None:
            encoder = corpus.encoder()
        if corpus.manifest.tokenizer.sha256 != encoder.sha256:
            raise EvaluationError(
                f"{where}: made with another tokenizer than the model's; prepare it with --tokenizer FILE of that"
            )
        if corpus.manifest.vocabulary > vocabulary:
            raise EvaluationError(
                f"{where}: tokenised with {corpus.manifest.vocabulary} entries, the model has {vocabulary}; "
                "prepare it with the tokenizer that the model was trained with"
            )
        found.append(Opened(where, source, corpus))
    return found, encoder


def open_text(opened: Opened, length: int, most: int | None) -> Text:
    """`most`: tokens looked at. Raises DataError for an empty split or a damaged shard."""
    part = opened.corpus.manifest.split(opened.source.split)
    total = part.tokens if most is None else min(part.tokens, most + 1)
    if total < 2:
        raise EvaluationError(
            f"{opened.where}: its split {opened.source.split} has {part.tokens} tokens; prepare it with "
            "--valid-fraction above 0, or, where nothing of it is trained on, evaluate its split train"
        )
    stream = opened.documents.stream(total)
    windows = [
        Request(stream[i : i + length + 1], min(length, total - 1 - i)) for i in range(0, total - 1, length)
    ]
    return Text(opened.name, opened.language, tuple(windows), part.bytes / part.tokens)


def figures(texts: Sequence[Text], scores: Sequence[Sequence[Score]]) -> list[dict[str, Any]]:
    """A row for each source, then one for each language that sources name, over all tokens of its sources."""
    rows, languages = [], dict[str, list[tuple[int, float, float]]]()
    for text, found in zip(texts, scores, strict=True):
        nats = -sum(score.log_likelihood for score in found)
        part = text.tokens, nats, text.tokens * text.bytes_per_token
        rows.append({"source": text.name, "language": text.language, **_row([part])})
        if text.language is not None:
            languages.setdefault(text.language, []).append(part)
    return rows + [{"source": None, "language": name, **_row(parts)} for name, parts in sorted(languages.items())]


def _row(parts: Sequence[tuple[int, float, float]]) -> dict[str, Any]:
    tokens, nats, size = (float(np.sum(column)) for column in zip(*parts, strict=True))
    loss = nats / tokens
    return {
        "tokens": int(tokens), "loss": round(loss, 6), "perplexity": perplexity(loss),
        "bitsPerByte": round(nats / math.log(2) / size, 6),
    }  # fmt: skip

"""Perplexity of held-out text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trireme_trainer.data.manifest import Split
from trireme_trainer.data.shards import Corpus
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.evaluation.scoring import Request, Score


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


def open_text(
    corpus: Corpus, where: str, split: Split, length: int, most: int | None, name: str | None, language: str | None
) -> Text:
    """`most`: tokens looked at. Raises DataError for an empty split or a damaged shard."""
    documents = corpus.valid if split == "valid" else corpus.train
    part = corpus.manifest.split(split)
    total = part.tokens if most is None else min(part.tokens, most + 1)
    if total < 2:
        raise EvaluationError(
            f"{where}: its split {split} has {part.tokens} tokens; prepare it with --valid-fraction above 0, or, where "
            "nothing of it is trained on, evaluate its split train"
        )
    stream = documents.stream(total)
    windows = [
        Request(stream[i : i + length + 1], min(length, total - 1 - i)) for i in range(0, total - 1, length)
    ]
    label = name or os.path.basename(corpus.directory.rstrip("/"))
    return Text(label, language, tuple(windows), part.bytes / part.tokens)


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
    # JSON knows no infinity; a model this wrong has no perplexity worth a number.
    perplexity = math.exp(loss) if loss < 700 else None
    return {
        "tokens": int(tokens), "loss": round(loss, 6),
        "perplexity": round(perplexity, 4) if perplexity is not None else None,
        "bitsPerByte": round(nats / math.log(2) / size, 6),
    }  # fmt: skip

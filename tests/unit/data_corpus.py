"""Small corpora of known tokens, written as `trireme prepare` writes them, without text or a tokenizer."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from trireme_trainer.data.manifest import MANIFEST, InputPart, Manifest, SplitPart, TokenizerPart
from trireme_trainer.data.writer import Journal, ShardWriter


def write_corpus(
    directory: Path,
    train: list[list[int]],
    valid: list[list[int]] | None = None,
    vocabulary: int = 1000,
    shard_tokens: int = 1 << 20,
    tokenizer: bytes = b"{}",
    language: str | None = None,
) -> str:
    """Documents of token ids as they are (give the end-of-document token yourself)."""
    journal = directory / ".prepare"
    os.makedirs(journal)
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    parts = {}
    for split, documents in (("train", train), ("valid", valid or [])):
        with ShardWriter(str(directory), Journal(str(journal)), split, dtype, shard_tokens) as writer:
            for number, ids in enumerate(documents):
                writer.add(number, np.array(ids, dtype=np.uint32), 4 * len(ids))
            parts[split] = SplitPart.of(writer.finish())
    (directory / "tokenizer.json").write_bytes(tokenizer)
    manifest = Manifest(
        tokens=parts["train"].tokens + parts["valid"].tokens,
        documents=parts["train"].documents + parts["valid"].documents,
        language=language,
        vocabulary=vocabulary,
        dtype=dtype,
        unigram_entropy=1.0,
        bytes_per_token=4.0,
        tokenizer=TokenizerPart(
            sha256=hashlib.sha256(tokenizer).hexdigest(), vocabulary=vocabulary, end_of_document=2
        ),
        train=parts["train"],
        valid=parts["valid"],
        input=InputPart(files=1, sha256="", skipped_empty_documents=0, options={}),
    ).sealed()
    (directory / MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
    return str(directory)


def numbered(lengths: list[int], first: int = 10) -> list[list[int]]:
    """Documents in which no token id occurs twice: position tells token and token tells position."""
    documents = []
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    return documents

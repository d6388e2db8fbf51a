"""Tokenizers: byte-level BPE of the tokenizers library, and SentencePiece models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import SENTENCE_PIECES, TOKENIZER
from trireme_trainer.data.tokenizer import byte_bpe, sentence_pieces
from trireme_trainer.data.tokenizer.byte_bpe import JsonEncoder
from trireme_trainer.data.tokenizer.encoder import Encoder as Encoder
from trireme_trainer.data.tokenizer.encoder import SpecialTokens as SpecialTokens
from trireme_trainer.data.tokenizer.sentence_pieces import SentencePieceEncoder

Kind = Literal["byte-bpe", "sentencepiece"]
FILES: dict[Kind, str] = {"byte-bpe": TOKENIZER, "sentencepiece": SENTENCE_PIECES}


def train_kind(kind: Kind, texts: Iterator[str], vocabulary: int) -> bytes:
    """The content of a tokenizer's file. Raises DataError for a vocabulary that is too small."""
    if kind == "byte-bpe":
        return byte_bpe.train(texts, vocabulary).encode()
    return sentence_pieces.train(texts, vocabulary)


def open_encoder(content: bytes, where: str, end_of_document: str | None = None) -> Encoder:
    """Of a tokenizer.json or a SentencePiece model. `where` names the file in errors. Raises DataError for other files,
    and where no token ends a document."""
    if is_json(content):
        try:
            return JsonEncoder(content.decode(), where, end_of_document)
        except UnicodeDecodeError:
            raise DataError(f"{where}: not a tokenizer.json (not UTF-8 text)") from None
    return SentencePieceEncoder(content, where, end_of_document)


def is_json(content: bytes) -> bool:
    return content.lstrip().startswith(b"{")


def special_tokens(file: bytes, where: str, end_of_document: int) -> SpecialTokens:
    """Of a tokenizer.json or a SentencePiece model; `where` names the corpus in errors. Raises DataError where the
    tokenizer has no mask token."""
    if is_json(file):
        return byte_bpe.special_tokens(file, where, end_of_document)
    return SentencePieceEncoder(file, where).special_tokens()

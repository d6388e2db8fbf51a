"""SentencePiece models as tokenizers, with fairseq's ids and its rule for newlines.

The library itself, not the Unigram model of the tokenizers library: that one is built by a converter, which gives the
same ids for plain words and others elsewhere (Transformers' XGLM tokenizer knows neither bytes nor the model's own
normalisation), and ids must be those that a published checkpoint was trained on.

Ids: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, the model's other pieces from 4 on in its order, `<mask>` last: those of
XGLM's and XLM-R's checkpoints for their own models (fairseq's dictionary; Transformers' `fairseq_offset`).

Newlines: a model never sees one, for SentencePiece turns it into a space. Each line is a paragraph, encoded by itself;
`</s>` stands between two of them, however many newlines there are; a document ends with the `</s>` of its last line and
that of the blank line after it (fairseq examples/xglm/README.md: text is a paragraph per line, a blank line between
documents, each newline becomes `</s>`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import SENTENCE_PIECES
from trireme_trainer.data.tokenizer.encoder import SPECIAL_TOKENS, Encoder, SpecialTokens

BEGIN, PAD, END, UNKNOWN = range(len(SPECIAL_TOKENS))
_LONGEST = 1 << 16
"""Bytes of a line that is trained on; longer ones are left out."""
_MASK_AND_PAD = 2
"""Rows that a model has no piece for."""


def train(texts: Iterator[str], vocabulary: int) -> bytes:
    """A unigram model of at most `vocabulary` tokens, special ones included. Normalises as XGLM's and XLM-R's do
    (NFKC); unlike them it falls back to bytes, so that no text is `<unk>` and bits per byte can be compared.

    The same texts give the same bytes: trained in one thread. Raises DataError for a vocabulary that is too small.
    """
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in paragraphs(text)), model_writer=out,
            vocab_size=vocabulary - _MASK_AND_PAD, hard_vocab_limit=False, model_type="unigram", byte_fallback=True,
            normalization_rule_name="nmt_nfkc", character_coverage=0.9995, max_sentence_length=_LONGEST,
            shuffle_input_sentence=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].partition(". Increase")[0].strip(" .")
        raise DataError(
            f"--vocabulary {vocabulary}: no SentencePiece model of it ({reason}, beside {_MASK_AND_PAD} more); give a "
            "larger one, or more text"
        ) from None
    return out.getvalue()


def paragraphs(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        line = line.strip()
        if line:
            yield line


class SentencePieceEncoder(Encoder):
    file = SENTENCE_PIECES

    def __init__(self, model: bytes, where: str, end_of_document: str | None = None) -> None:
        """`where` names the file in errors. Raises DataError when it is no SentencePiece model."""
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(
                f"{where}: neither a tokenizer.json of the tokenizers library nor a SentencePiece model"
            ) from None
        if end_of_document not in (None, SPECIAL_TOKENS[END]):
            raise DataError(f"--end-of-document {end_of_document!r}: a SentencePiece model has </s>; leave it out")
        self._id = self._ids()
        self.vocabulary = int(self._id.max()) + 2
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.end_of_document = END
        self.unknown = UNKNOWN
        self.ending = np.array([END, END], dtype=np.uint32)

    def text(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        lines = [list(paragraphs(text)) for text in texts]
        encoded = iter(self._pieces.encode([line for group in lines for line in group], out_type=int))
        return [self._joined([next(encoded) for _ in group]) for group in lines]

    def decode(self, ids: list[int]) -> str:
        """A newline for each `</s>`; other special tokens are left out."""
        back = {int(ours): theirs for theirs, ours in enumerate(self._id)}
        lines: list[list[int]] = [[]]
        for token in ids:
            if token == END:
                lines.append([])
            elif token > UNKNOWN and token in back:
                lines[-1].append(back[token])
        return "\n".join(self._pieces.decode(line) for line in lines).rstrip("\n")

    def special_tokens(self) -> SpecialTokens:
        marked = {int(ours) for theirs, ours in enumerate(self._id) if self._pieces.is_control(theirs)}
        mask = self.vocabulary - 1
        return SpecialTokens(frozenset({BEGIN, PAD, END, UNKNOWN, mask} | marked), mask, BEGIN)

    def _ids(self) -> NDArray[np.uint32]:
        """[pieces]: ours, by the model's."""
        theirs = self._pieces
        known = {theirs.bos_id(): BEGIN, theirs.pad_id(): PAD, theirs.eos_id(): END, theirs.unk_id(): UNKNOWN}
        found, following = [], len(SPECIAL_TOKENS)
        for piece in range(theirs.get_piece_size()):
            if piece in known:
                found.append(known[piece])
            else:
                found.append(following)
                following += 1
        return np.array(found, dtype=np.uint32)

    def _joined(self, lines: list[list[int]]) -> NDArray[np.uint32]:
        ids: list[NDArray[np.uint32]] = []
        for line in lines:
            if line:  # normalisation can leave nothing of one
                ids += [np.array([END], dtype=np.uint32)] if ids else []
                ids.append(self._id[line])
        return np.concatenate(ids) if ids else np.zeros(0, dtype=np.uint32)

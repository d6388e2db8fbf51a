"""GPT-2's byte-level BPE with OPT's special tokens, trained on the corpus, or any tokenizer.json loaded from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import TOKENIZER
from trireme_trainer.data.tokenizer.encoder import MASK_TOKEN, SPECIAL_TOKENS, Encoder, SpecialTokens

MIN_VOCABULARY = len(SPECIAL_TOKENS) + 256 + 1
_END_OF_DOCUMENT = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
_PIECE_CHARS = 1 << 18
MASKS = ("<mask>", "[MASK]", "<|mask|>")
BEGINNINGS = ("<s>", "[CLS]")
"""fairseq's and BERT's first token of every sequence."""


def train(texts: Iterator[str], vocabulary: int) -> str:
    """The JSON of a byte-level BPE of at most `vocabulary` tokens (fewer when the text has no more pairs seen twice).

    The same texts give the same bytes, whatever the number of threads. Raises DataError for a vocabulary that is too
    small to hold the 256 bytes and the special tokens.
    """
    if vocabulary < MIN_VOCABULARY:
        raise DataError(f"--vocabulary {vocabulary}: must be at least {MIN_VOCABULARY} (256 bytes, 5 special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([MASK_TOKEN])
    return tokenizer.to_str(pretty=False)


class JsonEncoder(Encoder):
    """A tokenizer.json of the tokenizers library."""

    file = TOKENIZER

    def __init__(self, json_text: str, where: str, end_of_document: str | None = None) -> None:
        """`where` names the file in errors. Raises DataError when it is no tokenizer or no token ends a document."""
        try:
            self._tokenizer = Tokenizer.from_str(json_text)
        except Exception as error:
            raise DataError(f"{where}: not a tokenizer.json of the tokenizers library ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that happens to spell a special token ("</s>" is also HTML) stays text.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary: int = max(vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(json_text.encode()).hexdigest()
        self.end_of_document = self._end(vocabulary, where, end_of_document)
        self.ending = np.array([self.end_of_document], dtype=np.uint32)
        self._divisible = _cuts_are_safe(self._tokenizer)

    def text(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        pieces: list[str] = []
        counts = []
        for text in texts:
            before = len(pieces)
            pieces.extend(_pieces(text) if self._divisible else [text])
            counts.append(len(pieces) - before)
        encoded = iter(self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
        return [
            np.concatenate([np.array(next(encoded).ids, dtype=np.uint32) for _ in range(count)]) for count in counts
        ]

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    @staticmethod
    def _end(vocabulary: dict[str, int], where: str, given: str | None) -> int:
        for token in (given,) if given is not None else _END_OF_DOCUMENT:
            if token in vocabulary:
                return vocabulary[token]
        if given is not None:
            raise DataError(f"{where}: has no token {given!r}; name one it has with --end-of-document")
        names = ", ".join(_END_OF_DOCUMENT)
        raise DataError(f"{where}: has none of {names}; name the token that ends a document with --end-of-document")


def special_tokens(file: bytes, where: str, end_of_document: int) -> SpecialTokens:
    """Read from the file alone, so that what was prepared before masks were known has them too."""
    try:
        content = json.loads(file)
        marked = [token for token in content.get("added_tokens") or () if token["special"]]
        added = {str(token["content"]): int(token["id"]) for token in marked}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{where}: its tokenizer.json is not of the tokenizers library ({error})") from None
    mask = next((added[name] for name in MASKS if name in added), None)
    if mask is None:
        raise DataError(
            f"{where}: its tokenizer has no mask token ({', '.join(MASKS)}), which objective: masked-lm puts in place "
            "of what it hides; prepare the text again, with --tokenizer FILE that has one, or without: what trireme "
            "prepare trains has one"
        )
    begin = next((added[name] for name in BEGINNINGS if name in added), end_of_document)
    return SpecialTokens(frozenset(added.values()) | {end_of_document}, mask, begin)


def _cuts_are_safe(tokenizer: Tokenizer) -> bool:
    """Whether GPT-2's pattern alone divides the text: it never joins a visible character to white space after it."""
    plain = repr(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True))
    other = repr(pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=True))
    return tokenizer.normalizer is None and repr(tokenizer.pre_tokenizer) in (plain, other)


def _pieces(text: str) -> list[str]:
    """The text in pieces that encode to the same ids as the whole: so that one long document uses all cores."""
    if len(text) <= _PIECE_CHARS:
        return [text]
    pieces, begin = [], 0
    while len(text) - begin > _PIECE_CHARS:
        cut = text.find("\n", begin + _PIECE_CHARS)
        while cut > 0 and not "!" <= text[cut - 1] <= "~":
            cut = text.find("\n", cut + 1)
        if cut < 0:
            break
        pieces.append(text[begin:cut])
        begin = cut
    return [*pieces, text[begin:]]

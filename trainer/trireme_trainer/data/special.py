"""Which ids of a tokenizer stand for no text: read from its file, so that what was prepared before knows them too."""

from __future__ import annotations

import json
from dataclasses import dataclass

from trireme_trainer.data.errors import DataError
from trireme_trainer.data.tokenizer import is_json

MASKS = ("<mask>", "[MASK]", "<|mask|>")
BEGINNINGS = ("<s>", "[CLS]")
"""fairseq's and BERT's first token of every sequence."""


@dataclass(frozen=True)
class SpecialTokens:
    ids: frozenset[int]
    """All of them, those below included."""
    mask: int
    begin: int
    """What a sequence begins with; the end-of-document token where there is none for it."""


def special_tokens(file: bytes, where: str, end_of_document: int) -> SpecialTokens:
    """`file`: a tokenizer.json or a SentencePiece model; `where` names the corpus in errors. Raises DataError where the
    tokenizer has no mask token."""
    if not is_json(file):
        from trireme_trainer.data.sentence_pieces import SentencePieceEncoder

        return SentencePieceEncoder(file, where).special_tokens()
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

"""Byte-level BPE: OPT's special ids, any text back again, the same bytes on any number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.tokenizer import byte_bpe
from trireme_trainer.data.tokenizer.byte_bpe import JsonEncoder, train

TEXTS = [f"The {w} rowed in time, and the {w}s' oars' beat was heard: 'tis {i}.\n" * 3 for i, w in enumerate(
    ["trireme", "rower", "galley", "Größe", "κωπηλάτης", "captain", "rank", "hull"]
)]
JSON = train(iter(TEXTS), 400)


def test_special_tokens_have_opts_ids_and_bytes_follow() -> None:
    trained = json.loads(JSON)
    vocabulary = trained["model"]["vocab"]
    assert [vocabulary[t] for t in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert 260 < len(vocabulary) < 400
    last = trained["added_tokens"][-1]
    assert (last["content"], last["id"], last["special"]) == ("<mask>", len(vocabulary), True)
    encoder = JsonEncoder(JSON, "here")
    assert (encoder.vocabulary, encoder.end_of_document, encoder.dtype) == (len(vocabulary) + 1, 2, "uint16")


@settings(max_examples=100)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    encoder = JsonEncoder(JSON, "here")
    [ids] = encoder.encode([text])
    assert ids[-1] == 2
    assert 2 not in ids[:-1]
    assert encoder.decode(ids[:-1].tolist()) == text


def test_text_that_spells_a_special_token_stays_text() -> None:
    [ids] = JsonEncoder(JSON, "here").encode(["<p>a</s><pad><mask></p>"])
    assert (ids[:-1] > 3).all()
    assert ids.max() < JsonEncoder(JSON, "here").vocabulary - 1
    assert JsonEncoder(JSON, "here").decode(ids.tolist()) == "<p>a</s><pad><mask></p>"


@settings(max_examples=100)
@given(st.text(alphabet=st.sampled_from("ab'sé1 !\n\r\t\u00a0\u2028\x1c"), min_size=10, max_size=200))
def test_long_documents_in_pieces_encode_as_a_whole(text: str) -> None:
    encoder = JsonEncoder(JSON, "here")
    assert encoder._divisible
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_bpe, "_PIECE_CHARS", 5)
        [pieces] = encoder.encode([text])
    encoder._divisible = False
    [whole] = encoder.encode([text])
    assert np.array_equal(pieces, whole)


def test_long_documents_are_really_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_bpe, "_PIECE_CHARS", 40)
    pieces = byte_bpe._pieces("".join(TEXTS))
    assert len(pieces) > 10
    assert "".join(pieces) == "".join(TEXTS)


def test_training_gives_the_same_bytes_on_any_number_of_threads() -> None:
    script = (
        "import hashlib, sys; from trireme_trainer.data.tokenizer.byte_bpe import train\n"
        "texts = [''.join(chr(97 + (i * j) % 23) + ' ' * (j % 4 == 0) for j in range(300)) for i in range(200)]\n"
        "print(hashlib.sha256(train(iter(texts), 600).encode()).hexdigest())"
    )
    found = set()
    for threads in ("1", "2", "5"):
        env = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        found.add(subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True).stdout)
    assert len(found) == 1


def _foreign(special: list[str]) -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    made.enable_truncation(4)
    made.enable_padding()
    return made.to_str()


def test_a_loaded_tokenizer_finds_its_end_of_document() -> None:
    encoder = JsonEncoder(_foreign(["<|endoftext|>"]), "here")
    assert encoder.end_of_document == 0
    assert not encoder._divisible, "cuts would gain a space"
    long, short = encoder.encode(["the rower and the rank of the hull", "x"])
    assert len(long) > 5, "truncation in the file does not apply"
    assert len(short) < len(long), "nor does padding"
    with pytest.raises(DataError, match=r"here: has none of </s>, .*; name the token that ends a document with --end"):
        JsonEncoder(_foreign(["[SEP]"]), "here")
    assert JsonEncoder(_foreign(["[CLS]", "[SEP]"]), "here", "[SEP]").end_of_document == 1
    with pytest.raises(DataError, match=r"has no token '\[END\]'"):
        JsonEncoder(_foreign(["[SEP]"]), "here", "[END]")


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"model": {"type": "WordLevel"}}'])
def test_what_is_no_tokenizer_is_named(text: str) -> None:
    with pytest.raises(DataError, match=r"some/file: not a tokenizer.json of the tokenizers library"):
        JsonEncoder(text, "some/file")


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"--vocabulary 260: must be at least 261"):
        train(iter(TEXTS), 260)

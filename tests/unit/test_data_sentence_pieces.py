"""SentencePiece: fairseq's ids and newlines, all text written, the same bytes each time, wrong files named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from click.testing import CliRunner
from trireme_api.recipe import DataSource
from trireme_cli.prepare import prepare as command
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.data.prepare import Options, prepare
from trireme_trainer.data.tokenizer import Encoder, open_encoder, special_tokens
from trireme_trainer.data.tokenizer.sentence_pieces import SentencePieceEncoder, train
from trireme_trainer.evaluation.prompts import encode

WORDS = ["trireme", "rower", "galley", "Größe", "κωπηλάτης", "капитан", "櫂", "hull"]
TEXTS = [f"The {w} rowed in time.\nThe {w}s' oars' beat was heard: 'tis {i}.\n\n\nEnd of {w}." for i, w in
         enumerate(WORDS * 4)]  # fmt: skip
MODEL = train(iter(TEXTS), 400)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return open_encoder(MODEL, "here")


def test_the_same_texts_give_the_same_bytes() -> None:
    assert train(iter(TEXTS), 400) == MODEL


def test_ids_are_fairseqs(encoder: Encoder) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
    assert (theirs.unk_id(), theirs.bos_id(), theirs.eos_id(), theirs.pad_id()) == (0, 1, 2, -1)
    [ids] = encoder.text(["The rower rowed"])
    assert ids.tolist() == [piece + 1 for piece in theirs.encode("The rower rowed")], "one further on, for <pad>"
    assert encoder.vocabulary == theirs.get_piece_size() + 2 <= 400
    special = special_tokens(MODEL, "here", 2)
    assert (special.begin, special.mask) == (0, encoder.vocabulary - 1), "<mask> is last, as in XLM-R's dictionary"
    assert special.ids == {0, 1, 2, 3, special.mask}
    assert encoder.end_of_document == 2


def test_a_model_with_ids_of_its_own_gets_the_same_ones() -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.split("\n")), model_writer=out, vocab_size=120,
        hard_vocab_limit=False, unk_id=2, bos_id=-1, eos_id=1, pad_id=0, control_symbols=["<ctrl>"], minloglevel=2,
    )  # fmt: skip
    other = open_encoder(out.getvalue(), "here")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    [ids] = other.text(["The rower 櫓"])
    assert ids[-1] == 3, "what the model does not know is <unk>"
    assert [theirs.id_to_piece(int(i) - 1) for i in ids[:-1]] == theirs.encode("The rower 櫓", out_type=str)[:-1]
    assert other.vocabulary == theirs.get_piece_size() + 2
    control = theirs.piece_to_id("<ctrl>") + 1
    assert control in special_tokens(out.getvalue(), "here", 2).ids


def test_newlines_become_ends_of_sentences_and_a_document_ends_with_two(encoder: Encoder) -> None:
    one, two = encoder.text(["The rower", "The hull"])
    [ids] = encoder.encode(["The rower\n \r\n\n\nThe hull\n"])
    assert ids.tolist() == [*one, 2, *two, 2, 2]
    assert encoder.decode(ids.tolist()) == "The rower\nThe hull"
    assert encoder.encode(["\n\n"])[0].tolist() == [2, 2]
    [spelt] = encoder.text(["a</s>b <mask>"])
    assert not set(spelt.tolist()) & {0, 1, 2, 3, encoder.vocabulary - 1}, "text that spells a token stays text"


def test_prompts_have_a_separator_where_the_text_has_a_newline(encoder: Encoder) -> None:
    (request,), _ = encode([("The rower\n", "The hull")], encoder, 64, True)
    one, two = encoder.text(["The rower", "The hull"])
    assert request.tokens.tolist() == [2, *one, 2, *two]
    assert request.scored == 1 + len(two), "the newline goes with what follows"


def test_any_text_comes_back_up_to_normalisation(encoder: Encoder) -> None:
    text = "Unseen ⠓⠑⠇⠇⠕ 𓀀 ñandú"
    [ids] = encoder.text([text])
    assert 3 not in ids, "bytes, not <unk>"
    assert encoder.decode(ids.tolist()) == text
    assert encoder.decode(encoder.text(["ﬁve  ２"])[0].tolist()) == "five 2", "NFKC"


@pytest.mark.parametrize("content", [b"", b"garbage", b"version https://git-lfs.github.com/spec/v1\n", MODEL[:999]])
def test_what_is_no_model_is_named(content: bytes) -> None:
    says = r"some/file: neither a tokenizer.json of the tokenizers library nor a SentencePiece model"
    with pytest.raises(DataError, match=says):
        open_encoder(content, "some/file")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match=r"--vocabulary 262: no SentencePiece model of it \(Vocabulary size is smaller"):
        train(iter(TEXTS), 262)
    with pytest.raises(DataError, match=r"--end-of-document '<eos>': a SentencePiece model has </s>; leave it out"):
        SentencePieceEncoder(MODEL, "here", "<eos>")


def folder(tmp_path: Path, texts: list[str]) -> Path:
    (tmp_path / "texts").mkdir(parents=True)
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(text)
    return tmp_path / "texts"


def test_a_corpus_of_a_language_and_another_with_its_tokenizer(tmp_path: Path) -> None:
    one = prepare(
        [str(folder(tmp_path / "a", TEXTS))], str(tmp_path / "one"),
        Options(vocabulary=400, train_tokenizer="sentencepiece", language="en"),
    )  # fmt: skip
    manifest = one.manifest
    assert (manifest.language, manifest.tokenizer.file, manifest.tokenizer.unknown_tokens) == (
        "en", "tokenizer.model", 0)  # fmt: skip
    model = tmp_path / "one" / "tokenizer.model"
    other = folder(tmp_path / "b", [text.replace("The", "Das") for text in TEXTS])
    two = prepare([str(other)], str(tmp_path / "two"), Options(tokenizer=str(model), language="de"))
    assert two.manifest.tokenizer.sha256 == manifest.tokenizer.sha256
    mixture = Mixture([DataSource(path=str(tmp_path / name)) for name in ("one", "two")], 16, seed=1)
    assert mixture.vocabulary_size == manifest.vocabulary
    assert mixture.special_tokens().mask == manifest.vocabulary - 1
    assert sum(np.count_nonzero(mixture.sample(i) == 2) for i in range(20)) > 10, "ends of lines"
    again = prepare([str(other)], str(tmp_path / "two"), Options(tokenizer=str(model), language="de"))
    assert not again.fresh
    with pytest.raises(DataError, match="holds a corpus made from other input or options"):
        prepare([str(other)], str(tmp_path / "two"), Options(tokenizer=str(model), language="nl"))


def test_the_command(tmp_path: Path) -> None:
    texts, runner = str(folder(tmp_path, TEXTS)), CliRunner()
    made = runner.invoke(
        command, [texts, "-o", str(tmp_path / "sp"), "--train-tokenizer", "sentencepiece", "--vocabulary", "400",
                  "--language", "en", "--json"])  # fmt: skip
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["language"] == "en"
    wrong = tmp_path / "wrong.model"
    wrong.write_bytes(b"\0" * 30)
    for options, says in (
        (["--tokenizer", str(wrong)], f"--tokenizer {wrong}: neither a tokenizer.json"),
        (["--tokenizer", str(wrong), "--train-tokenizer", "sentencepiece"], "--tokenizer is given, so none is trained"),
        (["--language", "s w"], "--language 's w': must be a tag such as sw, pt-BR or zh_Hans"),
    ):
        refused = runner.invoke(command, [texts, "-o", str(tmp_path / "no"), *options])
        assert refused.exit_code == 65
        assert says in refused.output
        assert not (tmp_path / "no").exists() or not list((tmp_path / "no").glob("*.tokens"))

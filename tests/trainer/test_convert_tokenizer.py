"""Weights of Transformers come with their own tokenizer: kept with the checkpoint, used by evaluation, given back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from gang import Gang
from transformers import XLMRobertaTokenizer
from trireme_api.families import ModelConfig, resolve
from trireme_api.protocol import ExitCode
from trireme_api.recipe import ModelSpec
from trireme_api.schema import InvalidSpec
from trireme_cli.convert import convert
from trireme_cli.evaluate import evaluate
from trireme_cli.local_plan import Options, plan_recipe
from trireme_trainer.data.prepare import Options as Preparation
from trireme_trainer.data.prepare import prepare
from trireme_trainer.data.tokenizer import Encoder, open_encoder, sentence_pieces
from trireme_trainer.families import build
from trireme_trainer.families.convert import directory
from trireme_trainer.layers.init import full_value

LICENSE = Path(__file__).parents[2] / "LICENSE"
MODEL = sentence_pieces.train(iter([LICENSE.read_text()]), 400)
ENCODER: Encoder = open_encoder(MODEL, "here")
SMALL = {"dropout": 0.0, "attentionDropout": 0.0, "width": 32, "maximumPositions": 64}


def run(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def config_of(preset: str, rows: int = ENCODER.vocabulary) -> ModelConfig:
    return resolve(ModelSpec(preset=preset, overrides={**SMALL, "vocabularySize": rows}))


def hugging_face(path: Path, preset: str, rows: int = ENCODER.vocabulary) -> Path:
    """As a published model's directory: its SentencePiece model, and a tokenizer.json that is not to be taken."""
    config = config_of(preset, rows)
    model = build(config)
    names = dict(model.named_parameters())
    weights = {n: full_value(n, tuple(w.shape), model.initial_value(n), 1) for n, w in names.items()}
    directory.save(path, config, weights)
    (path / "sentencepiece.bpe.model").write_bytes(MODEL)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One text, with the model's tokenizer and with another."""
    root = tmp_path_factory.mktemp("corpora")
    (root / "own.model").write_bytes(MODEL)
    options: dict[str, Any] = {"separator": "blank-line", "valid_fraction": 0.2}
    prepare([str(LICENSE)], str(root / "own"), Preparation(tokenizer=str(root / "own.model"), **options))
    prepare([str(LICENSE)], str(root / "other"), Preparation(vocabulary=300, **options))
    return root / "own", root / "other"


def imported(tmp_path: Path, preset: str) -> tuple[Path, Path, dict[str, Any]]:
    theirs, ours = hugging_face(tmp_path / "hf", preset), tmp_path / "checkpoints"
    result = run(convert, "--to", "checkpoint", theirs, ours, "--pad-vocabulary", 16, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["tokenizer"] == str(ours / "tokenizer.model")
    assert (ours / "tokenizer.model").read_bytes() == MODEL
    return theirs, ours, told


def test_xglm_is_evaluated_with_its_own_tokenizer_and_goes_back(tmp_path: Path, corpora: tuple[Path, Path]) -> None:
    theirs, ours, _ = imported(tmp_path, "xglm-tiny")
    task = tmp_path / "task.yaml"
    example = {"text": "the terms of", "word": "the License"}
    spec = {"name": "t", "examples": [example], "context": "{text}", "continuation": " {word}"}
    task.write_text(yaml.safe_dump(spec))
    found = []
    for model in (theirs, ours):
        result = run(evaluate, model, "--task", task, "--data", corpora[0], "--json")
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout))
    # Theirs has no rows of padding, which take a share of the probability.
    assert 0 < found[0]["heldOut"][0]["loss"] <= found[1]["heldOut"][0]["loss"]
    assert found[0]["tasks"][0]["perplexity"] == pytest.approx(found[1]["tasks"][0]["perplexity"], rel=0.2)
    refused = run(evaluate, ours, "--data", corpora[1])
    assert refused.exit_code == ExitCode.BAD_DATA
    assert "made with another tokenizer than the model's" in refused.output
    back = run(convert, "--to", "hf", ours, tmp_path / "back", "--vocabulary", ENCODER.vocabulary)
    assert back.exit_code == 0, back.output
    words = XLMRobertaTokenizer.from_pretrained(tmp_path / "back")
    text = "the terms of the License"
    assert words(text, add_special_tokens=False)["input_ids"] == ENCODER.text([text])[0].tolist()


def test_xlmr_is_measured_and_trains_on_with_its_own_tokenizer_alone(
    tmp_path: Path, corpora: tuple[Path, Path]
) -> None:
    _, ours, told = imported(tmp_path, "xlmr-tiny")
    result = run(evaluate, ours, "--data", corpora[0], "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["heldOut"][0]["tokens"] > 0
    for corpus, fits in zip(corpora, (True, False), strict=True):
        recipe = {
            "model": told["model"], "objective": "masked-lm", "precision": "fp32", "until": {"steps": 1},
            "data": {"sources": [{"path": str(corpus)}], "sequenceLength": 32}, "batch": {"tokens": 64},
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        options = Options(nproc=1, checkpoint=str(ours), directory=tmp_path / "run")
        if fits:
            plan_recipe(path, options, {}).scratch.cleanup()
            continue
        with pytest.raises(InvalidSpec, match=r"^data.sources\[0\].path: made with another tokenizer than the weights"):
            plan_recipe(path, options, {})
        gang = Gang(tmp_path, recipe).run(expect=int(ExitCode.BAD_DATA))
        assert "made with another tokenizer than the weights of" in gang.logs()


@pytest.mark.parametrize(
    ("preset", "rows", "says"),
    [
        ("xglm-tiny", ENCODER.vocabulary - 40, "entries, the model's token table"),
        ("opt-tiny", ENCODER.vocabulary, "SentencePiece models with fairseq's ids for xglm and xlmr, not for opt"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_one_line(tmp_path: Path, preset: str, rows: int, says: str) -> None:
    theirs = hugging_face(tmp_path / "hf", preset, rows)
    result = run(convert, "--to", "checkpoint", theirs, tmp_path / "out", "--pad-vocabulary", 1)
    if preset == "opt-tiny":
        assert result.exit_code == 0, result.output
        result = run(convert, "--to", "hf", tmp_path / "out", tmp_path / "back")
    assert result.exit_code == ExitCode.BAD_DATA
    assert says in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / ("back" if preset == "opt-tiny" else "out")).exists()

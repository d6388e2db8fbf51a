"""Masked language models are evaluated on held-out text: the same tokens hidden each time, alike in any world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from gang import SEQUENCE, Gang, make_recipe
from reference import fresh_model
from transformers import XLMRobertaXLForMaskedLM
from trireme_api.families import check_recipe
from trireme_api.masking import MaskingSpec
from trireme_api.protocol import ExitCode
from trireme_api.recipe import Recipe
from trireme_cli.evaluate import evaluate
from trireme_trainer.data.order import derive
from trireme_trainer.data.prepare import Options, prepare
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.families.convert import directory
from trireme_trainer.objectives.masked_lm import MaskedTokens
from trireme_trainer.parallel.world import World

SMALL = {
    "dropout": 0.0, "attentionDropout": 0.0, "maximumPositions": SEQUENCE, "width": 32, "vocabularySize": 384,
}  # fmt: skip
LICENSE = Path(__file__).parents[2] / "LICENSE"
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One text twice, as two languages; nothing held out of a third."""
    root = tmp_path_factory.mktemp("corpora")
    options = {"vocabulary": 384, "separator": "blank-line"}
    prepare([str(LICENSE)], str(root / "en"), Options(language="en", valid_fraction=0.3, **options))  # type: ignore[arg-type]
    tokenizer = str(root / "en" / "tokenizer.json")
    for name, share in (("nl", 0.2), ("none", 0.0)):
        prepare(
            [str(LICENSE)], str(root / name),
            Options(language=name, valid_fraction=share, tokenizer=tokenizer, separator="blank-line"),
        )  # fmt: skip
    return root / "en", root / "nl"


def masked(corpora: tuple[Path, ...], evaluation: dict[str, Any] | None, steps: int = 2) -> dict[str, Any]:
    return make_recipe(
        corpora[0], steps=steps, model={"preset": "xlmr-tiny", "overrides": SMALL}, objective="masked-lm",
        data={"sources": [{"path": str(path)} for path in corpora], "sequenceLength": SEQUENCE},
        **({"evaluation": evaluation} if evaluation is not None else {}),
    )  # fmt: skip


def test_losses_are_those_of_the_hidden_tokens(corpora: tuple[Path, Path]) -> None:
    recipe = masked(corpora, {"sequences": 3})
    spec, model = Recipe.model_validate(recipe), fresh_model(recipe)
    objective = MaskedTokens(spec, check_recipe(spec), ALONE, None)
    beats: list[int] = []
    rows = objective.evaluate(model, lambda: beats.append(1))["heldOut"]
    assert [(row["source"], row["language"]) for row in rows] == [
        ("en", "en"), ("nl", "nl"), (None, "en"), (None, "nl")]  # fmt: skip
    assert rows == objective.evaluate(model, lambda: None)["heldOut"], "the same tokens hidden again"
    assert model.training
    text = objective.samples
    for source, row in enumerate(rows[:2]):
        words = text.held_out[source].words
        assert len(words) % 3, "the last batch is not full"
        total, count = 0.0, 0
        for block in range(len(words)):
            key = derive(derive(spec.seed, 4), source, block)
            tokens, seen, places = text.blocks.sample(words[block], key)
            with torch.no_grad():
                logits = model.eval()(torch.from_numpy(seen)[None])[0, places].double()
            total += float(F.cross_entropy(logits, torch.from_numpy(tokens[places]), reduction="sum"))
            count += len(places)
        model.train()
        assert row["tokens"] == count
        assert row["loss"] == pytest.approx(total / count, abs=1e-5)
    limited = masked(corpora, {"tokens": 2 * SEQUENCE})
    spec = Recipe.model_validate(limited)
    fewer = MaskedTokens(spec, check_recipe(spec), ALONE, None).evaluate(model, lambda: None)["heldOut"]
    assert 0 < fewer[0]["tokens"] <= 2 * (0.15 * SEQUENCE + 1)


def test_training_tells_it_alike_in_any_world(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    plain = Gang(tmp_path / "plain", masked(corpora, None), checkpoint=False).run()
    gangs = [
        Gang(tmp_path / str(world), masked(corpora, {"everySteps": 1}), world, checkpoint=False).run()
        for world in (1, 2)
    ]
    one, two = (gang.events("evaluation") for gang in gangs)
    assert [event["step"] for event in one] == [event["step"] for event in two] == [1, 2]
    for mine, other in zip(one, two, strict=True):
        for a, b in zip(mine["heldOut"], other["heldOut"], strict=True):
            assert a["tokens"] == b["tokens"]
            assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)
    assert gangs[0].losses() == plain.losses(), "evaluation leaves no trace in training"
    (data,) = gangs[0].events("data")
    assert [row["language"] for row in data["sources"]] == ["en", "nl"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(corpora: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Gang:
    """Masked by another rule than the default."""
    recipe = {**masked(corpora, {}), "masking": {"share": 0.3, "keep": 0.0}}
    return Gang(tmp_path_factory.mktemp("trained"), recipe).run()


def test_the_command_measures_what_training_did(trained: Gang, corpora: tuple[Path, Path]) -> None:
    """The rule is the checkpoint's; same seed, same order of sources, same tokens hidden."""
    data = [argument for path in corpora for argument in ("--data", path)]
    result = run(trained.checkpoints, *data, "--length", SEQUENCE, "--seed", 7, "--sequences", 5, "--json")
    assert result.exit_code == 0, result.output
    told, (event,) = json.loads(result.stdout), trained.events("evaluation")
    assert (told["family"], told["step"], told["tasks"]) == ("xlmr", 2, [])
    assert told["masking"] == {"share": 0.3, "random": 0.1, "keep": 0.0}
    assert len(told["heldOut"]) == 4
    for mine, theirs in zip(told["heldOut"], event["heldOut"], strict=True):
        assert {name: mine[name] for name in ("source", "language", "tokens")} == {
            name: theirs[name] for name in ("source", "language", "tokens")}  # fmt: skip
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-6)
    other = json.loads(run(trained.checkpoints, *data, "--length", SEQUENCE, "--json").stdout)
    assert other["heldOut"][0]["loss"] != told["heldOut"][0]["loss"], "another seed hides others"
    few = run(trained.checkpoints, "--data", f"fr={corpora[0]}", "--tokens", 3 * SEQUENCE, "--split", "train")
    assert few.exit_code == 0, few.output
    assert "all of language fr: perplexity" in few.stdout
    assert "hidden tokens" in few.stdout


def test_a_model_of_transformers_is_measured_by_the_default_rule(corpora: tuple[Path, Path], tmp_path: Path) -> None:
    """Its own logits, in float64, of the same hidden tokens."""
    recipe = masked(corpora, {"sequences": 3})
    spec = Recipe.model_validate(recipe)
    config, model = check_recipe(spec), fresh_model(recipe)
    directory.save(tmp_path / "hf", config, dict(model.state_dict()), vocabulary_size=384)
    (tmp_path / "hf" / "tokenizer.json").write_bytes((corpora[0] / "tokenizer.json").read_bytes())
    arguments = ("--data", corpora[1], "--length", SEQUENCE, "--json")
    result = run(tmp_path / "hf", *arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["masking"] == MaskingSpec().model_dump()
    theirs = XLMRobertaXLForMaskedLM.from_pretrained(tmp_path / "hf").double().eval()
    text = MaskedTokens(spec, config, ALONE, None).samples
    total, count = 0.0, 0
    words = text.held_out[1].words
    for block in range(len(words)):
        tokens, seen, places = text.blocks.sample(words[block], derive(derive(1, 4), 0, block))
        with torch.no_grad():
            logits = theirs(input_ids=torch.from_numpy(seen)[None], attention_mask=torch.ones(1, len(seen))).logits
        total += float(F.cross_entropy(logits[0, places], torch.from_numpy(tokens[places]), reduction="sum"))
        count += len(places)
    assert told["heldOut"][0]["tokens"] == count
    assert told["heldOut"][0]["loss"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--task", "x.yaml"), "xlmr sees both sides of a token, so a continuation has no likelihood of its own;"),
        (("--data", "{en}", "--length", "2"), "--length 2: a masked model needs blocks of 3 tokens at least"),
        (("--data", "{none}", "--length", "9"), "its split valid has 0 tokens, less than one block of 8; give"),
        ((), "is not of objective few-shot; give --data DIR"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    trained: Gang, corpora: tuple[Path, Path], arguments: tuple[str, ...], says: str
) -> None:
    places = {"en": corpora[0], "none": corpora[0].parent / "none"}
    result = run(trained.checkpoints, *(text.format(**places) for text in arguments))
    assert result.exit_code == ExitCode.BAD_DATA, result.output
    assert says in result.output
    assert result.output.count("\n") == 1


def test_nothing_held_out_is_said_before_training(corpora: tuple[Path, Path]) -> None:
    spec = Recipe.model_validate(masked((corpora[0].parent / "none",), {}))
    with pytest.raises(EvaluationError, match=r"evaluation.heldOut: none of data.sources holds out a block"):
        MaskedTokens(spec, check_recipe(spec), ALONE, None)

"""Masked language models are evaluated on held-out text: the same tokens hidden each time, alike in any world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gang import SEQUENCE, Gang, make_recipe
from reference import fresh_model
from trireme_api.families import check_recipe
from trireme_api.recipe import Recipe
from trireme_trainer.data.prepare import Options, prepare
from trireme_trainer.evaluation.errors import EvaluationError
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
        blocks = len(text.mixture.valid_blocks(source))
        assert blocks % 3, "the last batch is not full"
        total, count = 0.0, 0
        for block in range(blocks):
            tokens, seen, places = text.held_out(source, block)
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


def test_nothing_held_out_is_said_before_training(corpora: tuple[Path, Path]) -> None:
    spec = Recipe.model_validate(masked((corpora[0].parent / "none",), {}))
    with pytest.raises(EvaluationError, match=r"evaluation.heldOut: none of data.sources holds out a block"):
        MaskedTokens(spec, check_recipe(spec), ALONE, None)

"""Mixtures of languages: XGLM's table from its token counts, XLM-R's temperature, and what is refused by which name."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from data_corpus import numbered, write_corpus
from pydantic import ValidationError
from trireme_api.mixture import MixtureSpec, weights
from trireme_api.recipe import DataSource, Recipe
from trireme_api.schema import InvalidSpec, problems
from trireme_cli.local_plan import Options, plan_recipe
from trireme_cli.validate import validate
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.mixture import Mixture

# XGLM's model card: language, billions of tokens, share after up-sampling as printed.
CARD = """en 803.5 .3259|ru 147.8 .0602|zh 132.8 .0483|de 89.2 .0363|es 87.3 .0353|fr 77.4 .0313|ja 66.1 .0269
it 41.9 .0171|pt 36.6 .0297|el 28.8 .0233|ko 20.0 .0811|fi 16.8 .0681|id 15.4 .0125|tr 12.4 .0101|ar 12.2 .0099
vi 11.2 .0091|th 10.8 .0440|bg 9.7 .0393|ca 7.1 .0287|hi 3.45 .0140|et 3.29 .0133|bn 1.63 .0066|ta 1.48 .0060
ur 1.35 .0055|sw .91 .0037|te .69 .0028|eu .105 .0043|my .101 .0030|ht .087 .0035|qu .0032 .0001"""
TWICE, TEN, HUNDRED = "pt el id tr ar vi", "ko fi th bg ca hi et bn ta ur sw te", "eu ht"
PLATEAUS = {"zh": 0.9, "my": 73.0, "qu": 76.0} | {
    language: times for names, times in ((TWICE, 2.0), (TEN, 10.0), (HUNDRED, 100.0)) for language in names.split()
}


def test_xglms_table_follows_from_its_plateaus() -> None:
    rows = [row.split() for line in CARD.splitlines() for row in line.split("|")]
    assert len(rows) == 30
    languages, tokens = [row[0] for row in rows], [round(float(row[1]) * 1e9) for row in rows]
    found = weights(MixtureSpec(upsample=PLATEAUS), languages, tokens)
    for (language, _, printed), weight in zip(rows, found, strict=True):
        assert weight / sum(found) == pytest.approx(float(printed), abs=1e-3), language
    # No power of the counts gives that table: Korean has fewer tokens than Greek, and three times its share.
    by_power = weights(MixtureSpec(alpha=0.7), languages, tokens)
    assert by_power[languages.index("ko")] < by_power[languages.index("el")]
    assert found[languages.index("ko")] > 3 * found[languages.index("el")]


def test_xlmrs_temperature() -> None:
    one = weights(MixtureSpec(alpha=0.3), ["a", "b"], [900, 100])
    assert [weight / sum(one) for weight in one] == pytest.approx([0.659, 0.341], abs=5e-4)
    assert weights(MixtureSpec(alpha=0), ["a", "b"], [900, 100]) == [1, 1]
    same = weights(MixtureSpec(alpha=1), ["a", "b"], [900, 100])
    assert same == pytest.approx([0.9, 0.1])


def test_sources_of_one_language_share_by_their_tokens_and_one_without_is_by_itself() -> None:
    found = weights(MixtureSpec(alpha=0.5), ["a", "b", "a", None, None], [300, 400, 100, 400, 400])
    assert found[0] == pytest.approx(3 * found[2])
    assert found[0] + found[2] == pytest.approx(found[1])
    assert found[3] == found[4] == found[1]
    assert weights(MixtureSpec(upsample={"a": 3}), ["a", "b", "a", None], [10, 20, 30, 40]) == [30, 20, 90, 40]


RECIPE: dict[str, Any] = {
    "model": {"preset": "xglm-tiny", "overrides": {"vocabularySize": 1000}},
    "data": {"sources": [{"path": "a", "language": "en"}, {"path": "b", "language": "sw"}], "sequenceLength": 7},
    "batch": {"tokens": 70},
    "until": {"steps": 10},
}


@pytest.mark.parametrize(
    ("mixture", "says"),
    [
        ({}, "data.mixture: give either alpha or upsample"),
        ({"alpha": 0.3, "upsample": {"sw": 10}}, "data.mixture: give either alpha or upsample"),
        ({"alpha": 1.5}, "data.mixture.alpha: Input should be less than or equal to 1 (got 1.5)"),
        ({"upsample": {"sw": 0}}, "data.mixture.upsample.sw: Input should be greater than 0 (got 0)"),
        (
            {"upsample": {"te": 10}},
            "data.mixture.upsample.te: no source has this language, they have en, sw; set the language of one, or "
            "prepare it with --language te",
        ),
        ({"temperature": 0.3}, "data.mixture.temperature: unknown field; remove it"),
    ],
)
def test_a_mixture_that_cannot_be_is_told_in_one_line(mixture: dict[str, Any], says: str) -> None:
    recipe = copy.deepcopy(RECIPE)
    recipe["data"]["mixture"] = mixture
    with pytest.raises(ValidationError) as refused:
        Recipe.model_validate(recipe)
    assert [str(problem) for problem in problems(refused.value)] == [says]


def test_weights_and_a_mixture_exclude_each_other() -> None:
    recipe = copy.deepcopy(RECIPE)
    recipe["data"] |= {"mixture": {"alpha": 0.3}}
    recipe["data"]["sources"][1]["weight"] = 2.0
    with pytest.raises(ValidationError, match=r"data.sources\[1\].weight: data.mixture sets the shares; .* \(got 2\)"):
        Recipe.model_validate(recipe)
    recipe["data"]["sources"][1]["weight"] = 1.0
    # A recipe goes to its ranks as JSON with the defaults written out.
    assert Recipe.model_validate(Recipe.model_validate(recipe).model_dump(by_alias=True, exclude_none=True))


def corpora(tmp_path: Path) -> tuple[str, str]:
    large = write_corpus(tmp_path / "en", numbered([50] * 12, first=10), language="en")
    small = write_corpus(tmp_path / "sw", numbered([30] * 2, first=700), language="sw")
    return large, small


def mixture_of(large: str, small: str, spec: MixtureSpec | None, language: str | None = None) -> Mixture:
    sources = [DataSource(path=large, language=language), DataSource(path=small)]
    return Mixture(sources, 7, seed=1, spec=spec)


def test_blocks_come_in_the_shares_that_are_told(tmp_path: Path) -> None:
    mixture = mixture_of(*corpora(tmp_path), MixtureSpec(upsample={"sw": 10}))
    rows = mixture.told(220)
    assert [row["language"] for row in rows] == ["en", "sw"], "as the manifests have them"
    assert [row["share"] for row in rows] == [0.5, 0.5], "600 tokens, and ten times 60"
    assert [row["epochs"] for row in rows] == [round(110 / 75, 4), round(110 / 7, 4)]
    assert Counter(mixture.locate(i)[0] for i in range(220)) == {0: 110, 1: 110}
    tempered = mixture_of(*corpora(tmp_path / "again"), MixtureSpec(alpha=0.3))
    shares = [row["share"] for row in tempered.told(100)]
    expected = 600**0.3 / (600**0.3 + 60**0.3)
    assert shares == pytest.approx([expected, 1 - expected], abs=2 / 65536)
    counts = Counter(tempered.locate(i)[0] for i in range(65536))
    assert [counts[0] / 65536, counts[1] / 65536] == pytest.approx(shares, abs=1e-6)


def test_another_mixture_is_another_order_and_is_named(tmp_path: Path) -> None:
    large, small = corpora(tmp_path)
    weighted = mixture_of(large, small, None)
    tempered = mixture_of(large, small, MixtureSpec(alpha=0.3))
    saved = json.loads(json.dumps(tempered.identity))
    assert mixture_of(large, small, MixtureSpec(alpha=0.3)).changes_since(saved) == []
    changes = mixture_of(large, small, MixtureSpec(alpha=0.4)).changes_since(saved)
    assert len(changes) == 2
    assert changes[0].startswith("data.mixture: the weight of data.sources[0] was ")
    assert weighted.changes_since(saved)
    assert weighted.fingerprint != tempered.fingerprint


def test_a_language_that_is_not_the_corpuss_is_refused(tmp_path: Path) -> None:
    large, small = corpora(tmp_path)
    with pytest.raises(DataError, match=r"data.sources\[0\].language: is de, but .*en was prepared as en; correct it"):
        mixture_of(large, small, None, "de")
    with pytest.raises(DataError, match=r"data.mixture.upsample.te: no source has this language, they have en, sw"):
        mixture_of(large, small, MixtureSpec(upsample={"te": 10}))


def recipe_file(tmp_path: Path, mixture: dict[str, Any], rows: int = 1000) -> Path:
    large, small = corpora(tmp_path / f"corpora-{len(list(tmp_path.iterdir()))}")
    recipe = copy.deepcopy(RECIPE)
    recipe["model"]["overrides"]["vocabularySize"] = rows
    recipe["data"] |= {"sources": [{"path": large}, {"path": small}], "mixture": mixture}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def test_validate_tells_shares_and_epochs_of_what_is_here(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, {"upsample": {"sw": 10}})
    told = CliRunner().invoke(validate, [str(path)], standalone_mode=False)
    assert told.return_value == 0
    assert "(en): 0.5000 of the blocks, 0.67 epochs" in told.output
    as_json = json.loads(CliRunner().invoke(validate, [str(path), "--json"], standalone_mode=False).output)
    assert [row["epochs"] for row in as_json[0]["sources"]] == [0.6667, 7.1429]
    path = recipe_file(tmp_path, {"upsample": {"te": 10}})
    told = CliRunner().invoke(validate, [str(path)], standalone_mode=False)
    assert told.return_value == 64
    assert "data.mixture.upsample.te: no source has this language" in told.output


def test_a_vocabulary_the_model_has_no_rows_for_is_told_before_anything_starts(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, {"alpha": 0.3}, rows=999)
    says = r"data.sources\[0\].path: .*en is tokenised with 1000 entries, the model has 999; set model.overrides"
    with pytest.raises(InvalidSpec, match=says):
        plan_recipe(path, Options(nproc=1, directory=tmp_path / "run"), {})
    assert not (tmp_path / "run").exists()
    plan = plan_recipe(recipe_file(tmp_path, {"alpha": 0.3}), Options(nproc=1, directory=tmp_path / "run"), {})
    plan.scratch.cleanup()


def test_corpora_behind_a_claim_are_looked_at_where_the_claim_is(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, {"alpha": 0.3}, rows=999)
    recipe = json.loads(path.read_text())
    folder = Path(recipe["data"]["sources"][0]["path"]).parent
    recipe["data"]["sources"] = [{"path": "pvc://texts/en"}, {"path": "pvc://texts/sw"}]
    path.write_text(json.dumps(recipe))
    with pytest.raises(InvalidSpec, match=r"pvc://texts/en is tokenised with 1000 entries"):
        plan_recipe(path, Options(nproc=1, claims={"texts": folder}, directory=tmp_path / "run"), {})

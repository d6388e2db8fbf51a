"""What a user may get wrong about model and data: one line that names field and remedy, from each command, before any
process starts; what a manifest alone can say also by the operator."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_corpus import numbered, write_corpus
from trireme_api.job import API_VERSION, KIND
from trireme_api.validation import check_job
from trireme_cli.main import main

Json = dict[str, Any]
RECIPE: Json = {
    "model": {"preset": "moe-tiny", "overrides": {"vocabularySize": 1000, "maximumPositions": 32}},
    "data": {"sources": [{"path": "en", "language": "en"}], "sequenceLength": 32},
    "batch": {"tokens": 128},
    "until": {"steps": 4},
}


def with_model(**overrides: Any) -> Callable[[Json], object]:
    return lambda recipe: recipe["model"]["overrides"].update(overrides)


def with_data(path: str, **changes: Any) -> Callable[[Json], object]:
    return lambda recipe: recipe["data"].update(sources=[{"path": path}], **changes)


def streamed(path: str, preset: str = "gpt-tiny", **anytime: Any) -> Callable[[Json], object]:
    def change(recipe: Json) -> None:
        recipe["model"]["preset"] = preset
        recipe["anytime"] = {"megaBatches": 2, **anytime}
        with_data(path)(recipe)

    return change


SAID_OF_A_RECIPE: dict[str, tuple[Callable[[Json], object], str]] = {
    "heads": (
        with_model(heads=3),
        "model.overrides: width must be a multiple of heads; 64 is not a multiple of 3; set heads to 2 or 4",
    ),
    "experts": (
        lambda recipe: recipe.update(parallelism={"expert": 3}),
        "parallelism.expert: must divide the 4 experts of moe-tiny, got 3; set a divisor, or another "
        "model.overrides.experts",
    ),
    "language": (
        lambda recipe: recipe["data"].update(mixture={"upsample": {"te": 10}}),
        "data.mixture.upsample.te: no source has this language, they have en; set the language of one, or prepare it "
        "with --language te",
    ),
}
SAID_OF_DATA_THAT_ARE_HERE: dict[str, tuple[Callable[[Json], object], str]] = {
    "language of the corpus": (
        with_data("sw", mixture={"upsample": {"te": 10}}),
        "data.mixture.upsample.te: no source has this language, they have sw; set the language of one, or",
    ),
    "vocabulary": (
        with_model(vocabularySize=999),
        "en is tokenised with 1000 entries, the model has 999; set model.overrides.vocabularySize to at least 1000",
    ),
    "two tokenizers": (
        lambda recipe: recipe["data"]["sources"].append({"path": "other"}),
        "other was made with another tokenizer than {root}/en; prepare it again with --tokenizer {root}/en/tokenizer",
    ),
    "too little text": (
        with_data("small"),
        "data.sources[0].path: {root}/small has 20 tokens to train on, less than one block of 33; give more text, or",
    ),
    "empty mega-batch": (
        streamed("mega-{n}"),
        "data.sources[0].path: {root}/mega-2 has 0 tokens to train on, less than one block of 33; give more text, or",
    ),
    "mega-batch that holds nothing out": (
        streamed("grow-{n}", "growing-tiny", growEvery=1),
        "data.sources: {root}/grow-2 holds no block of 33 tokens out, on which growth measures usage; prepare it with",
    ),
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Corpora in the working directory; and nothing may start."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "en", numbered([50] * 4))
    write_corpus(tmp_path / "sw", numbered([50] * 4), language="sw")
    write_corpus(tmp_path / "other", numbered([50] * 4), tokenizer=b'{"other": 1}')
    write_corpus(tmp_path / "small", numbered([20]))
    for name, second in (("mega", numbered([])), ("grow", numbered([50]))):
        write_corpus(tmp_path / f"{name}-1", numbered([50]))
        write_corpus(tmp_path / f"{name}-2", second)

    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == 64, said.err
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    return said.err


def written(change: Callable[[Json], object], root: Path) -> Json:
    recipe = copy.deepcopy(RECIPE)
    change(recipe)
    for source in recipe["data"]["sources"]:
        source["path"] = str(root / source["path"])
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return recipe


COMMANDS = [["validate", "recipe.yaml"], ["plan", "recipe.yaml"], ["run", "recipe.yaml", "--nproc", "3"]]


@pytest.mark.parametrize("case", [*SAID_OF_A_RECIPE, *SAID_OF_DATA_THAT_ARE_HERE])
def test_every_command_says_it_before_anything_starts(
    root: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, says = {**SAID_OF_A_RECIPE, **SAID_OF_DATA_THAT_ARE_HERE}[case]
    written(change, root)
    for command in COMMANDS:
        assert says.format(root=root) in refused(capsys, *command)
    assert not (root / "trireme-run").exists()


@pytest.mark.parametrize("case", SAID_OF_A_RECIPE)
def test_the_operator_says_what_a_manifest_alone_can(root: Path, case: str) -> None:
    change, says = SAID_OF_A_RECIPE[case]
    recipe = written(change, root)
    recipe["data"]["sources"][0]["path"] = "pvc://corpus/en"
    spec = {"recipe": recipe, "replicas": {"desired": 3}, "checkpoint": {"uri": "pvc://checkpoints/x"}}
    checked = check_job({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "bad"}, "spec": spec})
    assert checked.spec is None
    said = str(checked.problems[0])
    assert said.startswith("spec.recipe")
    assert said.replace("spec.recipe.", "").endswith(says)


def test_data_that_must_be_here_and_are_not(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To validate and plan they need not be: the recipe may be for another machine."""
    written(with_data("absent"), root)
    said = refused(capsys, "run", "recipe.yaml")
    assert f"data.sources[0].path: {root}/absent: no such directory; make one with: trireme prepare" in said
    with pytest.raises(SystemExit) as ended:
        main(["validate", "recipe.yaml"])
    assert ended.value.code == 0


def test_a_good_recipe_gets_as_far_as_starting(root: Path) -> None:
    """Negative control: what the others are kept from."""
    written(lambda recipe: None, root)
    with pytest.raises(AssertionError, match="a process was started"):
        main(["run", "recipe.yaml"])

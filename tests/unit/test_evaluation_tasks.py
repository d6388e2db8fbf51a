"""Task files and what they become; no model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from trireme_api.job import parse_spec
from trireme_api.layout import claims
from trireme_api.recipe import Recipe
from trireme_trainer.data.tokenizer import Encoder, JsonEncoder, byte_bpe
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.evaluation.prompts import Round, drawn, encode, judge, row
from trireme_trainer.evaluation.scoring import Score
from trireme_trainer.evaluation.tasks import Task, read_task

ROWS = [{"premise": f"Rain {i}.", "a": "It is wet", "b": "It is dry", "label": i % 2} for i in range(6)]


def write(directory: Path, rows: list[dict] | None = None, **changes: object) -> str:
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in (ROWS if rows is None else rows)) + "\n")
    task = {
        "name": "wet", "examples": "rows.jsonl", "context": "{premise} So", "continuation": " {choice}.",
        "choices": ["{a}", "{b}"], "answer": "label",
    }  # fmt: skip
    path = directory / "task.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**task, **changes}.items() if v is not None}))
    return str(path)


def test_templates_give_a_pair_for_each_choice(tmp_path: Path) -> None:
    task = read_task(write(tmp_path))
    assert task.examples[1].pairs == (("Rain 1. So", " It is wet."), ("Rain 1. So", " It is dry."))
    assert task.examples[1].solved == "Rain 1. So It is dry."


def test_choices_inside_the_context_share_what_is_scored(tmp_path: Path) -> None:
    """Winograd schemas: the text after the blank is scored, the choice stands before it."""
    rows = [{"before": "It did not fit, for", "options": ["the cup", "the box"], "after": " was big.", "n": "the cup"}]
    path = write(tmp_path, rows, context="{before} {choice}", continuation="{after}", choices="options", answer="n")
    (example,) = read_task(path).examples
    assert example.right == 0
    assert example.pairs[1] == ("It did not fit, for the box", " was big.")


def test_labels_name_choices(tmp_path: Path) -> None:
    rows = [{"premise": "P", "a": "x", "b": "y", "label": "no"}]
    assert read_task(write(tmp_path, rows, labels=["yes", "no"])).examples[0].right == 1


@pytest.mark.parametrize(
    ("changes", "rows", "says"),
    [
        ({"continuation": "{nothing}"}, None, "rows.jsonl:1: no field 'nothing', which continuation asks for"),
        ({"answer": None}, None, "choices and answer go together"),
        ({"contxt": "x"}, None, "contxt: unknown field; did you mean 'context'?"),
        ({}, [{**ROWS[0], "label": 2}], "label: 2 is neither a place from 0 to 1 nor the text of a choice"),
        ({"labels": ["only"]}, None, "labels: 1 for 2 choices"),
        ({"examples": "absent.jsonl"}, None, "absent.jsonl: no such file"),
        ({"examples": []}, None, "examples: there are none"),
        ({"choices": ["{a}"]}, None, "choices: 1 of them"),
    ],
)
def test_bad_tasks_are_one_line(tmp_path: Path, changes: dict, rows: list[dict] | None, says: str) -> None:
    with pytest.raises(EvaluationError) as refused:
        read_task(write(tmp_path, rows, **changes))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return read_task(write(tmp_path))


def test_demonstrations_are_fixed_nested_and_never_the_example(task: Task) -> None:
    for number in range(6):
        four = drawn(task, number, 4, key=5)
        assert number not in four
        assert len(set(four)) == 4
        assert drawn(task, number, 4, key=5) == four
        assert drawn(task, number, 2, key=5) == four[-2:]
    assert any(drawn(task, n, 4, key=5) != drawn(task, n, 4, key=6) for n in range(6))
    # Frozen: published figures must come out again with a later release.
    assert drawn(task, 0, 4, key=5) == [3, 2, 5, 1]


def test_solved_examples_stand_before_the_one_that_is_asked(task: Task) -> None:
    texts = Round(task, 2, 0, limit=1).texts(seed=1)
    assert len(texts) == 2
    first, second, last = texts[0][0].split("\n")
    assert last == "Rain 0. So"
    assert {first, second} <= {example.solved for example in task.examples[1:]}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return JsonEncoder(byte_bpe.train(iter(["It is wet. It is dry. So it rained, so it is wet."]), 300), "here")


def test_white_space_before_the_cut_is_scored_with_what_follows(encoder: Encoder) -> None:
    (one, other), cut = encode([("So ", "it is wet"), ("So", " it is wet")], encoder, 64, True)
    assert cut == 0
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.scored == other.scored
    assert one.tokens[0] == encoder.end_of_document
    assert encoder.decode(one.tokens[-one.scored :].tolist()) == " it is wet"


def test_without_context_the_document_begins(encoder: Encoder) -> None:
    (request,), _ = encode([("", "wet")], encoder, 64, False)
    assert request.tokens[0] == encoder.end_of_document
    assert request.scored == len(request.tokens) - 1


def test_what_is_too_long_loses_its_beginning(encoder: Encoder) -> None:
    (request,), cut = encode([("So it rained. " * 20, "wet")], encoder, 8, True)
    assert (cut, len(request.tokens)) == (1, 9)
    assert encoder.decode(request.tokens[-request.scored :].tolist()) == " wet"


def test_sum_and_mean_may_disagree(tmp_path: Path, encoder: Encoder) -> None:
    rows = [{"premise": "P", "a": "It is wet, and so it rained", "b": "dry", "label": 0}]
    one = Round(read_task(write(tmp_path, rows)), 0, 0, None)
    requests, cut = encode(one.texts(1), encoder, 64, True)
    long, short = (request.scored for request in requests)
    assert long > short
    answers = judge(one, requests, [Score(-1.0 * long, False), Score(-1.5 * short, False)], cut)
    assert (answers.by_sum, answers.by_mean) == (0.0, 1.0)
    assert row([answers])["accuracy"] == {"sum": 0.0, "mean": 1.0}
    assert row([answers])["chance"] == 0.5


RECIPE = {
    "model": {"preset": "opt-tiny"}, "data": {"sources": [{"path": "c"}], "sequenceLength": 32},
    "batch": {"tokens": 64}, "until": {"steps": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("evaluation", "more", "says"),
    [
        ({"shots": [-1]}, {}, "evaluation.shots: must be 0 or more"),
        ({"heldOut": False}, {}, "nothing to evaluate"),
        ({"sources": [{"path": "c", "split": "train"}]}, {}, "'c' is trained on"),
        ({"tasks": ["t"]}, {"objective": "masked-lm"}, "with objective: masked-lm only what data.sources hold out"),
    ],
)
def test_bad_recipes_are_refused(evaluation: dict, more: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate({**RECIPE, **more, "evaluation": evaluation})


def test_what_is_read_is_mounted_in_pods() -> None:
    recipe = {
        **RECIPE, "data": {"sources": [{"path": "pvc://corpus/en"}], "sequenceLength": 32},
        "evaluation": {"sources": [{"path": "pvc://held-out/sw"}], "tasks": ["pvc://tasks/copa.yaml"]},
    }  # fmt: skip
    spec = parse_spec({"recipe": recipe, "replicas": {"desired": 1}, "checkpoint": {"uri": "pvc://kept/run"}})
    assert claims(spec) == {"corpus": False, "held-out": False, "tasks": False, "kept": True}

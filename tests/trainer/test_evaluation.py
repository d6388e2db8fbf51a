"""Scores against Hugging Face Transformers, the command, and evaluation in the middle of training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from gang import SEQUENCE, Gang, make_recipe
from transformers import AutoTokenizer, OPTForCausalLM
from transformers import OPTConfig as TheirConfig
from trireme_cli.evaluate import evaluate
from trireme_trainer.data.prepare import Options, prepare

LICENSE = Path(__file__).parents[2] / "LICENSE"
WORDS = ["License", "Work", "Contribution", "the copyright", "patent"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of the other tests, a fifth of it held out."""
    output = tmp_path_factory.mktemp("held-out") / "corpus"
    prepare([str(LICENSE)], str(output), Options(vocabulary=384, separator="blank-line", valid_fraction=0.2))
    return output


@pytest.fixture(scope="module")
def theirs(held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OPTForCausalLM]:
    """A model directory, large initial values so that its answers differ."""
    shape = TheirConfig(
        vocab_size=384, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=64, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, init_std=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(shape).eval()
    directory = tmp_path_factory.mktemp("hf")
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text((held_out / "tokenizer.json").read_text())
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return directory, model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    rows = [{"about": f"Section {i} is about", "options": WORDS[i % 3 :], "right": i % 2} for i in range(8)]
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    choice = {
        "name": "about", "language": "en", "examples": "rows.jsonl", "context": "{about}", "continuation": " {choice}",
        "choices": "options", "answer": "right",
    }  # fmt: skip
    cloze = {
        "name": "last", "examples": [{"text": "the terms of this", "word": "License"}], "context": "{text}",
        "continuation": " {word}",
    }  # fmt: skip
    paths = directory / "about.yaml", directory / "last.yaml"
    for path, task in zip(paths, (choice, cloze), strict=True):
        path.write_text(yaml.safe_dump(task))
    return paths


def log_likelihood(model: OPTForCausalLM, context: list[int], continuation: list[int]) -> tuple[float, int]:
    """One sequence by itself, every logit, float64."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[0].double().log_softmax(dim=-1)
    places = range(len(context) - 1, len(context) + len(continuation) - 1)
    return sum(logits[p, t].item() for p, t in zip(places, continuation, strict=True)), len(continuation)


def test_choices_agree_with_transformers(theirs: tuple[Path, OPTForCausalLM], tasks: tuple[Path, Path]) -> None:
    directory, model = theirs
    words = AutoTokenizer.from_pretrained(directory)
    right = {"sum": 0, "mean": 0}
    loss = tokens = 0.0
    for i in range(8):
        options = []
        context = words(f"Section {i} is about", add_special_tokens=False)["input_ids"]
        for option in WORDS[i % 3 :]:
            whole = words(f"Section {i} is about {option}", add_special_tokens=False)["input_ids"]
            options.append(log_likelihood(model, [2, *context], whole[len(context) :]))
        right["sum"] += max(range(len(options)), key=lambda n: options[n][0]) == i % 2
        right["mean"] += max(range(len(options)), key=lambda n: options[n][0] / options[n][1]) == i % 2
        loss, tokens = loss - options[i % 2][0], tokens + options[i % 2][1]
    result = run(directory, "--task", tasks[0], "--sequences", 3, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["tasks"]
    assert row["accuracy"] == {name: count / 8 for name, count in right.items()}
    assert row["rightLoss"] == pytest.approx(loss / tokens, abs=1e-5)


def test_perplexity_agrees_with_transformers(theirs: tuple[Path, OPTForCausalLM], held_out: Path) -> None:
    directory, model = theirs
    manifest = json.loads((held_out / "manifest.json").read_text())
    raw = b"".join((held_out / f"{shard['name']}.tokens").read_bytes() for shard in manifest["valid"]["shards"])
    tokens = torch.frombuffer(bytearray(raw), dtype=torch.uint16).long().tolist()
    nats = 0.0
    for begin in range(0, len(tokens) - 1, SEQUENCE):
        window = tokens[begin : begin + SEQUENCE + 1]
        nats -= log_likelihood(model, window[:1], window[1:])[0]
    result = run(directory, "--data", f"en={held_out}", "--length", SEQUENCE, "--json")
    assert result.exit_code == 0, result.output
    source, language = json.loads(result.stdout)["heldOut"]
    assert source["tokens"] == len(tokens) - 1
    assert source["loss"] == pytest.approx(nats / (len(tokens) - 1), abs=1e-5)
    assert source["perplexity"] == pytest.approx(math.exp(source["loss"]), rel=1e-4)
    # By the mean size of a token, for the first one is not predicted.
    size = manifest["valid"]["bytes"] * (len(tokens) - 1) / len(tokens)
    assert source["bitsPerByte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
    assert (language["source"], language["language"], language["loss"]) == (None, "en", source["loss"])


def test_training_evaluates_alike_in_any_world(held_out: Path, tasks: tuple[Path, Path], tmp_path: Path) -> None:
    evaluation = {
        "everySteps": 2, "sources": [{"path": str(held_out), "name": "trained", "language": "en", "split": "valid"}],
        "tasks": [str(path) for path in tasks], "shots": [0], "tokens": 200, "sequences": 3,
    }  # fmt: skip
    quiet = {"data": {"sources": [{"path": str(held_out)}], "sequenceLength": SEQUENCE}}
    plain = Gang(tmp_path / "plain", make_recipe(held_out, steps=3, **quiet), every=3).run()
    gangs = [
        Gang(tmp_path / f"{world}", make_recipe(held_out, steps=3, evaluation=evaluation), world, every=3).run()
        for world in (1, 3)
    ]
    one, three = (gang.events("evaluation") for gang in gangs)
    assert [event["step"] for event in one] == [2, 3]
    for mine, other in zip(one, three, strict=True):
        assert [row["source"] for row in mine["heldOut"]] == ["corpus", "trained", None]
        for a, b in zip(mine["heldOut"], other["heldOut"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)
        for a, b in zip(mine["tasks"], other["tasks"], strict=True):
            assert a.get("accuracy") == b.get("accuracy")
            assert a.get("exact") == b.get("exact")
    assert one[0]["heldOut"][0]["loss"] > one[1]["heldOut"][0]["loss"]
    # Evaluation leaves no trace in training, and its time is not that of steps.
    assert gangs[0].losses() == plain.losses()
    (ended,) = gangs[0].events("ended")
    assert ended["seconds"]["eval"] > 0
    told = run(tmp_path / "1" / "checkpoints", "--data", held_out, "--tokens", 200, "--length", SEQUENCE, "--json")
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert report["step"] == 3
    assert report["heldOut"][0]["loss"] == pytest.approx(one[1]["heldOut"][0]["loss"], abs=2e-6)


def test_shots_and_draws(theirs: tuple[Path, OPTForCausalLM], tasks: tuple[Path, Path]) -> None:
    arguments = (theirs[0], "--task", tasks[0], "--shots", 0, "--shots", 2, "--draws", 3, "--limit", 4, "--json")
    once, again = (json.loads(run(*arguments).stdout)["tasks"] for _ in range(2))
    assert once == again
    assert [(row["shots"], row["draws"], row["examples"]) for row in once] == [(0, 1, 4), (2, 3, 4)]
    assert "deviation" in once[1]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("{hf}",), 2, "nothing to evaluate"),
        (("{hf}", "--task", "{hf}/absent.yaml"), 65, "absent.yaml: no such file"),
        (("{hf}", "--task", "{task}", "--shots", "8"), 65, "8 shots of 7 demonstrations"),
        (("{hf}", "--task", "{task}", "--step", "3"), 65, "--step is of checkpoints"),
        (("{hf}", "--data", "{hf}"), 65, "no manifest.json in it"),
        (("{hf}", "--task", "{task}", "--length", "65"), 65, "--length 65: the model has 64 positions"),
        (("{hf}/none", "--task", "{task}"), 74, "no committed checkpoint here"),
    ],
)
def test_refusals_are_one_line(
    theirs: tuple[Path, OPTForCausalLM], tasks: tuple[Path, Path], arguments: tuple[str, ...], code: int, says: str
) -> None:
    result = run(*(text.format(hf=theirs[0], task=tasks[0]) for text in arguments))
    assert result.exit_code == code, result.output
    assert says in result.output


def test_text_of_another_tokenizer_is_refused(theirs: tuple[Path, OPTForCausalLM], tmp_path: Path) -> None:
    options = Options(vocabulary=300, separator="blank-line", valid_fraction=0.2)
    prepare([str(LICENSE)], str(tmp_path / "other"), options)
    result = run(theirs[0], "--data", tmp_path / "other")
    assert result.exit_code == 65
    assert "made with another tokenizer than the model's" in result.output

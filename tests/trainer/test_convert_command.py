"""`trireme convert` as a user types it: what was trained here runs in Transformers, and the other way round."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from gang import SEQUENCE, Gang, make_recipe
from reference import fresh_model, saved_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM
from transformers import OPTConfig as TheirConfig
from trireme_api.schema import InvalidSpec
from trireme_cli.convert import convert
from trireme_cli.local_plan import Options, plan_recipe
from trireme_trainer.checkpoint import CheckpointStore
from trireme_trainer.checkpoint.fence import read as read_fence

TOKENS = torch.randint(4, 380, (2, SEQUENCE), generator=torch.Generator().manual_seed(0))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(convert, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Gang:
    return Gang(tmp_path_factory.mktemp("trained"), make_recipe(corpus, steps=6), world=2, every=3).run()


def logits(recipe: dict, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = fresh_model(recipe).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model(TOKENS)


def test_a_trained_checkpoint_runs_in_transformers(trained: Gang, corpus: Path, tmp_path: Path) -> None:
    fence = read_fence(CheckpointStore(str(trained.checkpoints)).files)
    tokenizer = corpus / "tokenizer.json"
    result = run("--to", "hf", trained.checkpoints, tmp_path / "hf", "--tokenizer", tokenizer, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["step"], told["family"], told["model"]["preset"]) == (6, "opt", "opt-tiny")
    assert all(Path(path).is_file() for path in told["written"])
    assert read_fence(CheckpointStore(str(trained.checkpoints)).files) == fence, "a running job keeps its fence"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    step, weights = saved_weights(trained.checkpoints, trained.recipe)
    assert step == 6
    assert (logits(trained.recipe, weights) - expected).abs().max() <= 1e-5
    words = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert words.decode(words("Apache License")["input_ids"]) == "Apache License"


def test_step_precision_and_vocabulary_are_chosen(trained: Gang, tmp_path: Path) -> None:
    options = ("--step", 3, "--dtype", "bf16", "--vocabulary", 384)
    result = run("--to", "hf", trained.checkpoints, tmp_path / "hf", *options)
    assert result.exit_code == 0, result.output
    assert "of step 3" in result.stdout
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    assert theirs.get_input_embeddings().weight.shape[0] == 384


def test_training_goes_on_from_weights_of_transformers(corpus: Path, tmp_path: Path) -> None:
    shape = TheirConfig(
        vocab_size=384, hidden_size=64, word_embed_proj_dim=64, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=256, max_position_embeddings=SEQUENCE, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = OPTForCausalLM(shape).eval()
    theirs.save_pretrained(tmp_path / "hf")
    result = run("--to", "checkpoint", tmp_path / "hf", tmp_path / "checkpoints", "--json")
    assert result.exit_code == 0, result.output
    recipe = make_recipe(corpus, steps=2, model=json.loads(result.stdout)["model"], optimizer={"learningRate": 1e-9})
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    step, weights = saved_weights(tmp_path / "checkpoints", recipe)
    assert step == 0
    assert (logits(recipe, weights) - expected).abs().max() <= 1e-5
    gang = Gang(tmp_path, recipe, world=2).run()
    assert gang.events("resumed")[0]["step"] == 0
    # A step of 1e-9 moves nothing that can be seen: these are still their weights.
    _, after = saved_weights(tmp_path / "checkpoints", recipe)
    assert (logits(recipe, after) - expected).abs().max() <= 1e-4


def test_a_checkpoint_of_another_model_is_refused_before_anything_starts(trained: Gang, tmp_path: Path) -> None:
    recipe = copy.deepcopy(trained.recipe)
    path = tmp_path / "recipe.yaml"
    options = Options(nproc=1, checkpoint=str(trained.checkpoints), directory=tmp_path / "run")
    path.write_text(yaml.safe_dump(recipe))
    plan_recipe(path, options, {}).scratch.cleanup()
    recipe["model"]["overrides"]["vocabularySize"] = 384
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(InvalidSpec, match=r"^model: .*-00000006 is of another model \(vocabularySize was 512, is 384"):
        plan_recipe(path, options, {})


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--to", "hf", "{out}/nowhere", "{out}/x"), 74, "no committed checkpoint here; see: trireme checkpoints list"),
        (("--to", "hf", "{ckpt}", "{out}/x", "--step", "5"), 74, "no committed checkpoint of step 5"),
        (("--to", "hf", "{ckpt}", "{ckpt}"), 65, "is not empty"),
        (("--to", "hf", "{ckpt}", "{out}/x", "--vocabulary", "9999"), 65, "--vocabulary: must be 1 to 512"),
        (("--to", "hf", "{ckpt}", "{out}/x", "--pad-vocabulary", "8"), 2, "no meaning with --to hf"),
        (("--to", "checkpoint", "{out}", "{out}/x", "--dtype", "bf16"), 2, "no meaning with --to checkpoint"),
        (("--to", "checkpoint", "{out}", "{ckpt}"), 74, "holds checkpoints already"),
    ],
)
def test_refusals_are_one_line(trained: Gang, tmp_path: Path, arguments: tuple, code: int, says: str) -> None:
    filled = [text.format(out=tmp_path, ckpt=trained.checkpoints) for text in arguments]
    result = run(*filled)
    assert result.exit_code == code, result.output
    assert says in result.output
    assert not (tmp_path / "x").exists()


def test_a_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = run("--to", "checkpoint", tmp_path, tmp_path / "x")
    assert result.exit_code == 65
    assert "model_type 'llama' has no family here" in result.output
    assert not (tmp_path / "x").exists()

"""`trireme convert`: between a checkpoint of ours and a Hugging Face Transformers model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from trireme_api.families import specify

from trireme_cli.refusals import BadData, CheckpointProblem

if TYPE_CHECKING:
    from trireme_trainer.checkpoint.exchange import Exchange

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@click.command()
@click.argument("source")
@click.argument("target")
@click.option(
    "--to", "to", type=click.Choice(["hf", "checkpoint"]), required=True,
    help="hf: TARGET becomes a Transformers directory. checkpoint: TARGET becomes a checkpoint root with step 0.",
)  # fmt: skip
@click.option("--step", type=click.IntRange(min=0), help="To hf: of this step. Left out: the newest good one.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="To hf: precision of the weights [default: fp32].")
@click.option("--vocabulary", type=click.IntRange(min=1), metavar="N", help="To hf: keep N rows of the token table.")
@click.option("--tokenizer", type=click.Path(dir_okay=False, path_type=Path), help="To hf: its tokenizer.")
@click.option(
    "--pad-vocabulary", type=click.IntRange(min=1), metavar="N",
    help="To checkpoint: pad the token table to a multiple of N rows [default: 8].",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(
    source: str,
    target: str,
    to: str,
    step: int | None,
    dtype: str | None,
    vocabulary: int | None,
    tokenizer: Path | None,
    pad_vocabulary: int | None,
    as_json: bool,
) -> None:
    """Carry weights between our checkpoints and Hugging Face Transformers.

    A checkpoint is named by its root, as in checkpoint.uri: a path, pvc://claim/dir or any fsspec URL. A Transformers
    model is a local directory with config.json and weights. The checkpoint may be of a job that is running. A tokenizer
    in that directory (sentencepiece.bpe.model or tokenizer.json) is kept in the checkpoint's root, and goes back with
    the weights; --tokenizer names another file, a tokenizer.json or a SentencePiece model.

    \b
    Examples:
      trireme convert --to hf out/checkpoints opt-mine
      trireme convert --to hf pvc://ckpt/opt-125m opt-mine --step 5000 --dtype bf16 --vocabulary 50265
      trireme convert --to checkpoint facebook-opt-125m/ out/checkpoints

    After the last one, a recipe of that model with this checkpoint.uri trains on from those weights. Pickled weights
    (pytorch_model.bin) are read as tensors only. Exit code 65: SOURCE cannot be converted; 74: checkpoint not usable.
    """
    _fits(to, "hf", {"--step": step, "--dtype": dtype, "--vocabulary": vocabulary, "--tokenizer": tokenizer})
    _fits(to, "checkpoint", {"--pad-vocabulary": pad_vocabulary})
    import torch
    from trireme_trainer.checkpoint import CheckpointError, exchange
    from trireme_trainer.families.convert import ConversionError
    from trireme_trainer.storage import StorageError

    try:
        if to == "hf":
            done = exchange.to_hugging_face(
                source, Path(target), step=step, dtype=getattr(torch, _DTYPES[dtype or "fp32"]),
                vocabulary_size=vocabulary, tokenizer=tokenizer,
            )  # fmt: skip
        else:
            done = exchange.from_hugging_face(Path(source), target, pad_vocabulary or 8)
    except CheckpointError as error:
        raise CheckpointProblem(str(error)) from None
    except (ConversionError, StorageError) as error:
        raise BadData(str(error)) from None
    _print(done, to, target, as_json)


def _fits(to: str, only: str, options: dict[str, object]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if to != only and given:
        raise click.UsageError(f"{given[0]} has no meaning with --to {to}")


def _print(done: Exchange, to: str, target: str, as_json: bool) -> None:
    spec = specify(done.config).model_dump(by_alias=True)
    if as_json:
        result = {
            "to": to, "target": target, "family": done.config.family, "model": spec, "step": done.step,
            "parameters": done.parameters, "written": list(done.paths), "tokenizer": done.tokenizer,
        }  # fmt: skip
        click.echo(json.dumps(result, indent=1))
        return
    click.echo(f"{target}: {done.config.family}, {done.parameters:,} parameters, of step {done.step}")
    if to == "checkpoint":
        click.echo("train on from it with, in the recipe, and this directory as checkpoint.uri:")
        click.echo(f"  model: {json.dumps(spec)}")
        if done.tokenizer:
            click.echo(f"and text made with its tokenizer: trireme prepare --tokenizer {done.tokenizer} …")
    else:
        kind = "AutoModelForCausalLM" if done.config.causal else "AutoModelForMaskedLM"
        click.echo(f"load it with: {kind}.from_pretrained({str(target)!r})")

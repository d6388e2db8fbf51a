"""`trireme grow`: more capacity for a model between two sessions of training."""

from __future__ import annotations

import json

import click
from trireme_api.families import specify

from trireme_cli.refusals import BadData, CheckpointProblem


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--data", required=True, help="Shards of the new mega-batch; usage is measured on what they hold out.")
@click.option("--step", type=click.IntRange(min=0), help="Of this step. Left out: the newest good one.")
@click.option("--blocks", type=click.IntRange(min=1), default=32, show_default=True, help="Held-out blocks looked at.")
@click.option("--length", type=click.IntRange(min=1), help="Tokens of a block. Left out: the model's positions.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of the new gates' values.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def grow(
    source: str, target: str, data: str, step: int | None, blocks: int, length: int | None, seed: int, as_json: bool
) -> None:
    """Split the most used expert of every layer in two, and change nothing else.

    SOURCE is a checkpoint root of a model of the family growing, TARGET becomes one with a checkpoint of the same step:
    the same function, optimiser state carried along. Each is a path, pvc://claim/dir or any fsspec URL.

    \b
    Example, between two sessions of training:
      trireme grow out/session-1 out/session-2 --data mega-batch-2/

    Then a recipe with the model that is printed, the new data under data.sources, TARGET as checkpoint.uri and `until`
    further on trains the grown model. Exit code 65: model or data cannot serve; 74: checkpoint not usable.
    """
    from trireme_trainer.anytime.language import GrowthError, grow_checkpoint
    from trireme_trainer.checkpoint import CheckpointError
    from trireme_trainer.data.errors import DataError
    from trireme_trainer.families.convert import ConversionError
    from trireme_trainer.storage import StorageError

    try:
        done = grow_checkpoint(source, target, data, step=step, blocks=blocks, length=length or 0, seed=seed)
    except CheckpointError as error:
        raise CheckpointProblem(str(error)) from None
    except (GrowthError, DataError, ConversionError, StorageError) as error:
        raise BadData(str(error)) from None
    spec = specify(done.config).model_dump(by_alias=True)
    parameters = done.config.parameters().total
    if as_json:
        result = {
            "target": target, "path": done.path, "step": done.step, "model": spec, "parameters": parameters,
            "split": list(done.split), "usage": [list(layer) for layer in done.usage], "difference": done.difference,
        }  # fmt: skip
        click.echo(json.dumps(result, indent=1))
        return
    experts = done.config.growths + 1
    click.echo(f"{done.path}: {parameters:,} parameters, {experts} experts a layer, of step {done.step}")
    click.echo("train on from it with, in the recipe, and this directory as checkpoint.uri:")
    click.echo(f"  model: {json.dumps(spec)}")

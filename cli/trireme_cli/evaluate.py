"""`trireme evaluate`: held-out perplexity and tasks of a checkpoint or a Transformers directory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from trireme_api import evaluation, fewshot
from trireme_api.evaluation import EvaluationSpec, HeldOutSource

from trireme_cli.refusals import BadData, CheckpointProblem, given, refuse

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class _Source(click.ParamType[HeldOutSource]):
    """DIR, or LANGUAGE=DIR."""

    name = "[LANGUAGE=]DIR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> HeldOutSource:
        if isinstance(value, HeldOutSource):
            return value
        language, equals, path = value.partition("=")
        if not equals:
            return HeldOutSource(path=value)
        if not language or not path:
            self.fail(f"{value!r}: write DIR or LANGUAGE=DIR")
        return HeldOutSource(path=path, language=language)


@click.command()
@click.argument("model")
@click.option("--data", "sources", type=_Source(), multiple=True, help="Prepared text for perplexity. Repeatable.")
@click.option("--split", type=click.Choice(["valid", "train"]), default="valid", show_default=True, help="Of --data.")
@click.option("--tokens", type=click.IntRange(min=1), metavar="N", help="At most N tokens of each --data.")
@click.option("--task", "tasks", multiple=True, metavar="FILE", help="A task file (docs/evaluation.md). Repeatable.")
@click.option("--shots", type=click.IntRange(min=0), multiple=True, default=(0,), help="Solved examples. Repeatable.")
@click.option("--draws", type=click.IntRange(min=1), default=1, show_default=True, help="Times they are drawn.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of draws and hidden tokens.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most N examples of each task.")
@click.option("--step", type=click.IntRange(min=0), help="Checkpoint of this step. Left out: the newest good one.")
@click.option("--tokenizer", type=click.Path(dir_okay=False, path_type=Path), help="Left out: MODEL's or --data's.")
@click.option("--length", type=click.IntRange(min=1), help="Tokens seen at once. Left out: the model's positions.")
@click.option("--sequences", type=click.IntRange(min=1), default=8, show_default=True, help="Computed at once.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="fp32", show_default=True, help="To compute in.")
@click.option("--no-document-start", is_flag=True, help="No end-of-document token before a task's context.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(
    model: str, sources: tuple[HeldOutSource, ...], split: str, tasks: tuple[str, ...], shots: tuple[int, ...],
    draws: int, seed: int, step: int | None, tokenizer: Path | None, length: int | None, dtype: str,
    no_document_start: bool, as_json: bool, **numbers: Any,
) -> None:  # fmt: skip
    """Measure a language model: perplexity of held-out text, and tasks answered by log-likelihood. Of a masked model:
    perplexity of tokens hidden as in training. Of a model trained with objective few-shot, without --data and --task:
    its own held-out tasks, learned from --shots examples.

    MODEL is a checkpoint root, as in checkpoint.uri (a path, pvc://claim/dir or any fsspec URL; its job may be
    running), or a local Hugging Face Transformers directory. Runs in this process, on a GPU where there is one.

    \b
    Examples:
      trireme evaluate out/checkpoints --data corpus
      trireme evaluate out/checkpoints --data en=corpus/en --data sw=corpus/sw --json
      trireme evaluate facebook-opt-125m/ --task copa.yaml --shots 0 --shots 4 --draws 5
      trireme evaluate out/checkpoints --step 5000 --task lambada.yaml --tokenizer corpus/tokenizer.json
      trireme evaluate out/xlmr --data en=corpus/en --data sw=corpus/sw --length 512
      trireme evaluate out/few-shot --shots 0 --shots 5 --shots 20 --draws 3

    Exit code 65: something cannot be evaluated; 74: checkpoint not usable.
    """
    if not sources and not tasks:
        _few_shot(model, step, as_json, list(dict.fromkeys(shots)), draws, numbers["limit"])
        return
    import torch
    from trireme_trainer.checkpoint import CheckpointError
    from trireme_trainer.data.errors import DataError
    from trireme_trainer.evaluation import source
    from trireme_trainer.evaluation.errors import EvaluationError
    from trireme_trainer.evaluation.masked import open_masked
    from trireme_trainer.evaluation.suite import Suite
    from trireme_trainer.families.convert import ConversionError
    from trireme_trainer.parallel.world import World
    from trireme_trainer.storage import StorageError

    from trireme_cli.prepare import _progress_bar

    spec = EvaluationSpec(
        sources=[s.model_copy(update={"split": split}) for s in sources], tasks=list(tasks),
        shots=list(dict.fromkeys(shots)), draws=draws, document_start=not no_document_start, **numbers,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.monotonic()
    about: dict[str, Any] = {}
    try:
        loaded = source.load(model, step, tokenizer, getattr(torch, _DTYPES[dtype]), device, tasks=bool(tasks))
        most = loaded.config.maximum_positions
        if length is not None and length > most:
            raise EvaluationError(f"--length {length}: the model has {most} positions; give at most that")
        rows, alone = loaded.config.vocabulary_size, World(0, 1, 0, 1, device)
        with _progress_bar() as (progress, _):
            if loaded.config.causal:
                suite = Suite(spec, length or most, rows, seed, loaded.encoder, command=True)
                found = suite.run(loaded.model, alone, progress)
            else:
                masked = open_masked(spec, loaded.masking, length or most, rows, seed, loaded.encoder)
                found = {"heldOut": masked.run(loaded.model, alone, progress), "tasks": []}
                about = {"masking": loaded.masking.model_dump(by_alias=True)}
    except CheckpointError as error:
        raise CheckpointProblem(str(error)) from None
    except (ConversionError, DataError, StorageError) as error:
        raise BadData(str(error)) from None
    seconds = time.monotonic() - begin
    if as_json:
        about = {"model": model, "family": loaded.config.family, "step": loaded.step, "seed": seed, **about}
        click.echo(json.dumps({**about, **found, "seconds": round(seconds, 3)}, indent=1))
        return
    of = f", step {loaded.step}" if loaded.step is not None else ""
    click.echo(f"{model}: {loaded.config.family}{of}, {loaded.config.parameters().total:,} parameters, {seconds:.1f} s")
    for line in evaluation.in_words(found):
        click.echo(f"  {line}")


_OF_TEXT = ("tokens", "split", "seed", "tokenizer", "length", "sequences", "dtype", "no_document_start")


def _few_shot(model: str, step: int | None, as_json: bool, shots: list[int], draws: int, limit: int | None) -> None:
    """Held-out tasks of a few-shot checkpoint, learned by the settings it was trained with."""
    refuse(_OF_TEXT, "is of --data and --task; give one of these, or leave it out")
    if Path(model, "config.json").is_file():
        raise click.UsageError("nothing to evaluate; give --data DIR or --task FILE")
    import torch
    from trireme_trainer.checkpoint import CheckpointError
    from trireme_trainer.data.errors import DataError
    from trireme_trainer.families.convert import ConversionError
    from trireme_trainer.fewshot import trained
    from trireme_trainer.storage import StorageError

    settings: dict[str, Any] = {"draws": draws, **({"queries": limit} if limit else {})}
    if given("shots"):
        settings["shots"] = shots
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.monotonic()
    try:
        loaded = trained.load(model, step, settings, device=device)
    except CheckpointError as error:
        raise CheckpointProblem(str(error)) from None
    except (ConversionError, DataError, StorageError) as error:
        raise BadData(str(error)) from None
    found = loaded.objective.evaluate(loaded.model, lambda: None)
    seconds = time.monotonic() - begin
    if as_json:
        about = {"model": model, "family": loaded.config.family, "step": loaded.step, "draws": draws}
        click.echo(json.dumps({**about, **found, "seconds": round(seconds, 3)}, indent=1))
        return
    total = loaded.config.parameters().total
    click.echo(f"{model}: {loaded.config.family}, step {loaded.step}, {total:,} parameters, {seconds:.1f} s")
    for line in fewshot.in_words(found):
        click.echo(f"  {line}")

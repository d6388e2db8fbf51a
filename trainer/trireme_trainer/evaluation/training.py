"""Evaluation at intervals of a training run."""

from __future__ import annotations

from collections.abc import Sequence

from trireme_api.evaluation import EvaluationSpec, HeldOutSource
from trireme_api.families import ModelConfig
from trireme_api.recipe import Recipe

from trireme_trainer.data.manifest import read_manifest
from trireme_trainer.data.shards import Corpus
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.evaluation.suite import Suite


def during_training(recipe: Recipe, config: ModelConfig, directories: Sequence[str]) -> Suite:
    """`directories`: of data.sources on this machine. Sources that hold nothing out are left out, as long as there is
    something to evaluate. Raises DataError."""
    spec = recipe.evaluation
    assert spec is not None
    own = []
    if spec.held_out:
        for source, directory in zip(recipe.data.sources, directories, strict=True):
            if read_manifest(directory).valid.tokens > 1:
                name = source.path.rstrip("/").rpartition("/")[2][:63] or None
                own.append(HeldOutSource(path=directory, name=name, language=source.language))
    if not (own or spec.sources or spec.tasks):
        raise EvaluationError(
            "evaluation.heldOut: none of data.sources holds anything out; prepare them with --valid-fraction above 0, "
            "or give evaluation.sources or evaluation.tasks"
        )
    encoder = Corpus(directories[0]).encoder()
    sequences = spec.sequences or recipe.batch.micro
    whole = spec.model_copy(update={"sources": [*own, *spec.sources], "sequences": sequences})
    return Suite(whole, recipe.data.sequence_length, config.vocabulary_size, recipe.seed, encoder)


def due(spec: EvaluationSpec | None, step: int, last: bool) -> bool:
    return spec is not None and (last or (spec.every_steps is not None and step % spec.every_steps == 0))

"""A trained few-shot model of a checkpoint, whole, in this process: to adapt it and to measure it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from trireme_api.families import ModelConfig
from trireme_api.recipe import Recipe

from trireme_trainer.checkpoint import CheckpointStore
from trireme_trainer.checkpoint.exchange import describe, empty_weights, load_into, read_meta
from trireme_trainer.evaluation.errors import EvaluationError
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.objectives.few_shot import FewShot
from trireme_trainer.parallel.world import World


@dataclass(frozen=True)
class Trained:
    model: LanguageModel
    objective: FewShot
    """Knows the tasks, which of them were held out, and the embeddings that were learned."""
    config: ModelConfig
    step: int


def load(
    uri: str, step: int | None = None, settings: Mapping[str, Any] | None = None, *,
    sequences: int = 1000, device: torch.device | None = None,
) -> Trained:  # fmt: skip
    """The newest good checkpoint under `uri`, or the one of `step`; takes no fence. `settings` replace fields of
    fewShot, as a recipe spells them; `sequences` are computed at once.

    Raises CheckpointError, ConversionError, DataError.
    """
    store = CheckpointStore(uri)
    path, meta = read_meta(store, step)
    config = describe(store, step)
    if "fewShot" not in meta:
        raise EvaluationError(f"{path}: is not of objective few-shot; give --data DIR or --task FILE")
    data, few = meta["data"], {**meta["fewShot"], **(settings or {})}
    # Of the model the configuration says all; the recipe is here for its tasks.
    recipe = Recipe.model_validate({
        "model": {"preset": meta["model"]["preset"]}, "objective": "few-shot", "fewShot": few, "seed": data["seed"],
        "data": {"sources": [{"path": f"tasks://{data['tasks']}"}], "sequenceLength": data["sequenceLength"]},
        "batch": {"tokens": few["examples"] * data["sequenceLength"], "micro": sequences}, "until": {"steps": 1},
    })  # fmt: skip
    device = device or torch.device("cpu")
    objective = FewShot(recipe, config, World(0, 1, 0, 1, device))
    weights = empty_weights(config)
    learned = objective.state_dict()
    found = load_into(store, step, {"model": weights} | ({"objective": learned} if learned else {}))
    with torch.device("meta"):
        model = build(config)
    model.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, assign=True)
    return Trained(model.eval(), objective, config, found)

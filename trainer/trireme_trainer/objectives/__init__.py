"""What is learned: from a micro-batch to gradients, its loss already divided by the whole step's valid tokens."""

from __future__ import annotations

from trireme_api.families import ModelConfig
from trireme_api.recipe import Recipe

from trireme_trainer.objectives.base import Objective
from trireme_trainer.objectives.few_shot import FewShot
from trireme_trainer.objectives.masked_lm import MaskedTokens
from trireme_trainer.objectives.text import NextToken
from trireme_trainer.parallel.world import World

__all__ = ["Objective", "build_objective"]


def build_objective(recipe: Recipe, config: ModelConfig, world: World, compile_backend: str | None) -> Objective:
    """Opens what is trained on, too. Raises DataError where that cannot be."""
    if recipe.objective == "few-shot":
        return FewShot(recipe, config, world)
    if recipe.objective == "masked-lm":
        return MaskedTokens(recipe, config, world, compile_backend)
    return NextToken(recipe, config, world, compile_backend)

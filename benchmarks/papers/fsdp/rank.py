"""One rank that takes two optimiser steps of the recipe and counts every tensor alive; writes JSON to argv[1]-RANK."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from trireme_api.families import check_recipe
from trireme_trainer.data.batches import TextBatches
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.families import build
from trireme_trainer.objectives.causal_lm import CausalLM
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.parallel.initialise import initialise, local_bytes
from trireme_trainer.parallel.live_memory import LiveMemory
from trireme_trainer.parallel.mesh import build_mesh
from trireme_trainer.parallel.shard import Accumulation, shard_model
from trireme_trainer.parallel.world import World
from trireme_trainer.settings import Settings


def main() -> None:
    settings = Settings.from_environment()
    recipe = settings.recipe
    config = check_recipe(recipe)
    world = World.join(settings)
    told: dict[str, int] = {}
    with LiveMemory(world.device) as live:
        with torch.device("meta"):
            model = build(config)
        shard_model(model, recipe, build_mesh(recipe.parallelism, world), world.device, settings.compile_backend)
        initialise(model, recipe.seed)
        told["weights"] = local_bytes(model.parameters())
        told["peakOfInitialisation"] = live.peak
        optimizer = Optimizer(model, recipe.optimizer)
        told["state"] = live.restart()
        objective, accumulation = CausalLM(config.vocabulary_size), Accumulation(model, recipe)
        never = torch.zeros((), device=world.device)
        with TextBatches(Mixture.from_recipe(recipe), recipe, world.rank, world.size) as batches:
            for step in range(2):
                micro_batches = batches.micro_batches(step)
                valid = torch.tensor(float(recipe.batch.tokens), device=world.device)
                for number, batch in enumerate(micro_batches):
                    accumulation.before(number, len(micro_batches))
                    tokens, targets = batch.tokens.to(world.device), batch.targets.to(world.device)
                    objective(model, tokens, targets, valid).backward()  # type: ignore[no-untyped-call]
                optimizer.clip()
                optimizer.step(1e-4, never)
        told["peakOfSteps"] = live.peak
    Path(f"{sys.argv[1]}-{world.rank}").write_text(json.dumps(told))
    world.leave()


main()

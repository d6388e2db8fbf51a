"""Most bytes alive in one training step, counted tensor by tensor in one process that plays one rank of many.

Collectives of the group "fake" return at once and move nothing: sizes, order and lifetimes are those of a real rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from trireme_api.planning import Setting
from trireme_trainer.data.masking import MaskedBatch
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.fewshot.episodes import EpisodeBatches
from trireme_trainer.layers.auxiliary import set_share
from trireme_trainer.objectives.causal_lm import CausalLM
from trireme_trainer.objectives.few_shot import FewShot
from trireme_trainer.objectives.masked_lm import MaskedLM
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.parallel.live_memory import LiveMemory
from trireme_trainer.parallel.mesh import build_expert_mesh, build_mesh, build_tensor_mesh
from trireme_trainer.parallel.shard import Accumulation, shard_model
from trireme_trainer.parallel.world import World

CPU = torch.device("cpu")


def peak(setting: Setting) -> int:
    """Bytes, of the second step: by then everything is there that stays."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=setting.ranks)
    try:
        tensor = setting.recipe.parallelism.tensor
        return _peak(setting, World(0, setting.ranks, 0, setting.per_node, CPU, tensor))
    finally:
        dist.destroy_process_group()


def _peak(setting: Setting, world: World) -> int:
    recipe = setting.recipe
    with LiveMemory(CPU) as live:
        with torch.device("meta"):
            model = build(setting.config)
        mesh, of_experts, of_layers = (
            make(recipe.parallelism, world) for make in (build_mesh, build_expert_mesh, build_tensor_mesh)
        )
        assert mesh is not None
        shard_model(model, recipe, mesh, CPU, "eager", of_experts, of_layers)
        initialise(model, recipe.seed)
        optimizer = Optimizer(model, recipe.optimizer)
        model.train()
        accumulation, learn = Accumulation(model, recipe), _learning(setting, model, world)
        for _ in range(2):
            live.restart()
            turn = accumulation.turns(setting.passes)
            for _ in range(setting.share.micro_batches):
                learn(turn)
            optimizer.clip()
            optimizer.step(1e-3, torch.zeros(()))
        return live.peak


def _learning(setting: Setting, model: LanguageModel, world: World) -> Callable[[Callable[[], None]], None]:
    """One micro-batch, given what to call before each pass."""
    if setting.recipe.objective == "few-shot":
        objective = FewShot(setting.recipe, setting.config, world)
        batches = EpisodeBatches(objective.samples, setting.recipe, world.data_rank, world.data_size)
        batch = batches.make([*range(setting.share.micro_sequences)])
        batches.close()
        valid = torch.tensor(float(setting.recipe.batch.tokens))

        def alternate(turn: Callable[[], None]) -> None:
            objective.learn(model, batch, valid, None, turn)

        return alternate

    def once(turn: Callable[[], None]) -> None:
        turn()
        for member in model.trained():
            _loss(setting, member).backward()  # type: ignore[no-untyped-call]

    return once


def _loss(setting: Setting, model: LanguageModel) -> Tensor:
    recipe, rows, vocabulary = setting.recipe, setting.micro_sequences, setting.config.vocabulary_size
    length = recipe.data.sequence_length
    valid = torch.tensor(float(recipe.batch.tokens))
    set_share(model, 1 / valid)
    tokens = torch.randint(4, vocabulary, (rows, length + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if recipe.objective == "masked-lm":
        chosen = torch.arange(recipe.masks.places(length)) + length * torch.arange(rows)[:, None]
        return MaskedLM(vocabulary)(model, MaskedBatch(inputs, targets, chosen.flatten()), valid)
    return CausalLM(vocabulary)(model, inputs, targets, valid)

"""TAM (2012.09543 Algorithm 1): a task's embedding and the weights are optimised in turn. A reconstruction, see
`trireme_trainer.fewshot`; weights take the recipe's optimiser, embeddings plain gradient steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trireme_api.families import ModelConfig
from trireme_api.recipe import Recipe

from trireme_trainer.data.batches import Batch, Batches
from trireme_trainer.families import LanguageModel
from trireme_trainer.fewshot.embedding import TaskEmbeddings
from trireme_trainer.fewshot.episodes import EpisodeBatch, EpisodeBatches, Episodes
from trireme_trainer.fewshot.evaluate import Few, few_shot
from trireme_trainer.fewshot.inner import answer_losses, answers_of
from trireme_trainer.layers.mode import evaluating
from trireme_trainer.objectives.base import Objective
from trireme_trainer.parallel.world import World


class FewShot(Objective):
    """Each micro-batch is a few whole tasks. Per inner step one pass gives the gradient of each task's embedding, and
    with `outerGrad: accumulate` that of the weights at the same embedding; with `final` the weights' is taken in one
    more pass, at the embeddings after the last step. First order both: embeddings are constants to the weights.

    The loss that is returned is that of the last pass.
    """

    def __init__(self, recipe: Recipe, config: ModelConfig, world: World) -> None:
        self._recipe = recipe
        self._spec = recipe.episodes
        self._world = world
        self.samples: Episodes = Episodes.from_recipe(recipe)
        self.passes = self._spec.passes
        family = self.samples.family
        width = int(getattr(config, "embedding_width", config.width))
        self.embeddings = TaskEmbeddings(self._spec.embedding, family.tasks, family.primitives, width).to(world.device)

    def batches(self, rank: int, world: int, pin_memory: bool) -> Batches:
        return EpisodeBatches(self.samples, self._recipe, rank, world, pin_memory)

    def learn(
        self, model: LanguageModel, batch: Batch, valid: Tensor, scale: Tensor | None, before_pass: Callable[[], None]
    ) -> Tensor:
        assert isinstance(batch, EpisodeBatch)
        spec, episodes = self._spec, len(batch.tasks)
        examples = len(batch.tokens) // episodes
        answers_E1 = answers_of(batch.targets.view(episodes, examples, -1))
        begin_ED = self.embeddings.of([0 if task is None else task for task in batch.tasks])
        z_ED, loss = begin_ED, torch.zeros(())
        for step in range(self.passes):
            before_pass()
            z_ED = z_ED.detach().requires_grad_(True)
            z_BD = z_ED.repeat_interleave(examples, dim=0)
            loss = answer_losses(model, batch.tokens, batch.targets, z_BD).sum() / valid
            scaled = loss if scale is None else loss * scale
            last = step == spec.inner_steps
            if spec.outer_grad == "accumulate" or last:
                scaled.backward()  # type: ignore[no-untyped-call]
                gradient = z_ED.grad
            else:
                (gradient,) = torch.autograd.grad(scaled, [z_ED])
            if not last:
                assert gradient is not None
                # Of the mean over the task's own answers: what the rest of the batch is, and fp16's scale, drop out.
                gradient = gradient * (valid if scale is None else valid / scale) / answers_E1
                z_ED = z_ED.detach() - spec.inner_learning_rate * gradient
        if self.embeddings.keeps:
            for number, task in enumerate(batch.tasks):
                if task is not None:
                    self.embeddings.went(task, z_ED[number].detach() - begin_ED[number])
        return loss.detach()

    def trained_tokens(self, valid: float) -> float:
        """All of the step's, prompts included; each once, however many passes."""
        return float(self._recipe.batch.tokens)

    def after_step(self, skip: Tensor) -> None:
        if self.embeddings.keeps:
            moved = self.embeddings.moved
            self.embeddings.apply(self._world.sum([moved])[0], skip)

    def state_dict(self) -> dict[str, Tensor]:
        return {"embeddings": self.embeddings.table} if self.embeddings.keeps else {}

    def described(self) -> dict[str, Any]:
        return {"fewShot": self._spec.model_dump(mode="json", by_alias=True)}

    def reset(self) -> None:
        self.embeddings.reset()

    def due(self, step: int, last: bool) -> bool:
        every = self._spec.evaluate_every
        return last or (every is not None and step % every == 0)

    def evaluate(self, model: LanguageModel, alive: Callable[[], None]) -> dict[str, Any]:
        """Answers to queries of held-out tasks by number of examples adapted with, tasks dealt to ranks in turn: every
        rank makes as many passes, and a task of padding counts nothing."""
        spec, samples, world = self._spec, self.samples, self._world
        at_once = max(1, self._recipe.batch.micro // max(spec.queries, *spec.shots))
        rounds = -(-len(samples.held_out) // world.data_size)
        places = [number * world.data_size + world.data_rank for number in range(rounds)]
        counted = torch.zeros(len(spec.shots), 3, dtype=torch.float64)
        with evaluating(model):
            for first in range(0, len(places), at_once):
                part = places[first : first + at_once]
                tasks = [samples.held_out[place % len(samples.held_out)] for place in part]
                real = torch.tensor([[float(place < len(samples.held_out))] for place in part], dtype=torch.float64)
                for row, shots in enumerate(spec.shots):
                    for draw in range(spec.draws if shots else 1):
                        alive()
                        how = Few(shots, spec.adaptation_steps, spec.inner_learning_rate, spec.queries, draw)
                        counted[row] += (self.learned_from(model, tasks, how) * real).sum(0)
        right, asked, loss = world.sum(counted.flatten().tolist()).view(-1, 3).T.tolist()
        return {
            "tasks": samples.family.name, "heldOut": len(samples.held_out), "shots": spec.shots,
            "accuracy": [round(r / a, 6) for r, a in zip(right, asked, strict=True)],
            "answerLoss": [round(x / a, 6) for x, a in zip(loss, asked, strict=True)],
        }  # fmt: skip

    def learned_from(self, model: LanguageModel, tasks: list[int], how: Few) -> Tensor:
        """What `how.shots` examples of each task tell of its queries, on the host: [tasks, 3] as `counts` has it."""
        begin_ED = torch.stack([self.embeddings.unseen(task, self.samples.trained) for task in tasks])
        return few_shot(model, self.samples, tasks, begin_ED, how)

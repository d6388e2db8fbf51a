"""What TAM is compared with, on the same tasks and network: for one process and for measurements.

Two more baselines are TAM's own objective by other settings, so that they train as any job does: `NO_ADAPTATION` and
`MULTITASK`. Which weights, temperature and share of noise suit is ours throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from trireme_api.families import ModelConfig
from trireme_api.recipe import Recipe

from trireme_trainer.data.batches import Batch
from trireme_trainer.data.order import derive
from trireme_trainer.families import LanguageModel
from trireme_trainer.fewshot.embedding import task_token
from trireme_trainer.fewshot.episodes import EpisodeBatch
from trireme_trainer.fewshot.evaluate import Few, counts
from trireme_trainer.fewshot.inner import answer_losses, answers_of
from trireme_trainer.fewshot.tasks import IGNORED
from trireme_trainer.objectives.few_shot import FewShot
from trireme_trainer.parallel.world import World

NO_ADAPTATION: dict[str, Any] = {"innerSteps": 0, "outerGrad": "final", "shots": [0]}
"""One network for all tasks: the token's embedding stays zero (the paper's task-agnostic Transformer)."""
MULTITASK: dict[str, Any] = {"innerSteps": 1, "outerGrad": "accumulate", "embedding": "persist"}
"""An embedding per training task, learned jointly with the weights: one pass gives the gradients of both. An unseen
task begins at their mean and fits its embedding as TAM does."""


class Cavia(FewShot):
    """CAVIA: as TAM with `outerGrad: final`, but the weights' gradient goes through the steps on the embedding (second
    order). The original takes it on other examples than those steps; here, as in TAM, on the same (ours)."""

    def learn(
        self, model: LanguageModel, batch: Batch, valid: Tensor, scale: Tensor | None, before_pass: Callable[[], None]
    ) -> Tensor:
        assert isinstance(batch, EpisodeBatch)
        assert scale is None, "fp16 is not built here"
        examples = len(batch.tokens) // len(batch.tasks)
        answers_E1 = answers_of(batch.targets.view(len(batch.tasks), examples, -1))
        z_ED = self.embeddings.of([task or 0 for task in batch.tasks]).requires_grad_(True)

        def summed(z_ED: Tensor) -> Tensor:
            return answer_losses(model, batch.tokens, batch.targets, z_ED.repeat_interleave(examples, dim=0)).sum()

        # The fused kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            for _ in range(self._spec.inner_steps):
                (gradient,) = torch.autograd.grad(summed(z_ED), [z_ED], create_graph=True)
                z_ED = z_ED - self._spec.inner_learning_rate * gradient / answers_E1
            loss = summed(z_ED) / valid
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class MatchingNetworks(FewShot):
    """An answer is looked up among those of the k examples: p(y) = Σ_j a_j [y_j = y], a the softmax of cosines between
    the network's last hidden states where the answers are read. Nothing is fitted to a task.

    The original labels whole inputs; of answers of several tokens each is looked up by its own place, after the right
    ones before it (ours). So are temperature, and noise that keeps an answer never seen possible. Each episode is cut
    into examples known and examples asked for, at a place drawn anew each time.
    """

    TEMPERATURE, NOISE = 0.1, 0.01

    def __init__(self, recipe: Recipe, config: ModelConfig, world: World) -> None:
        super().__init__(recipe, config, world)
        if min(self._spec.shots) < 1:
            raise ValueError("fewShot.shots: Matching Networks know nothing without examples; leave out 0")
        self.passes = 1
        self._cuts = np.random.Generator(np.random.SFC64(derive(recipe.seed)))

    def learn(
        self, model: LanguageModel, batch: Batch, valid: Tensor, scale: Tensor | None, before_pass: Callable[[], None]
    ) -> Tensor:
        assert isinstance(batch, EpisodeBatch)
        assert scale is None, "fp16 is not built here"
        examples = len(batch.tokens) // len(batch.tasks)
        known = int(self._cuts.integers(1, examples))
        asked_BT = batch.targets != IGNORED
        each = asked_BT.view(len(batch.tasks), -1).sum(1).tolist()
        places = torch.split(self._places(model, batch.tokens, asked_BT), each)
        loss = torch.zeros(())
        for of_task_ND, targets_JT in zip(places, batch.targets.view(len(places), examples, -1), strict=True):
            cut = int((targets_JT[:known] != IGNORED).sum())
            answers_N = targets_JT[targets_JT != IGNORED]
            log_p_NV = self._looked_up(of_task_ND[:cut], answers_N[:cut], of_task_ND[cut:])
            loss = loss + F.nll_loss(log_p_NV, answers_N[cut:], reduction="sum")
        # Of the examples asked for, a share of all.
        loss = loss / valid * examples / (examples - known)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def learned_from(self, model: LanguageModel, tasks: list[int], how: Few) -> Tensor:
        found, samples = [], self.samples
        for task in tasks:
            tokens, targets = samples.supports([task], how.shots, how.draw, self._world.device)
            asked_tokens, asked = samples.all_queries([task], how.queries, self._world.device)
            known_ND = self._places(model, tokens, targets != IGNORED)
            asked_MD = self._places(model, asked_tokens, asked != IGNORED)
            log_p_MV = self._looked_up(known_ND, targets[targets != IGNORED], asked_MD)
            found.append(counts(log_p_MV, asked, 1).cpu())
        return torch.cat(found)

    def _places(self, model: LanguageModel, tokens_BT: Tensor, asked_BT: Tensor) -> Tensor:
        """Last hidden state where each answer token is read, in order, [answers, D]."""
        blank_BD = self.embeddings.table.new_zeros(len(tokens_BT), self.embeddings.table.shape[1])
        with task_token(model, blank_BD):
            out: Tensor = model(tokens_BT, lambda hidden_BTD, _: hidden_BTD[asked_BT])
        return out

    def _looked_up(self, known_ND: Tensor, answers_N: Tensor, asked_MD: Tensor) -> Tensor:
        """Log-probabilities, [asked, V]."""
        size = self.samples.vocabulary_size
        cosines_MN = F.normalize(asked_MD.float(), dim=-1) @ F.normalize(known_ND.float(), dim=-1).T
        p_MV = (cosines_MN / self.TEMPERATURE).softmax(-1) @ F.one_hot(answers_N, size).float()
        return ((1 - self.NOISE) * p_MV + self.NOISE / size).log()

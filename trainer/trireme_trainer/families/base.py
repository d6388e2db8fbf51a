"""What the training loop, the parallelism and the checkpoints may expect of any model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn
from trireme_api.families import ModelConfig

from trireme_trainer.layers.init import InitialValue

Project = Callable[[Tensor], Tensor]
"""hidden [..., D] → logits [..., V]; may be called on any part of the hidden states, any number of times."""
Head = Callable[[Tensor, Project], Tensor]
"""(hidden_BTD, project) → what the forward pass returns, as a loss that never holds all logits at once."""


class Positions(Protocol):
    """Ranks with the same hidden states share the output layer out: each takes it of its own positions."""

    ranks: int

    def own(self, rows: Tensor) -> Tensor:
        """Of a tensor with a row for each position those of this rank's."""

    def all(self, own: Tensor, count: int) -> Tensor:
        """The rows of all `count` positions, from each rank's own. Collective, as is `sum`."""

    def sum(self, part: Tensor) -> Tensor:
        """Over the ranks."""


class LanguageModel(nn.Module):
    """Built under `torch.device("meta")`: weights come from `initial_value` or a checkpoint, not from a constructor."""

    config: ModelConfig
    blocks: nn.ModuleList
    """Transformer blocks in order: the units that are sharded, compiled and recomputed."""
    shared_positions: Positions | None = None
    """Set where other ranks have the same hidden states. A gradient of what lies outside the blocks is then divided by
    their number, for each is taken to have all of it."""

    def parts(self) -> Sequence[LanguageModel]:
        """Of an ensemble its members; else the model itself. Each is spread over ranks, called and trained by itself:
        outside of them there are no parameters."""
        return [self]

    def trained(self) -> Sequence[LanguageModel]:
        """Of these, the ones that learn, each from a loss of its own."""
        return self.parts()

    @abstractmethod
    def forward(self, tokens_BT: Tensor, head: Head | None = None, mask_BT: Tensor | None = None) -> Tensor:
        """Logits BTV, or `head(hidden_BTD, project)` where a head is given: run inside this forward pass, while the
        weights that sharding gathers for it are there. `mask_BT`: non-zero on real tokens, for padded evaluation
        batches; positions skip padding on either side."""

    def figures(self) -> dict[str, Tensor]:
        """What layers tell of the last forward pass, by the name it has in the step log: [], fp32, detached. The same
        names in each step."""
        return {}

    @abstractmethod
    def initial_value(self, name: str) -> InitialValue:
        """The rule for the parameter `name` as `named_parameters()` of the bare model has it; KeyError for others."""

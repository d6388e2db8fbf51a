"""Ensembles of gpt models (arXiv 2106.09563); a reconstruction, see their configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trireme_api.families.ensemble import EnsembleConfig

from trireme_trainer.families.base import Head, LanguageModel, Project
from trireme_trainer.families.gpt import GptModel
from trireme_trainer.layers.init import InitialValue


class EnsembleModel(LanguageModel):
    """The forward pass is the averaged prediction, which is evaluated; members are trained one by one. The hidden
    state of a token is that of all members side by side, so that a head that takes logits in chunks averages them in
    chunks."""

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList()
        self._members = [GptModel(config.member) for _ in range(config.members)]
        self.members = nn.ModuleList(self._members)
        self._width, self._logits = config.width, config.trains == "newest"
        for older in self._members[: -config.turns]:
            older.requires_grad_(False)

    def parts(self) -> Sequence[LanguageModel]:
        return self._members

    def trained(self) -> Sequence[LanguageModel]:
        return [member for member in self._members if next(member.parameters()).requires_grad]

    def forward(self, tokens_BT: Tensor, head: Head | None = None, mask_BT: Tensor | None = None) -> Tensor:
        hidden = torch.cat([member(tokens_BT, _hidden, mask_BT) for member in self._members], dim=-1)
        return self.project(hidden) if head is None else head(hidden, self.project)

    def project(self, hidden: Tensor) -> Tensor:
        """[..., members · width] → logits [..., V], fp32: the mean of the members' logits where the newest alone is
        trained, else logarithms of the mean of their probabilities."""
        total: Tensor | None = None
        for member, own in zip(self._members, torch.split(hidden, self._width, dim=-1), strict=True):
            logits = member.project(own).float()
            if self._logits:
                total = logits if total is None else total + logits
            else:
                likely = F.log_softmax(logits, dim=-1)
                total = likely if total is None else torch.logaddexp(total, likely)
        assert total is not None
        return total / len(self._members) if self._logits else total - math.log(len(self._members))

    def initial_value(self, name: str) -> InitialValue:
        """A member's are those of its family, drawn by its own names: so each has values of its own."""
        head, _, rest = name.partition(".")
        number, _, inside = rest.partition(".")
        if head != "members" or not number.isdecimal() or int(number) >= len(self._members):
            raise KeyError(f"{self.config.family} has no parameter named {name!r}")
        return self._members[int(number)].initial_value(inside)


def _hidden(hidden_BTD: Tensor, project: Project) -> Tensor:
    return hidden_BTD

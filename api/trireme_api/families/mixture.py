"""Mixtures of feed-forward experts in place of a feed-forward layer: the numbers of one, in whatever network."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal, Self

from pydantic import Field, model_validator

from trireme_api.families.activations import SINGLE, BlockMemory, Pass, PerToken
from trireme_api.families.base import ModelConfig
from trireme_api.schema import PositiveFloat, PositiveInt

Router = Literal["top-2", "top-1", "hash", "base"]

CHOICES = MappingProxyType({"top-2": 2, "top-1": 1, "hash": 1, "base": 1})
"""Experts that take each token."""
_CAPACITY = MappingProxyType({"top-2": 2.0, "top-1": 1.25, "hash": 1.25, "base": 1.0})


class MixtureConfig(ModelConfig):
    experts: PositiveInt = 512
    """In each mixture; each is a feed-forward layer of feedForwardWidth."""
    router: Router = "top-2"
    """Who chooses a token's experts. top-2: GShard's gate as fairseq has it, without noise. top-1: Switch's. hash: the
    token itself, by a fixed hash. base: BASE's balanced assignment in training, the nearest expert at evaluation."""
    feed_forward_width: PositiveInt = Field(default_factory=lambda data: 4 * data["width"])
    capacity: Literal["limited", "dropless"] = "limited"
    """limited: an expert takes at most capacityFactor·ceil(S / experts) of the S tokens of a micro-batch; what is
    beyond is dropped, and only the residual goes on. dropless: all of them."""
    capacity_factor: PositiveFloat = Field(default_factory=lambda data: _CAPACITY[data["router"]])
    """Left out: 2 for top-2, 1.25 for top-1 and hash; 1 for base, which then drops nothing."""
    evaluation_capacity: float = Field(default=1.0, gt=0, le=1)
    """At evaluation an expert takes at most this share of the tokens; 1 drops none, so that a score does not depend on
    the batch it is in."""
    gate_loss_weight: float = Field(default=0.01, ge=0)
    """Of the balance loss, summed over the mixtures; top-2 and top-1 have one."""
    expert_gradients: Literal["root", "mean"] = "root"
    """root: gradients of experts are √experts times the mean over all tokens, as the authors of 2112.10684 leave them
    (their code divides the sum by √experts, not by experts). mean: as all other gradients."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.experts < self.choices:
            raise ValueError(
                f"experts must be at least {self.choices}, one for each choice of a token; got {self.experts}"
            )
        return self

    @property
    def choices(self) -> int:
        return CHOICES[self.router]

    def expert_parameters(self) -> int:
        """Of one expert."""
        d, f = self.width, self.feed_forward_width
        return 2 * d * f + f + d

    def gate_parameters(self) -> int:
        """Of one mixture's router."""
        return 0 if self.router == "hash" else self.width * self.experts

    def mixture_parameters(self) -> int:
        """Of one mixture: its experts and its router."""
        return self.experts * self.expert_parameters() + self.gate_parameters()

    def idle_parameters(self) -> int:
        """Of one mixture: those of the experts that a token does not go through."""
        return (self.experts - self.choices) * self.expert_parameters()

    def places(self, tokens: int) -> int:
        """Rows that the experts of a mixture take in training, filled or not, of a micro-batch of `tokens`."""
        if self.capacity == "dropless":
            return self.choices * tokens
        limit = max(1, int(self.capacity_factor * -(-tokens // self.experts)))
        return self.experts * min(tokens, limit)

    def mixture_memory(self, one: Pass) -> BlockMemory:
        d, f, rows = self.width, self.feed_forward_width, self.places(one.tokens) / one.tokens
        # Each choice's copy of the token, the rows experts take, and their results by choice; gate logits in fp32.
        sent = 0 if self.capacity == "dropless" else self.choices * d
        gate = PerToken(single=2 * self.experts + d * (one.value_bytes != SINGLE))
        # A rank of a tensor group has all rows and runs those of its own experts.
        own = rows / one.tensor
        kept = PerToken(values=sent + rows * d + self.choices * d + own * 2 * f) + gate
        return BlockMemory(kept, PerToken(values=own * f + rows * d + d), self.experts * d * f // one.tensor)

    def mixture_flops_per_token(self) -> float:
        """Forward, of one mixture."""
        return float(self.choices * 2 * 2 * self.width * self.feed_forward_width + 2 * self.gate_parameters())

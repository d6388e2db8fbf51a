"""How a model is spread over ranks: `recipe.parallelism`."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from trireme_api.schema import InvalidSpec, PositiveInt, Spec


class PrefetchSpec(Spec):
    """How many units (blocks) are gathered ahead of the one at work (FSDP paper §3.3.2–3). It is the limit of what is
    gathered at once as well (§3.4.2)."""

    forward: int = Field(default=0, ge=0, le=8)
    """0: in the order in which the host reaches them, which on a GPU runs ahead by itself, one unit at most. n: n units
    are asked for before the one at work computes; for hosts too slow to run ahead."""
    backward: int = Field(default=1, ge=0, le=8)
    """In the reverse order of the forward pass, each before the gradients of the unit at work are reduced. 0: each at
    its own turn, after that reduction."""


class ParallelismSpec(Spec):
    shard: Literal["full", "hybrid", "grad-op"] = "full"
    """FSDP paper §3.2: full = reshard after forward, grad-op = keep parameters until backward, hybrid = shard inside a
    group of `shardSize` ranks and replicate across groups."""
    shard_size: PositiveInt | None = None
    """Ranks per shard group for `hybrid`, the paper's sharding factor; left out: the ranks of one node. 1: every rank
    holds the whole model, as under DDP."""
    reshard_after_forward: bool | None = None
    """Whether a block gives its gathered parameters back after the forward pass and gathers them again for the backward
    (the paper's RAF and NRAF, §5.4). Left out: no for grad-op, yes otherwise."""
    accumulation: Literal["auto", "communicate", "local"] = "auto"
    """Gradients of a step's micro-batches, §3.3.4. communicate: reduced after each, so that only shards are kept.
    local: kept whole on every rank and reduced after the last. auto: local for grad-op; communicate for full; for
    hybrid inside a group after each and between groups after the last."""
    expert: PositiveInt = 1
    """Ranks that share out the experts of each mixture, consecutive ones: each keeps experts / N of them, tokens travel
    to their experts and back. Divides the experts, and the ranks of every size the gang may have. All other weights
    stay sharded over all of these ranks."""
    tensor: PositiveInt = 1
    """Ranks that compute each layer together, consecutive ones: each has heads / N of attention and feedForwardWidth /
    N of the feed-forward layers, of a mixture experts / N; all of them read the same sequences. Divides these numbers,
    and the ranks of every size the gang may have; best within a machine. Not with `expert`."""
    prefetch: PrefetchSpec = PrefetchSpec()
    log_collectives: bool = False
    """The collectives of the first step in their order go to the step log, and must be the same on every rank."""

    @property
    def reshards_after_forward(self) -> bool:
        return self.shard != "grad-op" if self.reshard_after_forward is None else self.reshard_after_forward

    def shard_ranks(self, ranks: int, per_node: int) -> int:
        """Ranks that one copy of the model is spread over.

        For `hybrid` the wish (`shardSize`, or the ranks of a node) is rounded up to a divisor of the world size: a gang
        that came back smaller still runs, and no rank ever holds more than was asked for. It is a multiple of `expert`,
        which divides the world size (`check_ranks`).
        """
        if self.shard != "hybrid":
            return ranks
        wish = min(self.shard_size or per_node, ranks)
        whole = self.expert * self.tensor
        return next(size for size in range(wish, ranks + 1) if ranks % size == 0 and size % whole == 0)

    @property
    def accumulates_locally(self) -> bool:
        """Whether whole gradients stay on a rank between the micro-batches of a step."""
        return self.accumulation == "local" or (self.accumulation == "auto" and self.shard == "grad-op")

    @property
    def groups(self) -> dict[str, int]:
        """Ranks of each kind of group that must be whole at every size of the gang, by the field that asks for them."""
        return {"expert": self.expert, "tensor": self.tensor}

    def check_ranks(self, ranks: int, path: str = "") -> None:
        """Raises InvalidSpec where so many ranks cannot be arranged. `path` is where the recipe stands in the YAML."""
        for field, size in self.groups.items():
            if ranks % size:
                fitting = math.gcd(ranks, size)
                raise InvalidSpec(
                    f"{path}parallelism.{field}",
                    f"{size} does not divide {ranks} ranks; start a multiple of {size}, or set {fitting}",
                )

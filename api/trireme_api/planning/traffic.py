"""Bytes that one device receives in a step, and the seconds they take at the least.

Collectives of FSDP2 as docs/parallelism.md has them, in rings: of n ranks each receives (n - 1) / n of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from trireme_api.devices import Board
from trireme_api.families.memory import MASTER_BYTES, compute_bytes
from trireme_api.planning.setting import Setting

LINK_SHARE = 0.8
"""Of a link's data sheet figure that a collective reaches; NCCL's own tests reach 0.75 to 0.9. An assumption."""


@dataclass(frozen=True)
class Traffic:
    """Bytes per device and optimiser step."""

    gathers: float
    """Parameters, all-gathered."""
    reductions: float
    """Gradients, reduce-scattered inside a shard group and all-reduced between groups."""
    tokens: float
    """Of mixtures of experts, sent to their experts and back."""
    inside: float
    """Of all these, bytes that stay in a machine."""
    outside: float

    @property
    def total(self) -> float:
        return self.gathers + self.reductions + self.tokens

    def seconds(self, board: Board) -> float:
        """A ring over many machines uses all of a machine's adapters at once."""
        wide = min(board.link, board.network * board.per_node)
        return (self.inside / board.link + self.outside / wide) / LINK_SHARE


def of(setting: Setting) -> Traffic:
    config, spread, parallelism = setting.config, setting.spread, setting.recipe.parallelism
    low, shards, experts = compute_bytes(setting.recipe.precision), spread.shards, spread.experts
    units = [config.unit(index) for index in range(config.layers)]
    routed = sum(unit.routed for unit in units)
    shared = config.parameters().total - routed
    root = shared - sum(unit.shared for unit in units)
    times = spread.micro_batches

    def received(blocks: float, outer: float) -> tuple[float, float]:
        """(shared, routed) parameters that a rank receives when every unit is gathered `blocks` times, the root
        `outer` times."""
        of_shared = _ring(shards) * ((shared - root) * blocks + root * outer)
        return of_shared, _ring(shards // experts) * routed / experts * blocks

    kept_between = spread.accumulates_locally and not spread.reshards
    passes = 1 if kept_between else times
    gathers = low * sum(received(passes * (2 if spread.reshards else 1), passes))
    sums = 1 if spread.accumulates_locally else times
    inside_group = MASTER_BYTES * sum(received(sums, sums))
    groups = setting.ranks // shards
    between_often = 1 if parallelism.accumulation != "communicate" else times
    between = 2 * _ring(groups) * MASTER_BYTES * (shared + routed) / shards * between_often
    tokens = 0.0
    if experts > 1:
        rows = setting.micro_batch.tokens * _rows(setting)
        # There and back, forward and backward; and forward once more where it is computed again.
        trips = 6 if spread.activation_checkpointing else 4
        mixtures = sum(unit.routed > 0 for unit in units)
        tokens = low * config.width * rows * trips * mixtures * times * (experts - 1) / experts
    within = shards <= setting.per_node
    inside = (gathers + inside_group if within else 0.0) + (tokens if experts <= setting.per_node else 0.0)
    total = gathers + inside_group + between + tokens
    return Traffic(gathers, inside_group + between, tokens, inside, total - inside)


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _rows(setting: Setting) -> float:
    """Rows that travel for each token of a micro-batch."""
    places = getattr(setting.config, "places", None)
    tokens = setting.micro_batch.tokens
    return places(tokens) / tokens if places else 0.0

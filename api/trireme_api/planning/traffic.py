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
    sums: float
    """Inside tensor groups: of what their ranks give and of its gradients."""
    inside: float
    """Of all these, bytes that stay in a machine."""
    outside: float

    @property
    def total(self) -> float:
        return self.gathers + self.reductions + self.tokens + self.sums

    def seconds(self, board: Board) -> float:
        return _seconds(self.inside, self.outside, board)

    def seconds_of_sums(self, board: Board, within: bool) -> float:
        """Of these; `within`: tensor groups are inside a machine."""
        return _seconds(self.sums * within, self.sums * (not within), board)


def _seconds(inside: float, outside: float, board: Board) -> float:
    """A ring over many machines uses all of a machine's adapters at once."""
    wide = min(board.link, board.network * board.per_node)
    return (inside / board.link + outside / wide) / LINK_SHARE


def of(setting: Setting) -> Traffic:
    config, spread, parallelism = setting.config.member, setting.spread, setting.recipe.parallelism
    low, shards, experts = compute_bytes(setting.recipe.precision), spread.shards, spread.experts
    units = [config.unit(index) for index in range(config.layers)]
    root = config.parameters().total - sum(unit.shared + unit.routed for unit in units)
    dense = sum(unit.gathered(spread.tensor) for unit in units)
    routed = sum(unit.gathered_experts(experts, spread.tensor) for unit in units)
    kept = root / shards + sum(unit.kept(shards, spread.tensor) for unit in units)
    times, turns = setting.passes, setting.config.turns

    def received(blocks: float, outer: float) -> float:
        """Parameters that a rank receives when every unit is gathered `blocks` times, the root `outer` times."""
        of_blocks = _ring(shards // spread.tensor) * dense + _ring(shards // (experts * spread.tensor)) * routed
        return of_blocks * blocks + _ring(shards) * root * outer

    kept_between = spread.accumulates_locally and not spread.reshards
    passes = 1 if kept_between else times
    gathers = turns * low * received(passes * (2 if spread.reshards else 1), passes)
    sums = 1 if spread.accumulates_locally else spread.reductions
    inside_group = turns * MASTER_BYTES * received(sums, sums)
    groups = setting.ranks // shards
    between_often = 1 if parallelism.accumulation != "communicate" else spread.reductions
    between = turns * 2 * _ring(groups) * MASTER_BYTES * kept * between_often
    tokens = 0.0
    if experts > 1:
        rows = setting.micro_batch.tokens * _rows(setting)
        # There and back, forward and backward; and forward once more where it is computed again.
        trips = 6 if spread.activation_checkpointing else 4
        mixtures = sum(unit.routed > 0 for unit in units)
        tokens = low * config.width * rows * trips * mixtures * times * (experts - 1) / experts
    layers = _tensor_sums(setting)
    inside = (
        (gathers + inside_group if shards <= setting.per_node else 0.0)
        + (tokens if experts <= setting.per_node else 0.0)
        + (layers if spread.tensor <= setting.per_node else 0.0)
    )
    total = gathers + inside_group + between + tokens + layers
    return Traffic(gathers, inside_group + between, tokens, layers, inside, total - inside)


def _tensor_sums(setting: Setting) -> float:
    """All-reduces inside a tensor group: of what each sub-layer gives, and of the gradients of what it is given; at the
    end of the latter for the output layer. What is a few numbers a token (norms, losses) is not counted."""
    tensor, one = setting.spread.tensor, setting.micro_batch
    # Computed again, a sub-layer sums again, but for a block's last: what a dense one gives, no gradient needs.
    again = setting.recipe.activation_checkpointing
    rows = 0.0
    for index in range(setting.config.layers):
        rows += one.tokens * (2 + again)
        rows += one.tokens * _rows(setting) * (2 + again) if setting.config.unit(index).routed else one.tokens * 2
    rows += setting.places or one.tokens
    summed = setting.passes * rows * setting.config.width * compute_bytes(setting.recipe.precision)
    return 2 * _ring(tensor) * summed


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _rows(setting: Setting) -> float:
    """Rows that travel for each token of a micro-batch."""
    places = getattr(setting.config, "places", None)
    tokens = setting.micro_batch.tokens
    return places(tokens) / tokens if places else 0.0

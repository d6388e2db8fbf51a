"""Bytes on one device in training under FSDP2: arithmetic, no measurement. benchmarks/plan holds it against tensors
counted alive in real steps; docs/plan.md says what is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trireme_api.families.activations import Pass as Pass
from trireme_api.families.activations import PerToken
from trireme_api.families.base import ModelConfig

Precision = Literal["fp32", "bf16", "fp16"]

MASTER_BYTES = 4
"""Sharded weights, reduced gradients and both AdamW moments stay fp32 in every precision."""
LOGITS_BYTES = 1 << 29
"""Of fp32 logits alive at once: 2,669 tokens at vocabulary 50,272."""
LOGITS_COPIES = 3
"""Logarithms of probabilities, their gradient, and that of the logits."""


def positions_at_once(vocabulary_size: int, logits_bytes: int = LOGITS_BYTES) -> int:
    """Of which the loss, and evaluation, have logits alive; the rest waits its turn."""
    return max(1, logits_bytes // (4 * vocabulary_size))


def compute_bytes(precision: Precision) -> int:
    """Bytes of one gathered parameter."""
    return 4 if precision == "fp32" else 2


@dataclass(frozen=True)
class StateMemory:
    """Bytes per device that stay from step to step, gradients included."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_memory(config: ModelConfig, shards: int = 1) -> StateMemory:
    """`shards`: ranks one copy of the model is spread over; the largest shard where they do not divide evenly."""
    if shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}")
    weights, trained = (
        MASTER_BYTES * -(-number // shards) for number in (config.parameters().total, config.trained_parameters)
    )
    return StateMemory(weights=weights, gradients=trained, optimizer=2 * trained)


def checkpoint_bytes(config: ModelConfig) -> int:
    """Of one checkpoint: weights and both moments, fp32."""
    state = state_memory(config)
    return state.weights + state.optimizer


@dataclass(frozen=True)
class Spread:
    """How ranks hold a model and take a step through it."""

    shards: int
    """Ranks one copy of the model is spread over."""
    experts: int = 1
    """Of these, ranks that share out the experts."""
    tensor: int = 1
    """Of these, ranks that compute each layer together."""
    reshards: bool = True
    """Whether a block gives its parameters back after the forward pass."""
    prefetch: int = 1
    """Blocks gathered ahead in the backward pass."""
    reductions: int = 1
    """Backward passes of one step that reach the weights, on the rank with the most: one a micro-batch, of few-shot
    several."""
    accumulates_locally: bool = False
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class Moment:
    """Bytes alive on one device at one moment of a step."""

    when: str
    weights: float
    optimizer: float
    gradients: float
    """Reduced ones; or whole ones that are kept between micro-batches."""
    activations: float
    unsharded: float
    """Gathered parameters, their gradients before reduction, and the buffers both travel in."""

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.gradients + self.activations + self.unsharded


def peak(config: ModelConfig, spread: Spread, one: Pass, places: int | None = None) -> Moment:
    """The moment of a step with the most bytes. `places`: of the micro-batch's tokens those with logits; left out:
    all."""
    alone = max(_Timeline(config.member, spread, one, places or one.tokens).moments(), key=lambda moment: moment.total)
    return alone if config.member is config else _beside_others(config, spread, one, alone)


def _beside_others(config: ModelConfig, spread: Spread, one: Pass, alone: Moment) -> Moment:
    """The last member's turn: of the others there are weights and moments, and of those that had their turn gradients,
    whole ones and gathered parameters where these are kept between micro-batches."""
    whole, member = state_memory(config, spread.shards), state_memory(config.member, spread.shards)
    kept = spread.reductions > 1 and spread.accumulates_locally
    had_turns = (config.turns - 1) * config.member.parameters().total
    gradients = MASTER_BYTES * had_turns if kept else whole.gradients - member.gradients
    gathered = one.value_bytes * had_turns if kept and not spread.reshards else 0
    return Moment(
        when=alone.when,
        weights=alone.weights + whole.weights - member.weights,
        optimizer=alone.optimizer + whole.optimizer - member.optimizer,
        gradients=alone.gradients + gradients,
        activations=alone.activations,
        unsharded=alone.unsharded + gathered,
    )


class _Timeline:
    """The last micro-batch of a step, block by block."""

    def __init__(self, config: ModelConfig, spread: Spread, one: Pass, places: int) -> None:
        self._config, self._spread, self._one, self._places = config, spread, one, places
        self._low = one.value_bytes
        blocks = range(config.layers)
        units = [config.unit(index) for index in blocks]
        parts = [(u.gathered(spread.tensor), u.gathered_experts(spread.experts, spread.tensor)) for u in units]
        self._own = [sum(part) for part in parts]
        """Parameters of each block that a rank gathers."""
        travels = spread.shards > spread.tensor
        routed_travels = spread.shards > spread.experts * spread.tensor
        self._buffer = [shared * travels + routed * routed_travels for shared, routed in parts]
        """Those that come through a buffer."""
        # Blocks with experts of their own unit reduce these first; the buffer that waits is the rest's.
        self._held = [shared if spread.experts > 1 else shared + routed for shared, routed in parts]
        self._sharded = [unit.kept(spread.shards, spread.tensor) for unit in units]
        whole = sum(unit.shared + unit.routed for unit in units)
        self._root = config.parameters().total - whole
        self._tied = config.tied_parameters()
        self._memory = [config.block_memory(index, one) for index in blocks]
        self._input = PerToken(values=config.width).bytes(one)
        state = state_memory(config, spread.shards)
        # Of what a tensor group does not divide each of its ranks has a copy.
        copies = (spread.tensor - 1) * sum(unit.undivided for unit in units) / spread.shards
        self._weights = state.weights + MASTER_BYTES * copies
        self._optimizer = state.optimizer + 2 * MASTER_BYTES * copies
        self._carried = 0.0
        if spread.reductions > 1:
            every = sum(self._own) + self._root
            self._carried = MASTER_BYTES * every if spread.accumulates_locally else self._weights

    def moments(self) -> Iterator[Moment]:
        yield self._loss()
        for index in reversed(range(self._config.layers)):
            yield from self._backward(index)
        sharded = MASTER_BYTES * (sum(self._sharded) + self._root / self._spread.shards)
        yield self._at("update", 0.0, 0.0, sharded)

    def _at(self, when: str, activations: float, unsharded: float, gradients: float) -> Moment:
        gradients = max(gradients, self._carried) if when != "update" else gradients
        return Moment(when, self._weights, self._optimizer, gradients, activations, unsharded)

    def _loss(self) -> Moment:
        """All activations, and the logits; it runs inside the forward pass, while the root is gathered."""
        last = self._config.layers - 1
        own = -(-self._places // self._spread.tensor)
        chunk = min(own, positions_at_once(self._config.vocabulary_size))
        logits = LOGITS_COPIES * 4 * chunk * self._config.vocabulary_size
        parameters = self._root + (sum(self._own) if not self._spread.reshards else self._buffer[last])
        if chunk < own:
            parameters += self._tied
        activations = self._kept(last) + 2 * self._input + logits
        return self._at("loss", activations, self._low * parameters, 0.0)

    def _backward(self, index: int) -> Iterator[Moment]:
        spread, memory, low = self._spread, self._memory[index], self._low
        reduced = MASTER_BYTES * sum(self._sharded[index + 1 :])
        if spread.reshards:
            ahead = sum(self._buffer[max(0, index - spread.prefetch) : index])
            others = 0
        else:
            ahead, others = 0, sum(self._own[:index])
        waiting = self._held[index + 1] if index + 1 < self._config.layers else 0
        around = low * (self._root + self._tied + ahead + others)
        before = self._kept(index - 1) if index else 0.0
        kept = memory.kept.bytes(self._one)
        # At work: the last product's weights have their gradient, the block after this one is still being reduced.
        yield self._at(
            f"backward of block {index}",
            before + kept + memory.work.bytes(self._one),
            around + low * (self._own[index] + memory.weight_gradients // spread.experts) + MASTER_BYTES * waiting,
            reduced,
        )
        # When it is asked for, what a rank sends of its shard is cast first.
        cast = low * ahead * spread.tensor / spread.shards if low < MASTER_BYTES else 0.0
        yield self._at(
            f"backward of block {index}",
            before + kept,
            around + cast + low * self._own[index] + MASTER_BYTES * waiting,
            reduced,
        )
        # Done: its gradients are copied into the buffer they are reduced from, its parameters given back.
        yield self._at(
            f"reduction of block {index}",
            before + self._input,
            around + (low + MASTER_BYTES) * self._own[index],
            reduced + MASTER_BYTES * self._sharded[index],
        )

    def _kept(self, last: int) -> float:
        """Activations of blocks 0 to `last` between their passes."""
        if self._spread.activation_checkpointing:
            return (last + 1) * self._input
        return sum(memory.kept.bytes(self._one) for memory in self._memory[: last + 1])

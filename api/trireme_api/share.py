"""How a global batch is dealt to ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """How a global batch of S sequences is dealt to ranks: every rank gets the same number of micro-batches of the same
    shape, filled up with sequences that do not count where S does not divide."""

    sequences: int
    world: int
    micro: int

    @property
    def per_rank(self) -> int:
        """Sequences of the fullest rank."""
        return -(-self.sequences // self.world)

    @property
    def micro_batches(self) -> int:
        return -(-self.per_rank // self.micro)

    @property
    def micro_sequences(self) -> int:
        """Sequences in each micro-batch, at most `micro`; smaller where that saves padding."""
        return -(-self.per_rank // self.micro_batches)

    def of(self, rank: int) -> list[list[int | None]]:
        """Numbers within the global batch, by micro-batch; None is padding. Dealt in turn: padding spreads."""
        numbers: list[int | None] = list(range(rank, self.sequences, self.world))
        numbers += [None] * (self.micro_batches * self.micro_sequences - len(numbers))
        return [numbers[i : i + self.micro_sequences] for i in range(0, len(numbers), self.micro_sequences)]

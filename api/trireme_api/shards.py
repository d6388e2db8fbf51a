"""Names of shards that pods keep in memory, so that the agent can tell what is there without reading it.

Standard library only and Python 3.9 syntax: travels with the agent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Optional, Set, Tuple

from trireme_api.wire import Message

_NAME = re.compile(r"step-(\d{8,12})\.attempt-(\d{1,9})\.rank-(\d{5,7})-of-(\d{5,7})\.shard")


@dataclass(frozen=True, order=True)
class Shard:
    """The state of one rank after `step` optimiser steps, taken by one attempt of `world` ranks."""

    step: int
    attempt: int
    world: int
    rank: int

    @property
    def set(self) -> Tuple[int, int, int]:
        """Shards of one set make a whole state together."""
        return self.step, self.attempt, self.world

    def __str__(self) -> str:
        return f"step-{self.step:08d}.attempt-{self.attempt}.rank-{self.rank:05d}-of-{self.world:05d}.shard"


def parse_shard(name: str) -> Optional[Shard]:
    """None for any other name: working files, fences, other people's."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    step, attempt, rank, world = map(int, match.groups())
    return Shard(step, attempt, world, rank) if rank < world else None


@dataclass
class MemoryShards(Message):
    """What one pod holds in memory of one set."""

    step: int
    attempt: int
    world: int
    ranks: List[int] = field(default_factory=list)


def by_set(shards: Iterable[Shard]) -> List[MemoryShards]:
    """Newest first."""
    found: Dict[Tuple[int, int, int], Set[int]] = {}
    for shard in shards:
        found.setdefault(shard.set, set()).add(shard.rank)
    return [MemoryShards(*key, ranks=sorted(found[key])) for key in sorted(found, reverse=True)]


def newest_whole(held: Iterable[MemoryShards], world: int) -> Optional[MemoryShards]:
    """The newest set of which all `world` ranks' shards are held by somebody; None when there is none.

    Shards of two attempts never make one set: what each computed may differ in the last bits.
    """
    together: Dict[Tuple[int, int, int], Set[int]] = {}
    for part in held:
        together.setdefault((part.step, part.attempt, part.world), set()).update(part.ranks)
    whole = [key for key, ranks in together.items() if key[2] == world and ranks >= set(range(world))]
    return MemoryShards(*max(whole), ranks=list(range(world))) if whole else None

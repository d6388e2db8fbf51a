"""Who keeps copies for whom: any one pod may be lost, and every rank still finds its shard."""

from __future__ import annotations

import pytest
from trireme_api.shards import Shard
from trireme_trainer.checkpoint.replication import assign_sources, shifts

CASES = [(2, 1, 1), (3, 1, 1), (4, 2, 1), (6, 2, 2), (8, 1, 3), (16, 8, 1)]


def layout(world: int, per_node: int, replicas: int) -> dict[int, set[Shard]]:
    """Shards by node after a complete save."""
    held: dict[int, set[Shard]] = {node: set() for node in range(world // per_node)}
    for rank in range(world):
        for shift in (0, *shifts(world, per_node, replicas)):
            held[(rank + shift) % world // per_node].add(Shard(5, 1, world, rank))
    return held


@pytest.mark.parametrize(("world", "per_node", "replicas"), CASES)
def test_any_pod_may_be_lost(world: int, per_node: int, replicas: int) -> None:
    wanted = [Shard(5, 1, world, rank) for rank in range(world)]
    held = layout(world, per_node, replicas)
    assert {len(shards) for shards in held.values()} == {per_node * (1 + replicas)}, "no node keeps more than another"
    for lost in held:
        left = {node: shards if node != lost else set() for node, shards in held.items()}
        transfers, missing = assign_sources(wanted, left, per_node)
        assert missing == []
        assert [t.shard for t in transfers] == wanted
        for t in transfers:
            assert t.target == t.shard.rank
            assert t.shard in left[t.source // per_node], "the source has it"
            assert (t.source == t.target) == (t.target // per_node != lost), "what lies at home stays at home"
        givers = [t.source for t in transfers if t.source != t.target]
        assert len(set(givers)) == len(givers) == per_node, "the ranks of the giving node share the work"


def test_one_copy_does_not_survive_two_neighbours() -> None:
    held = layout(4, 1, 1)
    held[1], held[2] = set(), set()
    _, missing = assign_sources([Shard(5, 1, 4, rank) for rank in range(4)], held, 1)
    assert [shard.rank for shard in missing] == [1]


def test_one_node_has_nobody_to_copy_to() -> None:
    assert shifts(8, 8, 1) == []
    assert shifts(8, 4, 3) == [4]

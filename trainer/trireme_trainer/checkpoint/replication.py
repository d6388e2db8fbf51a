"""Shards between ranks: who keeps copies for whom, who gives what to whom, and moving the bytes over gloo.

A transfer is between working files: the target verifies and renames afterwards, so a rank killed in the middle leaves
nothing that counts, and its peers' waits fail within the moment that gloo sees the connection close.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from trireme_api.shards import Shard

from trireme_trainer.checkpoint.ranks import Ranks

CHUNK = 2**24
"""Bytes in flight per transfer: large enough for bandwidth, and training's own messages get between them."""


def shifts(world: int, per_node: int, replicas: int) -> list[int]:
    """By how many ranks a copy is passed on: to the same local rank of the next node, the one after it, …

    Nodes hold `per_node` ranks each, in order. So the shards of any one node lie on `replicas` others, and each node
    keeps as many copies as it gives away. Empty where there is one node.
    """
    nodes = world // per_node
    return [number * per_node for number in range(1, min(replicas, nodes - 1) + 1)]


@dataclass(frozen=True)
class Transfer:
    shard: Shard
    source: int
    target: int


def assign_sources(
    wanted: Iterable[Shard], held: Mapping[int, set[Shard]], per_node: int
) -> tuple[list[Transfer], list[Shard]]:
    """Who gives each shard to the rank it is of, and the shards nobody has. Pure: every rank comes to the same answer.

    `held`: by node. A rank's own node comes first; else the copy's node next in order, through the rank with the same
    local number, so that the ranks of a node share the work.
    """
    found, missing = [], []
    for shard in wanted:
        own = shard.rank // per_node
        nodes = [node for node in sorted(held) if shard in held[node]]
        if not nodes:
            missing.append(shard)
        elif own in nodes:
            found.append(Transfer(shard, shard.rank, shard.rank))
        else:
            node = min((n for n in nodes if n > own), default=nodes[0])
            found.append(Transfer(shard, node * per_node + shard.rank % per_node, shard.rank))
    return found, missing


Parcel = tuple[int, int, Tensor]
"""Peer, tag (a pair of ranks uses one once), bytes: [n] uint8."""


def exchange(ranks: Ranks, sends: Sequence[Parcel], receives: Sequence[Parcel]) -> None:
    """Moves bytes between ranks. Raises when a peer dies.

    Each rank may send and receive any number at the same time; a transfer's two ends must agree on n.
    """
    if not sends and not receives:
        return
    longest = max(data.numel() for _, _, data in (*sends, *receives))
    for begin in range(0, longest, CHUNK):
        works = []
        for peer, tag, data in receives:
            if begin < data.numel():
                works.append(dist.irecv(data[begin : begin + CHUNK], group=ranks.group, tag=tag, group_src=peer))
        for peer, tag, data in sends:
            if begin < data.numel():
                works.append(dist.isend(data[begin : begin + CHUNK], group=ranks.group, tag=tag, group_dst=peer))
        for work in works:
            assert work is not None
            work.wait()

"""Expert parallelism: each rank of a group keeps E/N of the experts, and tokens travel to them and back (all-to-all).

After GShard (2006.16668) and fairseq's moe branch (modules/moe/moe_layer.py), which give each rank experts of its own.
FSDP shards these over the other ranks, as FSDP2 does with any parameter that is a DTensor already. A token's gradient
comes back to the expert by the same way, so that an expert's gradient is the sum over its group's tokens without
further ado, and FSDP adds up the groups'. N ranks, E experts, C places, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trireme_trainer.layers.experts import Experts

Watch = Callable[[Tensor, bool], None]
"""Told of each exchange before it begins: what this rank sends, and whether all send equally much."""


def spread_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Leaves each rank of `mesh` (one dimension) its part of the experts, in order. Before FSDP, on the meta device."""
    for name, weight in list(experts.named_parameters(recurse=False)):
        if weight.shape[0] % mesh.size():
            raise ValueError(f"{weight.shape[0]} experts cannot be shared out among {mesh.size()} ranks")
        own = torch.empty((weight.shape[0] // mesh.size(), *weight.shape[1:]), dtype=weight.dtype, device=weight.device)
        spread = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        experts.register_parameter(name, nn.Parameter(spread))
    experts.exchange = AllToAll(mesh.get_group())


def shard_dimension(weight: Tensor, ranks: int) -> Shard:
    """Which dimension of a rank's own experts FSDP cuts over `ranks`: whole experts where they divide, else rows of
    each, for a rank without any would still gather them all."""
    own = weight.to_local() if isinstance(weight, DTensor) else weight
    return Shard(1 if own.shape[0] % ranks and own.shape[1] % ranks == 0 else 0)


class AllToAll:
    """`layers.experts.Exchange` over a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.watch: Watch | None = None

    def own(self, weight: Tensor) -> Tensor:
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def slotted(self, rows_ECD: Tensor, run: Callable[[Tensor], Tensor], *, alike: bool) -> Tensor:
        (E, C, D), N = rows_ECD.shape, self.group.size()
        places = C if alike else self._most(C, rows_ECD.device)
        padded = F.pad(rows_ECD, (0, 0, 0, places - C)) if places > C else rows_ECD
        here = self._send(padded).view(N, E // N, places, D).transpose(0, 1)
        done = run(here.reshape(E // N, N * places, D))
        back = self._send(done.view(E // N, N, places, D).transpose(0, 1).reshape(E, places, D))
        # FSDP's hooks on what a unit returns take no views.
        return back if places == C else back[:, :C].contiguous()

    def grouped(self, rows_ND: Tensor, counts: list[int], run: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
        N, own = self.group.size(), len(counts) // self.group.size()
        sent = torch.tensor(counts, device=rows_ND.device)
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent, group=self.group)
        came_NE = came.view(N, own)
        # Rows come sorted by rank, then expert.
        expert = torch.arange(own, device=came.device).repeat(N).repeat_interleave(came)
        order = expert.argsort(stable=True)
        here = came_NE.sum(dim=0).tolist()
        outward = [sum(counts[i : i + own]) for i in range(0, len(counts), own)]
        inward = came_NE.sum(dim=1).tolist()
        done = run(self._send(rows_ND, inward, outward)[order], here)
        return self._send(torch.empty_like(done).index_copy(0, order, done), outward, inward)

    def _send(self, rows: Tensor, inward: list[int] | None = None, outward: list[int] | None = None) -> Tensor:
        """By the first dimension: equal parts, or `outward[n]` rows to rank n and `inward[n]` from it."""
        moved: Tensor = _Move.apply(rows, self, inward, outward)  # type: ignore[no-untyped-call]
        return moved

    def _most(self, count: int, device: torch.device) -> int:
        most = torch.tensor(count, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return int(most)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, exchange: AllToAll, inward: list[int] | None, outward: list[int] | None
    ) -> Tensor:
        ctx.way = exchange, inward, outward
        rows = rows.contiguous()
        if exchange.watch is not None:
            exchange.watch(rows, inward is None)
        length = len(rows) if inward is None else sum(inward)
        out = rows.new_empty(length, *rows.shape[1:])
        dist.all_to_all_single(out, rows, inward, outward, group=exchange.group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        exchange, inward, outward = ctx.way
        return _Move.apply(gradients[0], exchange, outward, inward), None, None, None  # type: ignore[no-untyped-call]

"""The order in which a rank begins its collectives, written down: peers that begin them in another order wait forever.

FSDP gathers a unit's parameters and reduces its gradients from hooks, so their order is a result of the model's run, of
prefetching and of accumulation, and nowhere to be read in code (FSDP paper, 2304.11277 §3.3). Here it can be read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from trireme_trainer.layers.experts import Experts
from trireme_trainer.parallel.experts import AllToAll
from trireme_trainer.parallel.tensor import peers_of

Operation = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]


@dataclass(frozen=True)
class Collective:
    operation: Operation
    unit: str
    """Name of the FSDP unit in the model, or of the layer that a tensor group computes; "root" for what lies outside
    the blocks."""
    elements: int
    """Of the whole, unsharded buffer, padding included; for an all-reduce those of one shard, or of what a tensor group
    sums; for an all-to-all those this rank sends, or 0 where each sends as many as it has."""
    dtype: str

    def __str__(self) -> str:
        return f"{self.operation} {self.unit} {self.elements} {self.dtype}"


class CollectiveLog:
    """Every collective of the model's FSDP units and layers in the order in which this rank begins them, until `stop`.
    Sums of layers inside a compiled graph are not seen.

    Shard groups of one rank gather and scatter nothing, so they appear with their all-reduces only.
    """

    def __init__(self, model: nn.Module, *, replicated: bool) -> None:
        """`model` is sharded already. `replicated`: gradients are reduced between shard groups too."""
        self.entries: list[Collective] = []
        self._open = True
        for name, peers in peers_of(model).items():
            peers.watch = _Summed(self, name)
        for name, module in model.named_modules():
            if not isinstance(module, FSDPModule):
                continue
            unit = name or "root"
            if isinstance(module, Experts) and isinstance(module.exchange, AllToAll):
                module.exchange.watch = _Exchanged(self, unit)
            module.set_custom_all_gather(_LoggedAllGather(self, unit))
            module.set_custom_reduce_scatter(_LoggedReduceScatter(self, unit))
            if replicated:
                module.set_all_reduce_hook(_AllReduced(self, unit))

    def add(self, operation: Operation, unit: str, buffer: Tensor, alike: bool = True) -> None:
        """`alike`: all ranks have a buffer of this size."""
        if self._open:
            dtype = str(buffer.dtype).removeprefix("torch.")
            self.entries.append(Collective(operation, unit, buffer.numel() if alike else 0, dtype))

    def clear(self) -> None:
        self.entries.clear()

    def stop(self) -> None:
        self._open = False

    def lines(self) -> list[str]:
        return [str(entry) for entry in self.entries]

    def ranks_in_another_order(self) -> list[int]:
        """Ranks whose log is not that of rank 0. A collective itself: call it on all ranks."""
        digest = hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()
        digests: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(digests, digest)
        return [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]


class _LoggedAllGather(DefaultAllGather):
    def __init__(self, log: CollectiveLog, unit: str) -> None:
        self._log = log
        self._unit = unit

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self._log.add("all-gather", self._unit, output_tensor)
        return super().__call__(output_tensor, input_tensor, group, async_op)


class _LoggedReduceScatter(DefaultReduceScatter):
    def __init__(self, log: CollectiveLog, unit: str) -> None:
        self._log = log
        self._unit = unit

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work:
        self._log.add("reduce-scatter", self._unit, input_tensor)
        return super().__call__(output_tensor, input_tensor, group, op, async_op)


class _AllReduced:
    """FSDP calls it right behind the all-reduce between shard groups."""

    def __init__(self, log: CollectiveLog, unit: str) -> None:
        self._log = log
        self._unit = unit

    def __call__(self, reduced: Tensor) -> None:
        self._log.add("all-reduce", self._unit, reduced)


class _Summed:
    """The ranks that compute a layer together call it before they sum."""

    def __init__(self, log: CollectiveLog, layer: str) -> None:
        self._log = log
        self._layer = layer

    def __call__(self, part: Tensor) -> None:
        self._log.add("all-reduce", self._layer, part)


class _Exchanged:
    """Experts call it before they exchange rows."""

    def __init__(self, log: CollectiveLog, unit: str) -> None:
        self._log = log
        self._unit = unit

    def __call__(self, rows: Tensor, alike: bool) -> None:
        self._log.add("all-to-all", self._unit, rows, alike)

"""The copy that lets training go on: live shards to CPU buffers now, written from there by a background thread."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

Key = tuple[str, tuple[int, ...]]
"""Name of the tensor, offset of this rank's part in it."""


@dataclass(frozen=True)
class Staged:
    plan: SavePlan
    """What this rank holds, as torch.distributed.checkpoint plans it from the live (sharded) tensors."""
    parts: dict[Key, Tensor]

    @property
    def size(self) -> int:
        """Bytes of this rank's parts, replicas that another rank may write included."""
        return sum(part.nbytes for part in self.parts.values())


class Stager:
    """Keeps its buffers between saves: pinned memory is slow to allocate. A result is valid until the next `stage`."""

    def __init__(self) -> None:
        self._buffers: dict[Key, Tensor] = {}

    @torch.no_grad()
    def stage(self, tensors: dict[str, Tensor], is_coordinator: bool) -> Staged:
        """Returns when the copy is complete: in-place updates afterwards are not seen. No collectives."""
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(tensors), None, is_coordinator)
        plan = planner.create_local_plan()
        parts: dict[Key, Tensor] = {}
        devices = set()
        for item in plan.items:
            live = planner.resolve_data(item)
            assert isinstance(live, Tensor)
            parts[_key(item)] = self._buffer(_key(item), live).copy_(live, non_blocking=live.is_cuda)
            if live.is_cuda:
                devices.add(live.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = parts
        return Staged(plan, parts)

    def _buffer(self, key: Key, live: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is not None and buffer.shape == live.shape and buffer.dtype == live.dtype:
            return buffer
        return torch.empty(live.shape, dtype=live.dtype, device="cpu", pin_memory=live.is_cuda)


class StagedPlanner(DefaultSavePlanner):
    """Saves what was staged; deduplication of replicas and the global plan are torch's."""

    def __init__(self, staged: Staged) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def create_local_plan(self) -> SavePlan:
        self.plan = self._staged.plan
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._staged.parts[_key(write_item)]


def _key(item: Any) -> Key:
    return item.index.fqn, tuple(item.index.offset or ())

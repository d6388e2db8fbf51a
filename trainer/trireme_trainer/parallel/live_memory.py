"""Bytes of tensors alive, counted as they come and go: the same on every device, and exact where the allocator's
figures round and a process's resident set includes everything else."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations inside it return, while they live; tensors made before are not seen.

    What an operation allocates and frees within itself is not seen either. Each operation costs time proportional to
    the tensors alive: for accounting, not for training.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device.type
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        alive = (reference() for reference in list(self._storages.values()))
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def restart(self) -> int:
        """Forgets the peak; returns what is alive."""
        self.peak = self.now
        return self.peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device:
                local = leaf._local_tensor if isinstance(leaf, DTensor) else leaf
                self._see(local.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        known = self._storages.get(key)
        if known is None or known() is None:
            self._storages[key] = weakref.ref(storage, self._forget(key))

    def _forget(self, key: int) -> Callable[[object], None]:
        def forget(reference: object) -> None:
            # The address may belong to another storage by now.
            if self._storages.get(key) is reference:
                del self._storages[key]

        return forget

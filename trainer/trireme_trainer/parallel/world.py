"""The gang as one rank sees it: its device, the process group, and the few numbers all ranks must agree on."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from trireme_trainer.lifecycle.outcome import BadRecipe
from trireme_trainer.parallel.network import bind_gloo
from trireme_trainer.settings import Settings


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    tensor: int = 1
    """Consecutive ranks that compute each layer together, and so read the same data."""

    @property
    def data_rank(self) -> int:
        """Number of this rank among those with data of their own."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        return self.size // self.tensor

    @classmethod
    def join(cls, settings: Settings) -> World:
        """Meets the other ranks: NCCL between GPUs with gloo beside it, gloo alone on CPUs. Blocks until all came."""
        device = _device(settings)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(cpu_threads(settings.local_world_size))
            keep_freed_memory()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(seconds=settings.init_timeout)
        if settings.world_size == 1:
            # Nobody to meet, so no port to open: the same group, kept in this process.
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            bind_gloo(os.environ["MASTER_ADDR"])
            dist.init_process_group(
                backend,
                init_method="env://",
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        tensor = settings.recipe.parallelism.tensor
        return cls(settings.rank, settings.world_size, settings.local_rank, settings.local_world_size, device, tensor)

    def sum(self, values: Sequence[float | Tensor]) -> Tensor:
        """Each value summed over the ranks with data of their own (a tensor group has one, the mean of its ranks'):
        shape [len(values)], float64 (token counts stay exact), on the device."""
        if all(isinstance(value, Tensor) for value in values):
            vector = torch.stack([value.to(torch.float64) for value in values if isinstance(value, Tensor)])
        else:
            # Through pinned memory: a plain copy to a GPU would wait for everything that is queued on it.
            numbers = [float(value) for value in values]
            host = torch.tensor(numbers, dtype=torch.float64, pin_memory=self.device.type == "cuda")
            vector = host.to(self.device, non_blocking=True)
        if self.size > 1:
            dist.all_reduce(vector)
        return vector if self.tensor == 1 else vector / self.tensor

    def mean(self, values: Sequence[float | Tensor]) -> Tensor:
        """As `sum`, over all ranks."""
        return self.sum(values) / self.data_size

    def limit_waiting(self, seconds: float, groups: Sequence[dist.ProcessGroup] = ()) -> None:
        """From here on a collective that takes longer than `seconds` fails: peers that vanished are noticed."""
        if self.size == 1:
            return
        self.barrier()
        world = dist.group.WORLD
        for group in {id(g): g for g in (world, *groups) if g is not None}.values():
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def peak_memory(self) -> int:
        """Bytes this rank held at most: allocated on its GPU, or resident where it computes on CPUs."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def barrier(self) -> None:
        if self.size > 1:
            self.sum([0.0]).cpu()

    def leave(self) -> None:
        with suppress(Exception):  # a group poisoned by a lost peer cannot be closed, and the process ends anyway
            dist.destroy_process_group()


def cpu_threads(local_world_size: int) -> int:
    """Threads for one rank: OMP_NUM_THREADS if given, else this container's share of CPUs."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, int(min(len(os.sched_getaffinity(0)), cpu_quota()) // local_world_size))


def keep_freed_memory() -> bool:
    """Has glibc keep what tensors free, as torch's allocator does on GPUs, and tells whether it agreed.

    By default every large tensor is mapped anew and faulted in page by page: a third of the time of a step of OPT-8M.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc
        return False
    return bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, 2**31 - 1))


def cpu_quota(path: str = "/sys/fs/cgroup/cpu.max") -> float:
    """CPUs the container's limit allows (cgroup v2); infinity where there is none. torch counts the machine's."""
    try:
        with open(path, encoding="ascii") as file:
            quota, period = file.read().split()
        return float("inf") if quota == "max" else max(1.0, float(quota) / float(period))
    except (OSError, ValueError):
        return float("inf")


def _device(settings: Settings) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if settings.local_rank >= torch.cuda.device_count():
        raise BadRecipe(
            f"procsPerNode: local rank {settings.local_rank} has no GPU of its own, this pod sees "
            f"{torch.cuda.device_count()}; lower procsPerNode or ask for more GPUs in template.resources"
        )
    return torch.device("cuda", settings.local_rank)

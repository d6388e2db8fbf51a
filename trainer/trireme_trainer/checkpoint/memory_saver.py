"""The tier in memory as the training loop uses it: on when the job asks for it and the pod has the folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from torch import Tensor
from trireme_api.recipe import MemorySpec

from trireme_trainer.checkpoint import CheckpointError, MemoryFolder, MemoryTier, StaleAttempt
from trireme_trainer.checkpoint.tiers import Restored
from trireme_trainer.settings import Settings
from trireme_trainer.telemetry.reporting import Reporter

log = logging.getLogger(__name__)


class MemorySaver:
    """Without `checkpoint.memory`, or where the folder cannot be used, every call is a no-op."""

    def __init__(self, settings: Settings) -> None:
        """Collective. Raises StaleAttempt."""
        self._spec: MemorySpec | None = settings.checkpoint.memory if settings.checkpoint else None
        self._tier: MemoryTier | None = None
        self.problem = ""
        """Why there is no tier in memory though the job asks for one; the same on every rank."""
        if self._spec is None:
            return
        path = str(settings.memory_dir) if settings.memory_dir else ""
        folder = MemoryFolder(path, attempt=settings.attempt, owner=settings.owner)
        try:
            self._tier = MemoryTier(
                folder,
                attempt=settings.attempt,
                replicas=self._spec.replicas,
                per_node=settings.local_world_size,
            )
        except StaleAttempt:
            raise
        except CheckpointError as error:
            self.problem = f"checkpoint.memory is off, storage is used alone: {error}"
            if settings.rank == 0:
                log.warning("%s", self.problem)
            return
        if settings.rank == 0 and self._tier.copies < self._spec.replicas:
            log.warning(
                "checkpoint.memory.replicas: %d of %d copies, for there are no more nodes: the loss of a pod may need "
                "storage", self._tier.copies, self._spec.replicas,
            )  # fmt: skip

    def newest(self) -> int | None:
        """Step of the newest set that is whole by name. Collective."""
        return self._tier.newest() if self._tier else None

    def restore(self, tensors: Mapping[str, Tensor]) -> tuple[Restored | None, int | None]:
        """See MemoryTier.restore. Collective."""
        return self._tier.restore(tensors) if self._tier else (None, None)

    def decided(self, restored: Restored | None, reporter: Reporter) -> None:
        """After the tier was chosen, whichever it is: tells what was passed over, and drops what is not used."""
        if self.problem:
            reporter.event("memory-tier-off", reason=self.problem)
        if self._tier is None:
            return
        for what, why in self._tier.rejected:
            reporter.event("checkpoint-skipped", tier="memory", path=what, reason=why)
        self._tier.keep_only(restored)

    def forget(self) -> None:
        """Drops every set: training goes back, and what they hold did not happen. Collective."""
        if self._tier is not None:
            self._tier.forget()

    def due(self, step: int) -> bool:
        return self._tier is not None and self._spec is not None and step % self._spec.every_steps == 0

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], reporter: Reporter) -> None:
        """Takes a copy; hashing, publishing and copying to other nodes go on beside training. Raises StaleAttempt."""
        assert self._tier is not None
        begin = perf_counter()
        with reporter.ledger.during("checkpoint-blocked"):
            reporter.ledger.saving(step)
            self._tier.save(step, tensors, meta)
        reporter.checkpoint_blocked(perf_counter() - begin)

    def poll(self, reporter: Reporter) -> None:
        if self._tier is None:
            return
        for timing in self._tier.poll():
            reporter.ledger.committed(timing.step)
            reporter.event(
                "memory-checkpoint", step=timing.step, copies=self._tier.copies, bytes=timing.size,
                blocked=round(timing.blocked, 4), sealing=round(timing.sealing, 4), copying=round(timing.copying, 4),
                total=round(timing.total, 4),
            )
        for failure in self._tier.failures():
            log.warning("%s; training goes on, storage is unaffected", failure)
            reporter.event("checkpoint-failed", tier="memory", reason=failure)

    def close(self) -> None:
        if self._tier is not None:
            self._tier.close()

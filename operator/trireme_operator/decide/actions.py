"""What reconcile asks for: values, carried out by `cluster`, each safe to repeat."""

from __future__ import annotations

from dataclasses import dataclass

from trireme_api.job import Slot, TrainingJobStatus


@dataclass(frozen=True)
class CreatePod:
    slot: Slot

    def __hash__(self) -> int:
        return hash((self.slot.index, self.slot.incarnation))


@dataclass(frozen=True)
class DeletePod:
    name: str
    uid: str
    """Precondition: a pod of the same name made since is left alone."""
    grace_seconds: int | None = None
    """None: the pod's own."""


@dataclass(frozen=True)
class DeleteJob:
    """The job has outlived its TTL."""


Act = CreatePod | DeletePod | DeleteJob


@dataclass(frozen=True)
class Note:
    """An event for `kubectl describe`."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True)
class Decision:
    """`status` is written first; `actions` only follow from a status that is already written."""

    status: TrainingJobStatus | None = None
    """None: nothing to write."""
    actions: tuple[Act, ...] = ()
    notes: tuple[Note, ...] = ()
    requeue_after: float | None = None
    """Seconds after which to look again though nothing happened."""

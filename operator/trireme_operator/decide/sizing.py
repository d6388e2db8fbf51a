"""How large a gang is to be and which pods are in it. Pure arithmetic on slots; `resizing` decides when.

A gang that has lost nodes takes its spares first, then shrinks to a permitted size, and only then waits. It grows by
way of spares: pods are placed and ready before any rank is asked to stop, so growth that finds no room costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from trireme_api.job import Slot
from trireme_api.replicas import Replicas

MAX_SNOOZE_SECONDS = 3600.0


def admissible(replicas: Replicas, room: int) -> int | None:
    """Pods (spares included) to start with where so many fit; None: not even the smallest gang does."""
    size = replicas.fit(room)
    if size is None:
        return None
    return size + min(replicas.spares, room - size) if size == replicas.desired else size


def extra(replicas: Replicas, ranked: int, spares: int, room: int) -> int:
    """Pods worth adding when there is room for so many: enough for the next permitted size, then spares."""
    held = ranked + spares
    reach = max(replicas.fit(held + room) or ranked, ranked)
    useful = reach + (replicas.spares if reach >= replicas.desired else 0)
    return max(0, min(held + room, useful) - held)


def surplus(replicas: Replicas, ranked: int, spares: int) -> int:
    """Spares held beyond what the job asks for; those that growth to `desired` will need are none."""
    return max(0, spares - replicas.spares - max(0, replicas.desired - ranked))


def snooze(shrinks: int, first: float) -> float:
    """Seconds not to grow after the n-th shrink within the window: `first`, then twice as long each time."""
    return min(MAX_SNOOZE_SECONDS, first * 2.0 ** min(max(0, shrinks - 1), 10))


@dataclass(frozen=True)
class Cast:
    """The gang of the next attempt."""

    slots: list[Slot]
    """Those with ranks in the order of their node ranks, then the spares."""
    promoted: tuple[int, ...] = ()
    """Slots that were spares."""
    awaited: int = 0
    """Pods to be made anew before it can start."""

    @property
    def size(self) -> int:
        return sum(not slot.spare for slot in self.slots)


def recast(
    slots: Sequence[Slot], attempt: int, *, stricken: Collection[int], renewed: Collection[int], ready: Collection[int]
) -> Cast:
    """The same size again: ready spares take the places of stricken slots, further ones and those to be renewed get
    new pods. A spare keeps the very node rank of the slot it stands in for, so that ranks elsewhere do not move."""
    helpers = [slot for slot in slots if slot.spare and slot.index in ready]
    gang: list[Slot] = []
    promoted: list[int] = []
    awaited = 0
    for slot in slots:
        if slot.spare:
            continue
        if slot.index in stricken and helpers:
            helper = helpers.pop(0)
            promoted.append(helper.index)
            gang.append(helper.model_copy(update={"spare": False}))
        elif slot.index in stricken or slot.index in renewed:
            awaited += 1
            gang.append(slot.model_copy(update={"incarnation": attempt, "pod_uid": None}))
        else:
            gang.append(slot)
    rest = [slot for slot in slots if slot.spare and slot.index not in promoted]
    return Cast(gang + rest, tuple(promoted), awaited)


def resized(slots: Sequence[Slot], size: int, *, usable: Collection[int], ready: Collection[int]) -> Cast | None:
    """A gang of exactly `size` of usable slots and ready spares, none to be waited for; None if they do not suffice.

    Usable slots that are too many become spares; slots that are not usable are given up.
    """
    gang = [slot for slot in slots if not slot.spare and slot.index in usable]
    helpers = [slot for slot in slots if slot.spare and slot.index in ready]
    taken = helpers[: max(0, size - len(gang))]
    if len(gang) + len(taken) < size:
        return None
    chosen = [*gang[:size], *(slot.model_copy(update={"spare": False}) for slot in taken)]
    names = {slot.index for slot in chosen}
    left = [slot.model_copy(update={"spare": True}) for slot in gang[size:]]
    rest = [slot for slot in slots if slot.spare and slot.index not in names]
    return Cast(chosen + left + rest, tuple(slot.index for slot in taken))


def free_indices(slots: Sequence[Slot], occupied: Collection[int], count: int) -> list[int]:
    """The smallest slot numbers that neither a slot nor a pod that is still there has."""
    known = {slot.index for slot in slots} | set(occupied)
    found: list[int] = []
    index = 0
    while len(found) < count:
        if index not in known:
            found.append(index)
        index += 1
    return found

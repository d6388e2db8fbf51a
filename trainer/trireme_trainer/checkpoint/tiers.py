"""The tier in memory: shards kept in the pods and copied to other nodes every few steps, and a restart from them.

    staged      training waits for the copy into a working file, and for nothing else
    published   hashed, renamed: survives the end of the rank
    copied      the same on `replicas` other nodes, verified there: survives the loss of the pod
    complete    all ranks agree; only now the set before it is given up

A set of shards is used when one attempt wrote all of it, every shard of it is held by somebody and verifies, and this
attempt has the same number of ranks and the same sharding. Anything else goes to the storage behind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from trireme_api.shards import MemoryShards, Shard, by_set, newest_whole

from trireme_trainer.checkpoint.errors import CheckpointError, DamagedCheckpoint, SaveFailed, StaleAttempt
from trireme_trainer.checkpoint.manifest import check_meta
from trireme_trainer.checkpoint.memory import Draft, Header, MemoryFolder, Place, layout_of
from trireme_trainer.checkpoint.ranks import Ranks, describe
from trireme_trainer.checkpoint.replication import Parcel, Transfer, assign_sources, exchange, shifts

log = logging.getLogger(__name__)
STAGES = ("staged", "published", "sending", "received", "copied", "complete", "retired")
"""What `on_stage` is called with, in order, on every rank; "sending" to "copied" once per copy."""


@dataclass
class MemoryTiming:
    """Seconds of one save on this rank; training waits for `waiting` and `staging`."""

    step: int
    waiting: float
    staging: float
    sealing: float = 0.0
    copying: float = 0.0
    size: int = 0
    """Bytes of this rank's shard."""

    @property
    def blocked(self) -> float:
        return self.waiting + self.staging

    @property
    def total(self) -> float:
        return self.staging + self.sealing + self.copying


@dataclass(frozen=True)
class Restored:
    step: int
    attempt: int
    """The one that wrote it."""
    meta: Mapping[str, Any]
    from_peers: int
    """Shards that came from another node."""
    verify_seconds: float
    move_seconds: float
    read_seconds: float


@dataclass
class _Flight:
    step: int
    timing: MemoryTiming
    draft: Draft | None = None
    layout: tuple[Place, ...] = ()
    error: Exception | None = None
    done: bool = False
    thread: threading.Thread = field(default_factory=threading.Thread)


@dataclass
class _Content:
    """A shard on its way: the two parts of its file, to or from `peer`."""

    shard: Shard
    peer: int
    body: Tensor
    end: Tensor
    draft: Draft | None = None
    """Where it arrives."""

    @classmethod
    def of(cls, folder: MemoryFolder, shard: Shard, header: Header, peer: int) -> _Content:
        content = folder.content(shard)
        return cls(shard, peer, content[: header.size], content[header.size :])

    @property
    def sizes(self) -> tuple[int, int]:
        return self.body.numel(), self.end.numel()

    @property
    def parcels(self) -> list[Parcel]:
        return [(self.peer, 2 * self.shard.rank, self.body), (self.peer, 2 * self.shard.rank + 1, self.end)]


class MemoryTier:
    """Every rank makes one and calls it in the same order. A failed save is reported and never ends training."""

    def __init__(
        self,
        folder: MemoryFolder,
        *,
        attempt: int,
        replicas: int,
        per_node: int,
        process_group: dist.ProcessGroup | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        """Collective; raises on all ranks where one cannot use its folder. `per_node`: ranks that share a folder."""
        self._folder = folder
        self._attempt = attempt
        self._ranks = Ranks(process_group)
        self._per_node = per_node
        self._shifts = shifts(self._ranks.world, per_node, replicas)
        self._on_stage = on_stage or (lambda _stage: None)
        self._flight: _Flight | None = None
        self._stale: StaleAttempt | None = None
        self._news: list[MemoryTiming] = []
        self._failures: list[str] = []
        self._held: dict[int, set[Shard]] = {}
        self.rejected: list[tuple[str, str]] = []
        """(what, why) of each set or shard that a restore passed over."""
        self._ranks.everywhere(folder.claim)

    @property
    def copies(self) -> int:
        """On other nodes, of each shard."""
        return len(self._shifts)

    # --- restoring ---

    def newest(self) -> int | None:
        """The step of the newest set that is whole by name, at this world size; None: there is none. Collective."""
        world = self._ranks.world
        self._held = {}
        for rank, shards in enumerate(self._ranks.everywhere(self._folder.shards)):
            self._held.setdefault(rank // self._per_node, set()).update(shards)
        sets = by_set(shard for shards in self._held.values() for shard in shards)
        best = self._best()
        for one in sets:
            if best is not None and (one.step, one.attempt) <= (best.step, best.attempt):
                continue
            if one.world != world:
                why = f"written by {one.world} ranks, this attempt has {world}"
            else:
                why = f"shards of ranks {sorted(set(range(world)) - set(one.ranks))} are gone with their pods"
            self._reject(f"memory set of step {one.step}, attempt {one.attempt}", why)
        return best.step if best is not None else None

    def restore(self, tensors: Mapping[str, Tensor]) -> tuple[Restored | None, int | None]:
        """Fills `tensors` from the newest set that `newest` found, any good copy of each shard will do. Collective.

        None: it cannot be used, and the tensors are as they were; then the step of the next older set, if there is one,
        which another call would try.
        """
        best = first = self._best()
        while best is not None and best == first:
            shards = [Shard(best.step, best.attempt, best.world, rank) for rank in range(best.world)]
            restored = self._try(shards, tensors)
            if restored is not None:
                return restored, best.step
            best = self._best()
        return None, best.step if best is not None else None

    def _best(self) -> MemoryShards | None:
        return newest_whole(by_set(s for held in self._held.values() for s in held), self._ranks.world)

    def keep_only(self, restored: Restored | None) -> None:
        """Drops every shard this attempt did not resume from: an abandoned history cannot come back. Collective."""
        if self._ranks.rank % self._per_node == 0:
            self._folder.sweep()
            kept = (restored.step, restored.attempt, self._ranks.world) if restored else None
            self._folder.retire(lambda shard: shard.set != kept)
        self._ranks.everywhere(lambda: None)

    def forget(self) -> None:
        """Drops every shard, once no rank writes any more. Collective. Raises StaleAttempt."""
        self._settle()
        self._ranks.everywhere(lambda: None)
        self.keep_only(None)

    def _try(self, shards: list[Shard], tensors: Mapping[str, Tensor]) -> Restored | None:
        mark = time.perf_counter()
        ranks, folder = self._ranks, self._folder
        transfers, _ = assign_sources(shards, self._held, self._per_node)
        headers: dict[Shard, Header] = {}
        wrong = ranks.everywhere(lambda: [bad for t in transfers if (bad := self._check(t, headers)) is not None])
        bad = [item for each in wrong for item in each]
        for shard, node, why in bad:
            self._held[node].discard(shard)
            self._reject(f"memory of node {node}", why)
        if bad:
            return None
        verified = time.perf_counter()
        self._move(transfers, headers)
        moved = time.perf_counter()
        mine = shards[ranks.rank]
        header = headers[mine]
        same = ranks.everywhere(lambda: header.layout == layout_of(tensors))
        if not all(same):
            why = f"rank {same.index(False)}'s shard is of another model or sharding"
            self._reject(f"memory set of step {mine.step}, attempt {mine.attempt}", why)
            for held in self._held.values():
                held.difference_update(shards)
            return None
        ranks.everywhere(lambda: folder.fill(mine, header, tensors))
        return Restored(
            mine.step, mine.attempt, header.meta, sum(t.source != t.target for t in transfers),
            verified - mark, moved - verified, time.perf_counter() - moved,
        )  # fmt: skip

    def _check(self, transfer: Transfer, headers: dict[Shard, Header]) -> tuple[Shard, int, str] | None:
        if transfer.source != self._ranks.rank:
            return None
        try:
            headers[transfer.shard] = self._folder.verify(transfer.shard)
        except (DamagedCheckpoint, OSError) as error:
            return transfer.shard, self._ranks.rank // self._per_node, describe(error)
        return None

    def _move(self, transfers: list[Transfer], headers: dict[Shard, Header]) -> None:
        """Brings each shard that lies elsewhere to its rank. Raises on all ranks where that fails."""
        away = [transfer for transfer in transfers if transfer.source != transfer.target]
        if not away:
            return
        me, folder = self._ranks.rank, self._folder
        leaving = [_Content.of(folder, t.shard, headers[t.shard], t.target) for t in away if t.source == me]
        sizes: dict[Shard, tuple[int, int]] = {}
        for told in self._ranks.everywhere(lambda: {content.shard: content.sizes for content in leaving}):
            sizes |= told
        arriving = self._ranks.everywhere_own(
            lambda: [self._expect(f"{me}-restore", t.shard, t.source, sizes[t.shard]) for t in away if t.target == me]
        )
        exchange(self._ranks, [p for c in leaving for p in c.parcels], [p for c in arriving for p in c.parcels])
        self._ranks.everywhere(lambda: headers.update({content.shard: self._accept(content) for content in arriving}))

    def _expect(self, key: str, shard: Shard, source: int, sizes: tuple[int, int]) -> _Content:
        draft = self._folder.draft(key, sizes[0])
        return _Content(shard, source, draft.body, torch.empty(sizes[1], dtype=torch.uint8), draft)

    def _accept(self, content: _Content) -> Header:
        assert content.draft is not None
        content.draft.finish(content.end.numpy().tobytes())
        header = self._folder.verify(content.shard, content.draft)
        self._folder.publish(content.draft, content.shard)
        return header

    def _reject(self, what: str, why: str) -> None:
        self.rejected.append((what, why))
        if self._ranks.rank == 0:
            log.warning("%s is not used: %s", what, why)

    # --- saving ---

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Copies what this rank holds and returns; the rest goes on in the background. Raises StaleAttempt."""
        started = time.perf_counter()
        self._settle()
        waited = time.perf_counter()
        flight = _Flight(step, MemoryTiming(step, waited - started, 0.0))
        kept = check_meta(meta)
        try:
            flight.draft, flight.layout = self._folder.stage(f"{self._ranks.rank}-own", tensors)
        except Exception as error:  # told to all ranks by the background thread, where they wait for each other
            flight.error = error
        self._on_stage("staged")
        flight.timing.staging = time.perf_counter() - waited
        flight.thread = threading.Thread(target=self._run, args=(flight, kept), name=f"memory-{step}", daemon=True)
        self._flight = flight
        flight.thread.start()

    def poll(self) -> list[MemoryTiming]:
        """Sets completed since the last call; never waits. Raises StaleAttempt."""
        if self._flight is not None and not self._flight.thread.is_alive():
            self._collect(self._flight)
        if self._stale is not None:
            raise self._stale
        news, self._news = self._news, []
        return news

    def failures(self) -> list[str]:
        failures, self._failures = self._failures, []
        return failures

    def wait(self) -> None:
        """Until nothing is in flight. Raises StaleAttempt."""
        self._settle()

    def close(self) -> None:
        if self._flight is not None:
            self._flight.thread.join()
            self._collect(self._flight)
        self._ranks.close()

    def _run(self, flight: _Flight, meta: dict[str, Any]) -> None:
        shard = Shard(flight.step, self._attempt, self._ranks.world, self._ranks.rank)
        try:
            self._protocol(flight, shard, meta)
            flight.done = True
        except CheckpointError as error:
            # All ranks are there and agree that it failed: none keeps its part, for memory is short.
            flight.error = error
            self._folder.retire(lambda held: held.set == shard.set and held.rank in self._mine())
        except BaseException as error:
            # A peer is gone. What is published stays: the next attempt may find the set whole.
            flight.error = SaveFailed(f"rank {self._ranks.rank}: {describe(error)}")

    def _protocol(self, flight: _Flight, shard: Shard, meta: dict[str, Any]) -> None:
        ranks, folder, timing = self._ranks, self._folder, flight.timing
        mark = time.perf_counter()

        def seal() -> tuple[int, int]:
            if flight.error is not None:
                raise flight.error
            assert flight.draft is not None
            folder.seal(flight.draft, shard, flight.layout, meta)
            return flight.draft.body.numel(), len(flight.draft.end)

        sizes = ranks.everywhere(seal)
        timing.size = sum(sizes[ranks.rank])
        draft = flight.draft
        assert draft is not None
        ranks.everywhere(lambda: folder.publish(draft, shard))
        self._on_stage("published")
        timing.sealing = time.perf_counter() - mark
        mark = time.perf_counter()
        for shift in self._shifts:
            self._copy(shard, shift, sizes, draft)
        ranks.everywhere(lambda: None)
        timing.copying = time.perf_counter() - mark
        self._on_stage("complete")
        mine = self._mine()
        folder.retire(
            lambda held: held.set != shard.set and held.rank in mine,
            key=lambda held: f"{ranks.rank}-own" if held.rank == ranks.rank else f"{ranks.rank}-of-{held.rank}",
        )
        self._on_stage("retired")

    def _copy(self, shard: Shard, shift: int, sizes: list[tuple[int, int]], draft: Draft) -> None:
        ranks = self._ranks
        source, target = (ranks.rank - shift) % ranks.world, (ranks.rank + shift) % ranks.world
        theirs = Shard(shard.step, shard.attempt, shard.world, source)
        leaving = _Content(shard, target, draft.body, _tensor(draft.end))
        key = f"{ranks.rank}-of-{source}"
        arriving = ranks.everywhere_own(lambda: self._expect(key, theirs, source, sizes[source]))
        self._on_stage("sending")
        exchange(ranks, leaving.parcels, arriving.parcels)
        self._on_stage("received")
        ranks.everywhere_own(lambda: self._accept(arriving))
        self._on_stage("copied")

    def _mine(self) -> set[int]:
        """Ranks whose shards this rank writes into its folder."""
        return {(self._ranks.rank - shift) % self._ranks.world for shift in (0, *self._shifts)}

    def _settle(self) -> None:
        if self._flight is not None:
            self._flight.thread.join()
            self._collect(self._flight)
        if self._stale is not None:
            raise self._stale

    def _collect(self, flight: _Flight) -> None:
        self._flight = None
        if flight.done:
            self._news.append(flight.timing)
        elif isinstance(flight.error, StaleAttempt):
            self._stale = flight.error
        else:
            self._failures.append(f"step {flight.step} is not kept in memory: {flight.error}")


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)

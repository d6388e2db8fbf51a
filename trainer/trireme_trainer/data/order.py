"""Orders that are pure functions of a key: nothing to save, nothing to replay, the same on every machine.

Built on splitmix64 rather than a library's generator, whose streams may change between releases: a job resumed
under another version must see the same order.
"""

from __future__ import annotations

import heapq
import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FEISTEL_ROUNDS = 6
MAX_PERIOD = 1 << 16
"""Longest interleaving table; weights that need a longer one are rounded to shares of 1/MAX_PERIOD."""


def mix(value: int) -> int:
    """splitmix64's output function on a 64-bit integer."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def derive(*parts: int) -> int:
    """One 64-bit key from several integers; order matters."""
    key = 0
    for part in parts:
        key = mix(key ^ mix(part & _MASK))
    return key


def shuffled(count: int, key: int) -> NDArray[np.uint32]:
    """A permutation of range(count) [count], by sorting keyed hashes. Memory 12 bytes × count while it sorts."""
    return np.argsort(_hashed(count, key), kind="stable").astype(np.uint32)


def uniforms(count: int, key: int) -> NDArray[np.float64]:
    """Numbers [count] spread evenly over [0, 1)."""
    return (_hashed(count, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _hashed(count: int, key: int) -> NDArray[np.uint64]:
    value = np.arange(count, dtype=np.uint64)
    value ^= np.uint64(key)
    value += np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


def permute(index: int, count: int, key: int) -> int:
    """Where `index` lands in a keyed permutation of range(count): a Feistel network, walked until it falls inside.

    O(1) time (under four rounds of the network on average) and no memory.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(key + turn * _GOLDEN ^ right) & mask)
        index = left << half | right
        if index < count:
            return index


class Interleaving:
    """Which source gives block n, and which of its blocks: for every n and i, |blocks of i before n − n·share_i| < 1.

    One period is scheduled earliest deadline first, block k of source i allowed in [k/share_i, (k+1)/share_i) — the
    P-fair windows of Baruah et al. (Algorithmica 15, 1996), always met on one resource — and then repeated.
    """

    def __init__(self, weights: list[float]) -> None:
        self.counts = whole_counts(weights)
        """Blocks of each source in one period."""
        self.period = sum(self.counts)
        self._source = np.empty(self.period, dtype=np.uint16)
        self._rank = np.empty(self.period, dtype=np.uint32)
        self._schedule()

    def locate(self, index: int) -> tuple[int, int]:
        """(source, number of that source's block) of the mixture's block `index`. O(1)."""
        lap, place = divmod(index, self.period)
        source = int(self._source[place])
        return source, lap * self.counts[source] + int(self._rank[place])

    def _schedule(self) -> None:
        period = self.period
        waiting: list[tuple[int, int, int]] = [(0, source, 0) for source in range(len(self.counts))]
        ready: list[tuple[int, int, int]] = []
        for slot in range(period):
            while waiting and waiting[0][0] <= slot:
                _, source, rank = heapq.heappop(waiting)
                deadline = -(-(rank + 1) * period // self.counts[source])
                heapq.heappush(ready, (deadline, source, rank))
            _, source, rank = heapq.heappop(ready)
            self._source[slot], self._rank[slot] = source, rank
            if rank + 1 < self.counts[source]:
                heapq.heappush(waiting, ((rank + 1) * period // self.counts[source], source, rank + 1))


def whole_counts(weights: list[float]) -> list[int]:
    """Whole numbers in the proportions of the weights as written in decimal (0.7 : 0.3 is 7 : 3), summing to at most
    MAX_PERIOD; each at least 1."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    denominator = 1
    for share in shares:
        denominator = math.lcm(denominator, share.denominator)
    if denominator <= MAX_PERIOD:
        return [int(share * denominator) for share in shares]
    counts = [max(1, int(share * MAX_PERIOD)) for share in shares]
    remainders = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i] * MAX_PERIOD, i))
    for i in remainders[: max(0, MAX_PERIOD - sum(counts))]:
        counts[i] += 1
    return counts

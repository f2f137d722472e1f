"""The most prefix-cache hits that any cache of a size could have had: Belady's eviction."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


class Belady:
    """A cache that knows the future: what is needed last is evicted first.

    A block's id stands for all tokens up to its end, so a block is never needed earlier than the
    one before it, and what is evicted is always the end of a prefix. (Belady 1966: no eviction
    does better.)

    Args:
        capacity: how many blocks the cache holds.
        requests: each one's block ids, in the order in which they will be used.
    """

    def __init__(self, capacity: int, requests: Sequence[Sequence[int]]) -> None:
        self._capacity = capacity
        self._upcoming: dict[int, list[int]] = {}
        for at in range(len(requests) - 1, -1, -1):
            for block in requests[at]:
                self._upcoming.setdefault(block, []).append(at)
        self._at = 0
        self._held: dict[int, float] = {}  # when each is needed next
        self._last_needed: list[tuple[float, int, int]] = []  # the latest first

    def __contains__(self, block: int) -> bool:
        return block in self._held

    def use(self, blocks: Sequence[int]) -> None:
        """Take in the next request's blocks."""
        for depth, block in enumerate(blocks):
            times = self._upcoming[block]
            while times and times[-1] <= self._at:
                times.pop()
            needed = times[-1] if times else math.inf
            self._held[block] = needed
            # Of two that are needed at the same time the later one of the prefix goes first.
            heapq.heappush(self._last_needed, (-needed, -depth, block))
        while len(self._held) > self._capacity:
            needed, _, block = heapq.heappop(self._last_needed)
            if self._held.get(block) == -needed:
                del self._held[block]
        self._at += 1


def most_hits(requests: Sequence[Sequence[int]], capacity: int) -> int:
    """Blocks that are found, of all that are asked for, by Belady's eviction.

    Args:
        requests: each one's block ids, in order of arrival.
        capacity: how many blocks the cache holds.
    """
    cache, hits = Belady(capacity, requests), 0
    for blocks in requests:
        hits += sum(block in cache for block in blocks)
        cache.use(blocks)
    return hits

"""The most prefix-cache hits that any cache of a size could have had: Belady's eviction."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def most_hits(requests: Sequence[Sequence[int]], capacity: int) -> int:
    """Blocks that are found, of all that are asked for, when what is needed last is evicted first.

    A block's id stands for all tokens up to its end, so a block is never needed earlier than the
    one before it, and what is evicted is always the end of a prefix. (Belady 1966: no eviction
    does better.)

    Args:
        requests: each one's block ids, in order of arrival.
        capacity: how many blocks the cache holds.
    """
    never = math.inf
    upcoming: dict[int, list[int]] = {}
    for at in range(len(requests) - 1, -1, -1):
        for block in requests[at]:
            upcoming.setdefault(block, []).append(at)
    held: dict[int, float] = {}  # when each is needed next
    last_needed: list[tuple[float, int, int]] = []  # the latest first
    hits = 0
    for at, blocks in enumerate(requests):
        for depth, block in enumerate(blocks):
            hits += block in held
            times = upcoming[block]
            while times and times[-1] <= at:
                times.pop()
            needed = times[-1] if times else never
            held[block] = needed
            # Of two that are needed at the same time the later one of the prefix goes first.
            heapq.heappush(last_needed, (-needed, -depth, block))
        while len(held) > capacity:
            needed, _, block = heapq.heappop(last_needed)
            if held.get(block) == -needed:
                del held[block]
    return hits

"""Belady's eviction against a search over everything."""

from __future__ import annotations

import functools
import itertools

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lab.belady import most_hits


def best(requests: tuple[tuple[int, ...], ...], capacity: int) -> int:
    """By trying every set of blocks that a cache could keep."""

    @functools.cache
    def search(at: int, held: frozenset[int]) -> int:
        if at == len(requests):
            return 0
        asked = frozenset(requests[at])
        there = held | asked
        keeps = itertools.combinations(sorted(there), min(capacity, len(there)))
        return len(asked & held) + max(search(at + 1, frozenset(kept)) for kept in keeps)

    return search(0, frozenset())


# Prefixes: a request is a path in a tree whose nodes are numbered.
PATHS = st.sampled_from([(1,), (1, 2), (1, 2, 3), (1, 4), (5,), (5, 6), (7,)])


@given(requests=st.lists(PATHS, max_size=7), capacity=st.integers(1, 4))
def test_no_eviction_finds_more(requests: list[tuple[int, ...]], capacity: int) -> None:
    assert most_hits(requests, capacity) == best(tuple(requests), capacity)


def test_a_cache_for_everything_misses_only_first_times() -> None:
    assert most_hits([(1, 2), (1, 2, 3), (1,)], 100) == 3

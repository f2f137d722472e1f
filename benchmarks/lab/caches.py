"""Caches of KV blocks to compare: LRU, ARC, and ours, by whole prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from xllm_kv.reuse import Reuse


class Cache(Protocol):
    """Holds so many blocks."""

    def __contains__(self, block: int) -> bool: ...

    def use(self, prompt: Sequence[int]) -> None:
        """Take in a prompt's blocks, its first one first."""


class Lru:
    """The least recently used goes; of one prompt its end."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._held

    def use(self, prompt: Sequence[int]) -> None:
        """See :class:`Cache`."""
        for block in reversed(prompt):
            self._held[block] = None
            self._held.move_to_end(block)
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)


class Arc:
    """Between recency and frequency, by what it should have kept (Megiddo and Modha, FAST 2003)."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._recent_share = capacity, 0.0
        self._recent: OrderedDict[int, None] = OrderedDict()
        self._frequent: OrderedDict[int, None] = OrderedDict()
        self._once_recent: OrderedDict[int, None] = OrderedDict()
        self._once_frequent: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._recent or block in self._frequent

    def use(self, prompt: Sequence[int]) -> None:
        """See :class:`Cache`."""
        for block in reversed(prompt):
            self._used(block)

    def _used(self, block: int) -> None:
        if block in self._recent:
            del self._recent[block]
        elif block in self._frequent:
            del self._frequent[block]
        elif block in self._once_recent:
            grow = max(1.0, len(self._once_frequent) / len(self._once_recent))
            self._recent_share = min(float(self._capacity), self._recent_share + grow)
            self._replace(frequent=False)
            del self._once_recent[block]
        elif block in self._once_frequent:
            shrink = max(1.0, len(self._once_recent) / len(self._once_frequent))
            self._recent_share = max(0.0, self._recent_share - shrink)
            self._replace(frequent=True)
            del self._once_frequent[block]
        else:
            self._new(block)
            return
        self._frequent[block] = None

    def _new(self, block: int) -> None:
        recent = len(self._recent) + len(self._once_recent)
        if recent >= self._capacity:
            if len(self._recent) < self._capacity:
                self._once_recent.popitem(last=False)
                self._replace(frequent=False)
            else:
                self._recent.popitem(last=False)
        else:
            known = recent + len(self._frequent) + len(self._once_frequent)
            if known >= self._capacity:
                if known >= 2 * self._capacity:
                    self._once_frequent.popitem(last=False)
                self._replace(frequent=False)
        self._recent[block] = None

    def _replace(self, *, frequent: bool) -> None:
        held = len(self._recent)
        much = held > self._recent_share or (frequent and held == self._recent_share)
        if self._recent and (much or not self._frequent):
            self._once_recent[self._recent.popitem(last=False)[0]] = None
        else:
            self._once_frequent[self._frequent.popitem(last=False)[0]] = None


class Ours:
    """Predicted reuse, as host memory gives up KV with ``xllm.kv``."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._reuse = capacity, Reuse(capacity)
        self._held: set[int] = set()

    def __contains__(self, block: int) -> bool:
        return block in self._held

    def use(self, prompt: Sequence[int]) -> None:
        """See :class:`Cache`."""
        self._reuse.used(prompt)
        for block in prompt:
            self._held.add(block)
            self._reuse.held(block)
        gone = self._reuse.victims(len(self._held) - self._capacity, lambda _: True)
        for victim in gone:
            self._reuse.lost(victim)
        self._held.difference_update(gone)

"""Eviction by predicted reuse, as a cache policy of vLLM's offloading manager."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus

from xllm_kv.reuse import Reuse


class ReuseCachePolicy(CachePolicy):  # type: ignore[misc]
    """Holds the chunks of host memory; which one to give up, :class:`Reuse` says.

    Attributes:
        reuse: told of each request's use by the manager, once and in the order of the prompt.
    """

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self.reuse = Reuse(cache_capacity)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._idle: set[OffloadKey] = set()

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        """See vLLM's class."""
        return self._chunks.get(key)

    def insert(self, key: OffloadKey, chunk: ChunkStatus) -> None:
        """See vLLM's class."""
        self._chunks[key] = chunk
        self.reuse.held(key)
        if chunk.ref_cnt == 0:
            self._idle.add(key)

    def remove(self, key: OffloadKey) -> None:
        """See vLLM's class."""
        del self._chunks[key]
        self._idle.discard(key)
        self.reuse.lost(key)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Uses are noted when a request comes."""

    def on_request_finished(self, *args: Any) -> None:
        """Uses are noted when a request comes."""

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        """See vLLM's class."""
        victims = self.reuse.victims(n, lambda key: key in self._idle and key not in protected)
        if len(victims) < n:
            return None
        found = [(key, self._chunks[key]) for key in victims]
        for key in victims:
            self.remove(key)
        return found

    def mark_evictable(self, key: OffloadKey) -> None:
        """See vLLM's class."""
        self._idle.add(key)

    def mark_non_evictable(self, key: OffloadKey) -> None:
        """See vLLM's class."""
        self._idle.discard(key)

    def clear(self) -> None:
        """See vLLM's class."""
        self._chunks.clear()
        self._idle.clear()
        self.reuse.clear()

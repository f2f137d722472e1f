"""A store of Redis' kind, or Mooncake's, as a tier: what one instance computed, others fetch.

Each chunk is one value, written at once, under the identity of the engines that can use it. What
the store has room for, and what it gives up then, are its own settings (Redis' ``maxmemory`` and
its policy). A store that is away, or that takes longer than a second to say what it has, is left
alone for a while.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Any

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from xllm_kv.plugin import remote_url
from xllm_kv.report import Room
from xllm_kv.tiers.block_format import BlockError, head_of, unpack
from xllm_kv.tiers.remote_store import StoreError, open_store
from xllm_kv.tiers.store import StoreTier

_SLOW_S, _REST_S = 1.0, 5.0
_MOST_TOLD = 1 << 18  # chunks of which routers believe that they are there


class RemoteTier(StoreTier):
    """Keeps chunks in a store that other instances share. Its address is a secret setting.

    Args:
        expiry_s: how long a chunk stays that nobody asks for, where the store can tell.
    """

    name = "in the remote store"
    failures = (StoreError, OSError)
    cache_hit_source = CacheHitSource.EXTERNAL_UNSPECIFIED

    def __init__(self, *args: Any, expiry_s: float, **others: Any) -> None:
        super().__init__(*args, **others)
        self.locality = Locality.REMOTE
        self._told: OrderedDict[OffloadKey, None] = OrderedDict()
        self._rests_until_s = float("-inf")
        self._store = open_store(remote_url(), max(1, round(expiry_s)))
        self._questions = _Questions(self)

    @property
    def room(self) -> Room:
        """See the class above; what it may keep is the store's own setting."""
        return Room(len(self._told) * self.block_size_bytes, 0)

    @property
    def busy(self) -> bool:
        """See the class above; a question may be waited for as well."""
        return self._questions.asking or super().busy

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """See vLLM's class; what is not known yet is asked of the store."""
        if not self._accepts(promotions=True):
            return LookupResult.MISS
        found = self._questions.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        if not found:
            self._forget([key])
        return LookupResult.HIT if found else LookupResult.MISS

    @property
    def away(self) -> bool:
        """Whether the store is left alone, since it failed or was slow a moment ago."""
        return time.monotonic() < self._rests_until_s

    def _accepts(self, *, promotions: bool) -> bool:
        return not self.away and super()._accepts(promotions=promotions)

    def held(self, keys: Collection[OffloadKey]) -> list[bool]:
        """Which of these the store has; runs in a thread, and asks nothing of one that rests."""
        if self.away:
            return [False] * len(keys)
        began_s = time.monotonic()
        try:
            return self._renewed(keys)
        except self.failures as error:
            self._failed(error)
            return [False] * len(keys)
        finally:
            if time.monotonic() - began_s > _SLOW_S:
                self._rest()

    def _renewed(self, keys: Collection[OffloadKey]) -> list[bool]:
        """Which of these the store has, where they stay for a while."""
        return self._store.held([self._name(key) for key in keys])

    def _failed(self, error: Exception) -> None:
        super()._failed(error)
        if isinstance(error, OSError):
            self._rest()

    def _rest(self) -> None:
        self._rests_until_s = time.monotonic() + _REST_S

    def _lacking(self, keys: Collection[OffloadKey]) -> set[OffloadKey]:
        return {key for key, found in zip(keys, self._renewed(keys), strict=True) if not found}

    def _put(self, key: OffloadKey, content: memoryview) -> None:
        value = b"".join((head_of(self._identity + key, content), content))
        self._store.put(self._name(key), value)

    def _get(self, key: OffloadKey, into: memoryview) -> None:
        value = self._store.get(self._name(key))
        if value is None:
            raise BlockError("the block is not there any more")
        try:
            unpack(value, self._identity + key, into)
        except BlockError:
            self._store.delete(self._name(key))
            raise

    def _stored(self, keys: Collection[OffloadKey]) -> None:
        self._told |= dict.fromkeys(keys)
        self._tell(keys, removed=False)
        while len(self._told) > _MOST_TOLD:
            self._forget([next(iter(self._told))])

    def _unread(self, keys: Collection[OffloadKey], error: Exception | None) -> None:
        self._questions.mark_miss(keys)
        if isinstance(error, BlockError):
            self._forget(list(keys)[:1])

    def _forget(self, keys: Iterable[OffloadKey]) -> None:
        told = [key for key in keys if key in self._told]
        for key in told:
            del self._told[key]
        self._tell(told, removed=True)

    def _open(self) -> None:
        """Nothing is asked before a request wants it."""

    def _name(self, key: OffloadKey) -> str:
        return f"xllm-kv:{self._identity.hex()[:32]}:{key.hex()}"

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """See vLLM's class."""
        self._questions.flush()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """See vLLM's class."""
        self._questions.cleanup(req_context.req_id)

    def shutdown(self) -> None:
        """See vLLM's class."""
        self._questions.shutdown()
        super().shutdown()
        self._store.close()


class _Questions(AsyncLookupManager):  # type: ignore[misc]
    """What the store has, asked by vLLM's own thread for it, once for each request.

    Attributes:
        asking: whether an answer is waited for.
    """

    def __init__(self, tier: RemoteTier) -> None:
        self._tier, self.asking = tier, False
        super().__init__(tier.tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        """See vLLM's class."""
        self.asking = True
        try:
            return self._tier.held(keys)
        finally:
            self.asking = False

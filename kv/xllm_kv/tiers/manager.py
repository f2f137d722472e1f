"""Our decisions before vLLM's tiering manager: what is kept, what is fetched, what is given up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingEvent,
    OffloadingManager,
    OffloadKey,
    OffloadPolicy,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager

from xllm_kv.config import Admission, Stop
from xllm_kv.prices import Prices, Run
from xllm_kv.report import Room
from xllm_kv.reuse import Reuse
from xllm_plugins.compat import kv_tiers

HOST = "host"
_PENDING = (LookupResult.HIT_PENDING, LookupResult.RETRY)
_AHEAD = 0.25  # of host memory, for requests whose turn has not come
_AHEAD_MS = 50.0  # of one of a tier's two threads at once, for these


@dataclass(frozen=True)
class Wanted:
    """A request's KV that the device lacks.

    Attributes:
        chains: by KV cache group, the keys of its whole prompt, each chunk's in order.
        first: the first chunk that the device lacks.
        chunk_tokens, chunk_bytes: of one chunk.
        prefill_ms: how long the first tokens that it lacks take to compute.
        online: the request's class.
        tenant: the request's cache salt, which its keys depend on.
        pin_s: how long host memory may not give its prompt up, s.
    """

    chains: Sequence[Sequence[OffloadKey]]
    first: int
    chunk_tokens: int
    chunk_bytes: int
    prefill_ms: Callable[[int], float]
    online: bool = True
    tenant: str = ""
    pin_s: float = 0.0


@dataclass
class _Asked:
    context: ReqContext
    fetched: set[OffloadKey] | None = None  # None: whatever there is
    deadline_s: float = float("inf")
    patience_s: float = float("inf")
    counted: bool = False
    priced: bool = False
    late: bool = False
    refused: set[int] = field(default_factory=set)  # groups with a hole, of which no more is kept


class GatedManager(OffloadingManager):  # type: ignore[misc]
    """Lets through to vLLM's manager what pays.

    Args:
        inner: moves chunks between host memory and the tiers behind it.
        reuse: how the use of chunks is followed; None leaves eviction to vLLM's own policy and
            follows uses only for admission.
        prices: what fetches cost.
        priced: whether only what beats computing is fetched; otherwise whatever there is, without
            an end to waiting for it.
        stop: how long a request waits for what is fetched for it.
        admission: what is kept.
        capacity: chunks in host memory.
        chunk_bytes: of one of them.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        inner: TieringOffloadingManager,
        reuse: Reuse | None,
        prices: Prices,
        *,
        priced: bool,
        stop: Stop,
        admission: Admission,
        capacity: int,
        chunk_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.prices, self.chunk_bytes = prices, chunk_bytes
        self._inner, self._priced, self._stop = inner, priced, stop
        self._admission, self._clock = admission, clock
        self._host_bytes = capacity * chunk_bytes
        self._ranks = reuse is not None
        self._reuse = reuse if reuse is not None else Reuse(capacity)
        self._asked: dict[str, _Asked] = {}
        self._expected: dict[str, Wanted] = {}
        self._ahead: Counter[str] = Counter()  # bytes, by request

    @property
    def rooms(self) -> dict[str, Room]:
        """How large each tier is, and how full."""
        host = Room(kv_tiers.chunks_held(self._inner) * self.chunk_bytes, self._host_bytes)
        behind = {tier.tier_type: tier.room for tier in self._inner.secondary_tiers}
        return {HOST: host, **behind}

    @property
    def prefetches(self) -> bool:
        """Whether it is of use to say early what will be wanted."""
        return self._priced and bool(self._inner.secondary_tiers)

    def expect(self, req_id: str, wanted: Wanted) -> None:
        """A request waits in the queue: what only slower tiers hold of it may be brought nearer."""
        if self.prefetches and len(wanted.chains) == 1:
            self._expected[req_id] = wanted

    def plan(self, req_id: str, wanted: Wanted) -> None:
        """Decide how much of a request's prompt is fetched."""
        self._forget(req_id)
        asked = self._asked.get(req_id)
        if asked is None:
            return
        self._used(asked, wanted)
        if not self._priced or len(wanted.chains) != 1:
            return  # the parts of several groups are only of use together
        runs, known = self._runs(asked, wanted)
        counted, asked.priced = known and not asked.priced, asked.priced or known
        fetch = self.prices.choose(runs, wanted.prefill_ms, self._clock(), counted=counted)
        chunks = -(-fetch.tokens // wanted.chunk_tokens)
        chain = wanted.chains[0]
        if counted:
            self.prices.missed(runs, len(chain[wanted.first :]) * wanted.chunk_tokens)
        asked.fetched = set(chain[wanted.first : wanted.first + chunks])
        asked.patience_s = float("inf") if self._stop is Stop.WAIT else fetch.deadline_ms / 1e3
        self._probe(fetch.probe, wanted, runs)

    def _used(self, asked: _Asked, wanted: Wanted) -> None:
        if asked.counted:
            return
        asked.counted = True
        for chain in wanted.chains:
            self._reuse.used(chain, online=wanted.online, tenant=wanted.tenant)
            if wanted.pin_s:
                self._reuse.pin(chain, self._clock() + wanted.pin_s)
            for tier in self._inner.secondary_tiers:
                tier.touch(chain, asked.context)

    def _runs(self, asked: _Asked, wanted: Wanted) -> tuple[list[Run], bool]:
        """Where what the device lacks lies, as far as it may lie anywhere, and whether it does."""
        runs, known = [], True
        for key in wanted.chains[0][wanted.first :]:
            tier, found = self._tier(key, asked.context)
            if tier is None:
                break
            known &= found is not LookupResult.RETRY
            runs.append(Run(tier, wanted.chunk_tokens, wanted.chunk_bytes))
        return runs, known

    def _tier(self, key: OffloadKey, context: ReqContext) -> tuple[str | None, LookupResult]:
        found = self._inner.primary_tier.lookup(key, context)
        if found is not LookupResult.MISS:
            late = self.prices.distrusted if found is LookupResult.HIT_PENDING else None
            return late or HOST, found  # what is on its way may come from a tier that is late
        for tier in self._inner.secondary_tiers:
            found = tier.lookup(key, context)
            if found is not LookupResult.MISS:
                return str(tier.tier_type), found
        return None, found

    def _probe(self, refused: str | None, wanted: Wanted, runs: Sequence[Run]) -> None:
        """Fetch one chunk of a tier that was refused, with nobody waiting for it."""
        for tier in self._inner.secondary_tiers:
            if tier.tier_type == refused:
                held = zip(wanted.chains[0][wanted.first :], runs, strict=False)
                tier.probe(next(key for key, run in held if run.tier == refused))

    def _forget(self, req_id: str) -> None:
        """A request waits no longer."""
        self._expected.pop(req_id, None)
        self._ahead.pop(req_id, None)

    def _prefetch(self) -> None:
        """Bring a piece of what waits first to host memory, online before offline.

        Nothing is begun while anything is read, so that no load has to wait for it.
        """
        tiers = self._inner.secondary_tiers
        room = max(self.chunk_bytes, int(_AHEAD * self._host_bytes)) - self._ahead.total()
        if not self._expected or room < self.chunk_bytes or any(tier.busy for tier in tiers):
            return
        req_id = min(self._expected, key=lambda one: not self._expected[one].online)
        asked, wanted = self._asked[req_id], self._expected[req_id]
        self._used(asked, wanted)
        runs, known = self._runs(asked, wanted)
        fetch = self.prices.choose(runs, wanted.prefill_ms, self._clock(), counted=False)
        self._probe(fetch.probe, wanted, runs)
        chunks = -(-fetch.tokens // wanted.chunk_tokens)
        chain = wanted.chains[0][wanted.first : wanted.first + chunks]
        behind = [pair for pair in zip(chain, runs, strict=False) if pair[1].tier != HOST]
        begun = self._begun(behind[: room // self.chunk_bytes], asked.context)
        self._ahead[req_id] += begun
        if known and not begun:
            del self._expected[req_id]  # it is all there, does not pay, or finds no room

    def _begun(self, behind: Sequence[tuple[OffloadKey, Run]], context: ReqContext) -> int:
        """Begin to fetch the first of these, as many as do not take long; bytes."""
        kv_bytes = 0
        for key, run in behind:
            ahead_ms = self.prices.fetch_ms(run.tier, kv_bytes + run.kv_bytes)
            if run.tier != behind[0][1].tier or (kv_bytes and ahead_ms > _AHEAD_MS):
                break
            if self._inner.lookup(key, context) is not LookupResult.HIT_PENDING:
                break
            kv_bytes += run.kv_bytes
            self.prices.counts[run.tier].prefetched_bytes += run.kv_bytes
        return kv_bytes

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """See vLLM's class; what is not worth its fetch, or late, is missed."""
        asked = self._asked.get(req_context.req_id)
        if asked is None or asked.fetched is None:
            return self._inner.lookup(key, req_context)
        if key not in asked.fetched:
            return LookupResult.MISS
        found = self._inner.lookup(key, req_context)
        if found not in _PENDING:
            return found
        if self._stop is Stop.BEST_EFFORT:
            return LookupResult.MISS
        now_s = self._clock()
        if asked.deadline_s == float("inf"):
            asked.deadline_s = now_s + asked.patience_s
        if now_s < asked.deadline_s:
            return found
        if not asked.late:
            asked.late = True
            for tier in self._inner.secondary_tiers:
                if tier.busy:
                    self.prices.late(tier.tier_type)
        return LookupResult.MISS

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        """See vLLM's class; what is not worth its place is not kept, nor what follows it."""
        asked = self._asked.get(req_context.req_id)
        refused = asked.refused if asked is not None else set()
        kept = []
        for key in keys:
            group = get_offload_group_idx(key)
            if group in refused:
                continue
            if self._worth(key, req_context):
                kept.append(key)
            else:
                refused.add(group)
        return self._inner.prepare_store(kept, req_context)

    def _worth(self, key: OffloadKey, context: ReqContext) -> bool:
        if self._admission is Admission.SECOND_USE:
            return self._reuse.uses(key) > 1
        if not self._ranks:
            return True
        held = self._inner.primary_tier.lookup(key, context) is not LookupResult.MISS
        return held or self._reuse.worth(key)

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """See vLLM's class; also what the device holds is offered, which host memory may lack."""
        self._inner.on_new_request(req_context)
        self._asked[req_context.req_id] = _Asked(req_context)
        return RequestOffloadingContext(policy=OffloadPolicy.REQUEST_LEVEL)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """See vLLM's class."""
        self._asked.pop(req_context.req_id, None)
        self._forget(req_context.req_id)
        self._inner.on_request_finished(req_context)

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> Any:
        """See vLLM's class."""
        return self._inner.get_load_source(key, req_context)

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        """See vLLM's class."""
        return self._inner.prepare_load(keys, req_context)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """See vLLM's class."""
        self._inner.touch(keys, req_context)

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """See vLLM's class."""
        self._inner.complete_load(keys, req_context)

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        """See vLLM's class."""
        self._inner.complete_store(keys, req_context, success)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """See vLLM's class."""
        yield from self._inner.take_events()

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """See vLLM's class."""
        self._reuse.unpin(self._clock())
        self._prefetch()
        self._inner.on_schedule_end(context)

    def has_pending_work(self) -> bool:
        """See vLLM's class."""
        return bool(self._inner.has_pending_work())

    def reset_cache(self) -> None:
        """See vLLM's class."""
        self._inner.reset_cache()

    def get_stats(self) -> Any:
        """See vLLM's class."""
        return self._inner.get_stats()

    def shutdown(self) -> None:
        """See vLLM's class."""
        self._inner.shutdown()

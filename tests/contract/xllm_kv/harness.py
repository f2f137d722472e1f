"""A scheduler's side and a worker's side of tiers, over vLLM's own manager."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)

from xllm_kv.prices import TierCounts
from xllm_kv.tiers.manager import GatedManager, Wanted
from xllm_kv.tiers.spec import TiersSpec
from xllm_kv.tiers.worker import HostCopies

HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING
CHUNK, CHUNKS, TOKENS = 4096, 8, 16
MOST_LOOKS = 6_000  # a minute's, for what takes a moment on a machine that is not busy
END = ScheduleEndContext((), ())


def key(number: int) -> Any:
    return make_offload_key(number.to_bytes(32, "big"), 0)


def config(engine: str, **extra: Any) -> OffloadingConfig:
    settings = {
        "admission": "predicted",
        "tenant_share": 1.0,
        "pin_share": 0.5,
        "stop": "deadline",
        "price": True,
        **extra.pop("xllm", {}),
    }
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(TOKENS, ("layer",), 0),),
        worker_kv_bytes_per_block=CHUNK,
        enable_kv_cache_events=True,
        extra_config={
            "cpu_bytes_to_use": CHUNK * CHUNKS,
            "eviction_policy": "ReuseCachePolicy",
            "cache_policy_module_path": "xllm_kv.tiers.cache_policy",
            "xllm": settings,
            **extra,
        },
        engine_id=f"xllm-test-{engine}-{time.time_ns()}",
        model=OffloadingModelConfig("a/model", "float32"),
        cache=OffloadingCacheConfig(TOKENS, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
    )


class Engine:
    """A scheduler's side and a worker's side with 16 blocks of KV."""

    def __init__(self, name: str, **extra: Any) -> None:
        self.spec = TiersSpec(config(name, **extra))
        self.manager: GatedManager = self.spec.get_manager()
        self.device = torch.zeros((16, CHUNK), dtype=torch.int8)
        caches = CanonicalKVCaches([CanonicalKVCacheTensor(self.device, CHUNK)], [[]])
        worker = self.spec.get_worker(caches)
        assert isinstance(worker, HostCopies)
        self.worker = worker
        self.jobs = 0

    def request(
        self, name: str, numbers: list[int], prefill_ms: float = 10_000.0, **more: Any
    ) -> ReqContext:
        """A request for a prompt of these blocks, none of them on the device."""
        context = ReqContext(name)
        self.manager.on_new_request(context)
        self.plans(context, numbers, prefill_ms, **more)
        return context

    def plans(
        self,
        context: ReqContext,
        numbers: list[int],
        prefill_ms: float = 10_000.0,
        **more: Any,
    ) -> None:
        """What is fetched for it is decided, as in every step that it waits."""
        chains, prefill = [[key(n) for n in numbers]], lambda count: prefill_ms * count
        wanted = Wanted(chains, 0, TOKENS, CHUNK, prefill, **more)
        self.manager.plan(context.req_id, wanted)

    def keeps(self, context: ReqContext, numbers: list[int]) -> list[int]:
        """Offer blocks that lie on the device under their own numbers; which ones are kept."""
        for number in numbers:
            self.device[number] = number
        made = self.manager.prepare_store([key(n) for n in numbers], context)
        assert made is not None
        kept = [n for n in numbers if key(n) in set(made.keys_to_store)]
        if kept:
            self.jobs += 1
            on_device = GPULoadStoreSpec(kept, (len(kept),), (0,))
            assert self.worker.submit_store(self.jobs, on_device, made.store_spec)
            assert [one.success for one in self.worker.get_finished()] == [True]
            self.manager.complete_store(made.keys_to_store, context)
        return kept

    def found(self, context: ReqContext, *numbers: int) -> list[LookupResult]:
        """What lookups say once nothing is under way any more."""
        for _ in range(MOST_LOOKS):
            results = [self.manager.lookup(key(number), context) for number in numbers]
            self.manager.on_schedule_end(END)
            if not {LookupResult.HIT_PENDING, LookupResult.RETRY} & set(results):
                return results
            time.sleep(0.01)
        raise AssertionError("it is never done")

    def settled(self) -> None:
        """Until nothing is under way."""
        for _ in range(MOST_LOOKS):
            self.manager.on_schedule_end(END)
            if not self.manager.has_pending_work():
                return
            time.sleep(0.01)
        raise AssertionError("it is never done")

    def fetched(self, context: ReqContext, numbers: list[int], to: list[int]) -> None:
        """Copy blocks to other places of the device."""
        spec = self.manager.prepare_load([key(n) for n in numbers], context)
        self.jobs += 1
        assert self.worker.submit_load(self.jobs, spec, GPULoadStoreSpec(to, (len(to),), (0,)))
        self.worker.get_finished()
        self.manager.complete_load([key(n) for n in numbers], context)

    def ends(self, *contexts: ReqContext) -> None:
        for context in contexts:
            self.manager.on_request_finished(context)

    def closes(self) -> None:
        self.worker.shutdown()
        self.manager.shutdown()


def kept(engine: Engine, numbers: list[int]) -> None:
    """A request computes these blocks, and they have gone to the store."""
    context = engine.request("first", numbers)
    assert engine.keeps(context, numbers) == numbers
    engine.settled()
    engine.ends(context)


def counts(engine: Engine) -> TierCounts:
    """Of the remote tier."""
    return engine.manager.prices.counts["RemoteTier"]

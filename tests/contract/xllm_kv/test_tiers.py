"""The tiers over vLLM's own manager: what is kept, fetched, priced, damaged and given up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugins.compat import inspect_seam

if not inspect_seam("kv_tiers").holds:
    pytest.skip(inspect_seam("kv_tiers").reason, allow_module_level=True)

import torch
from vllm.v1.core import kv_cache_utils
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

from xllm_kv.config import Admission
from xllm_kv.tiers.block_file import read_block
from xllm_kv.tiers.manager import HOST, GatedManager, Wanted
from xllm_kv.tiers.spec import TiersSpec
from xllm_kv.tiers.worker import HostCopies

pytestmark = pytest.mark.vllm
HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING
CHUNK, CHUNKS, TOKENS = 4096, 8, 16
END = ScheduleEndContext((), ())


@pytest.fixture(autouse=True)
def hash_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"seed", raising=False)


def key(number: int) -> Any:
    return make_offload_key(number.to_bytes(32, "big"), 0)


def config(engine: str, **extra: Any) -> OffloadingConfig:
    settings = {"admission": "predicted", "price": True, **extra.pop("xllm", {})}
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
        self, name: str, numbers: list[int], prefill_ms: float = 100.0, *, online: bool = True
    ) -> ReqContext:
        """A request for a prompt of these blocks, none of them on the device."""
        context = ReqContext(name)
        self.manager.on_new_request(context)
        wanted = Wanted(
            [[key(n) for n in numbers]], 0, TOKENS, CHUNK, lambda count: prefill_ms * count, online
        )
        self.manager.plan(name, wanted)
        return context

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
        for _ in range(500):
            results = [self.manager.lookup(key(number), context) for number in numbers]
            self.manager.on_schedule_end(END)
            if not {LookupResult.HIT_PENDING, LookupResult.RETRY} & set(results):
                return results
            time.sleep(0.01)
        raise AssertionError("it is never done")

    def settled(self) -> None:
        """Until nothing is under way."""
        for _ in range(500):
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


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine("host")
    yield made
    made.closes()


def disk(folder: Path, chunks: int = 100) -> dict[str, Any]:
    tier = {"type": "DiskTier", "module_path": "xllm_kv.tiers.disk", "folder": str(folder)}
    return {"secondary_tiers": [{**tier, "capacity": chunks * CHUNK}]}


def test_what_was_kept_comes_back_as_it_was(engine: Engine) -> None:
    first = engine.request("a", [1, 2, 3])
    assert engine.keeps(first, [1, 2, 3]) == [1, 2, 3]
    engine.ends(first)
    again = engine.request("b", [1, 2, 3])
    assert engine.found(again, 1, 2, 3) == [HIT] * 3
    engine.fetched(again, [1, 2, 3], [10, 11, 12])
    assert torch.equal(engine.device[10:13], engine.device[1:4])
    assert engine.device[12, 0] == 3


def test_what_takes_longer_to_fetch_than_to_compute_is_missed(engine: Engine) -> None:
    first = engine.request("a", [1])
    engine.keeps(first, [1])
    cheap = engine.request("b", [1], prefill_ms=0.0)
    assert engine.found(cheap, 1) == [MISS]
    assert engine.manager.prices.counts[HOST].refused_tokens == TOKENS


def test_the_unlikely_is_given_up_for_the_likely(engine: Engine) -> None:
    for name in "ab":
        engine.keeps(engine.request(name, [1, 2]), [1, 2])
    other = engine.request("c", [3, 4, 5, 6, 7, 8, 9, 10])
    engine.keeps(other, [3, 4, 5, 6, 7, 8])
    offline = engine.request("d", [11, 12], online=False)
    assert engine.keeps(offline, [11, 12]) == []  # full of what online requests use
    assert engine.found(engine.request("e", [1, 2]), 1, 2) == [HIT, HIT]


def test_at_second_use_nothing_is_kept_at_first_sight() -> None:
    engine = Engine("second", xllm={"admission": Admission.SECOND_USE.value})
    first = engine.request("a", [1, 2])
    assert engine.keeps(first, [1, 2]) == []
    second = engine.request("b", [1, 3])
    assert engine.keeps(second, [1, 3]) == [1]
    engine.closes()


def test_the_disk_keeps_what_host_memory_gives_up_and_outlives_the_process(tmp_path: Path) -> None:
    engine = Engine("disk", **disk(tmp_path))
    first = engine.request("a", [1, 2, 3])
    engine.keeps(first, [1, 2, 3])
    engine.settled()
    engine.ends(first)
    stored = [event for event in engine.manager.take_events() if not event.removed]
    assert {event.medium.value for event in stored} == {"CPU", "STORAGE"}
    engine.closes()

    again = Engine("disk", **disk(tmp_path))
    asked = again.request("b", [1, 2, 3])
    assert again.found(asked, 1, 2, 3) == [HIT] * 3
    again.fetched(asked, [1, 2, 3], [4, 5, 6])
    assert [int(again.device[n, 7]) for n in (4, 5, 6)] == [1, 2, 3]
    again.closes()


@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_a_damaged_file_is_missed_and_removed(tmp_path: Path, damage: str) -> None:
    engine = Engine("before", **disk(tmp_path))
    first = engine.request("a", [1, 2])
    engine.keeps(first, [1, 2])
    engine.settled()
    engine.closes()
    (victim,) = tmp_path.rglob(key(2).hex())
    content = bytearray(victim.read_bytes())
    if damage == "gone":
        victim.unlink()
    elif damage == "short":
        victim.write_bytes(content[:-1])
    else:
        content[-1] ^= 1
        victim.write_bytes(content)

    engine = Engine("after", **disk(tmp_path))
    context = engine.request("b", [1, 2])
    if damage == "gone":
        assert engine.found(context, 1, 2) == [HIT, MISS]
    else:
        assert engine.found(context, 1, 2) == [HIT, MISS]
        assert engine.manager.prices.counts["DiskTier"].errors == 1
        assert not victim.exists()
    engine.closes()


def test_another_models_files_are_not_used(tmp_path: Path) -> None:
    engine = Engine("one", **disk(tmp_path))
    first = engine.request("a", [1])
    engine.keeps(first, [1])
    engine.settled()
    engine.closes()
    other = TiersSpec(config("two", **disk(tmp_path)))
    object.__setattr__(other.config, "model", OffloadingModelConfig("another/model", "float32"))
    manager = other.get_manager()
    manager.on_new_request(context := ReqContext("b"))
    assert manager.lookup(key(1), context) is MISS
    manager.shutdown()


def test_the_disk_keeps_to_its_size(tmp_path: Path) -> None:
    engine = Engine("small", **disk(tmp_path, chunks=3))
    for name, numbers in (("a", [1, 2]), ("b", [3, 4]), ("c", [5])):
        context = engine.request(name, numbers)
        engine.keeps(context, numbers)
        engine.settled()
        engine.ends(context)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {key(n).hex() for n in (3, 4, 5)}
    assert engine.manager.prices.counts["DiskTier"].evicted == 2
    engine.closes()


def test_a_disk_that_refuses_costs_nothing_but_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xllm_kv.tiers import disk as module

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_block", full)
    engine = Engine("full", **disk(tmp_path))
    context = engine.request("a", [1])
    assert engine.keeps(context, [1]) == [1]
    engine.settled()
    assert engine.found(engine.request("b", [1]), 1) == [HIT]
    assert engine.manager.prices.counts["DiskTier"].errors == 1
    engine.closes()


def test_a_fetch_that_is_late_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xllm_kv.tiers import disk as module

    engine = Engine("late", **disk(tmp_path))
    first = engine.request("a", [1])
    engine.keeps(first, [1])
    engine.settled()
    engine.closes()

    clock = SimpleNamespace(s=0.0)
    engine = Engine("late", **disk(tmp_path))
    monkeypatch.setattr(engine.manager, "_clock", lambda: clock.s)

    def slowly(*args: Any) -> None:
        time.sleep(0.2)
        read_block(*args)

    monkeypatch.setattr(module, "read_block", slowly)
    slow = engine.request("b", [1], prefill_ms=1.0)
    assert engine.manager.lookup(key(1), slow) is PENDING
    engine.manager.on_schedule_end(END)
    clock.s = 60.0
    assert engine.manager.lookup(key(1), slow) is MISS
    engine.settled()
    assert engine.manager.prices.counts["DiskTier"].late == 1
    # It has come in the meantime, and lies in host memory.
    assert engine.found(engine.request("c", [1]), 1) == [HIT]
    engine.closes()

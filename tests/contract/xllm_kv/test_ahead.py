"""What waiting requests will need is brought to host memory, as far as nobody is kept waiting."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xllm_plugins.compat import inspect_seam

if not inspect_seam("kv_tiers").holds:
    pytest.skip(inspect_seam("kv_tiers").reason, allow_module_level=True)

from vllm.config import KVTransferConfig, VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_offload.base import ReqContext

from benchmarks.lab import engine as lab
from tests.contract.engine import build, request
from tests.contract.xllm_kv.harness import CHUNK, END, HIT, MOST_LOOKS, TOKENS, Engine, key
from xllm_kv.config import KvSection
from xllm_kv.plugin import _tiers
from xllm_kv.tiers import disk
from xllm_kv.tiers.block_file import read_block
from xllm_kv.tiers.connector import TiersConnector, _pin_s, logger
from xllm_kv.tiers.manager import Wanted
from xllm_plugins.compat import kv_tiers

pytestmark = pytest.mark.vllm


class Reads:
    """What is read from the disk, and when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.may_go_on = threading.Event()
        monkeypatch.setattr(disk, "read_block", self._read)

    def _read(self, path: Path, *args: Any) -> None:
        self.names.append(path.name)
        self.may_go_on.wait(120)
        read_block(path, *args)

    def of(self, *numbers: int) -> bool:
        return self.names == [key(number).hex() for number in numbers]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """One with blocks 1 to 4 on its disk and nothing in host memory."""
    tier = {"type": "DiskTier", "module_path": "xllm_kv.tiers.disk", "folder": str(tmp_path)}
    behind = {"secondary_tiers": [{**tier, "capacity": 100 * CHUNK}]}
    before = Engine("before", **behind)
    before.keeps(before.request("first", [1, 2, 3, 4]), [1, 2, 3, 4])
    before.settled()
    before.closes()
    made = Engine("ahead", **behind)
    yield made
    made.closes()


@pytest.fixture
def reads(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    made = Reads(monkeypatch)
    yield made
    made.may_go_on.set()


def waits(
    engine: Engine, name: str, numbers: list[int], prefill_ms: float = 1e4, *, online: bool = True
) -> ReqContext:
    """A request comes, and its turn does not yet."""
    context = ReqContext(name)
    engine.manager.on_new_request(context)
    chains, prefill = [[key(n) for n in numbers]], lambda count: prefill_ms * count
    engine.manager.expect(name, Wanted(chains, 0, TOKENS, CHUNK, prefill, online))
    return context


def steps(engine: Engine, count: int = 20) -> None:
    """In which what must not be begun would be."""
    for _ in range(count):
        engine.manager.on_schedule_end(END)
        time.sleep(0.01)


def steps_until(engine: Engine, condition: Callable[[], bool]) -> None:
    for _ in range(MOST_LOOKS):
        engine.manager.on_schedule_end(END)
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it is never so")


def in_host(engine: Engine, *numbers: int) -> list[int]:
    host = engine.manager._inner.primary_tier
    return [n for n in numbers if host.lookup(key(n), ReqContext("look")) is HIT]


def test_it_is_there_when_the_requests_turn_comes(engine: Engine) -> None:
    context = waits(engine, "a", [1, 2])
    steps_until(engine, lambda: in_host(engine, 1, 2, 3, 4) == [1, 2])
    engine.plans(context, [1, 2])
    assert [engine.manager.lookup(key(n), context) for n in (1, 2)] == [HIT] * 2
    assert engine.manager.prices.counts["DiskTier"].prefetched_bytes == 2 * CHUNK
    assert not engine.manager._expected
    assert not engine.manager._ahead


def test_what_does_not_pay_is_left_where_it_is(engine: Engine) -> None:
    waits(engine, "a", [1, 2], prefill_ms=0.0)
    counts = engine.manager.prices.counts["DiskTier"]
    # One is read all the same, every 5 s, so that the tier's speed is known.
    steps_until(engine, lambda: counts.fetched_bytes == CHUNK)
    assert (counts.prefetched_bytes, in_host(engine, 1, 2)) == (0, [])
    assert not engine.manager._expected


def test_a_quarter_of_host_memory_is_taken_and_free_again(engine: Engine) -> None:
    first = waits(engine, "a", [1, 2, 3, 4])  # host memory has room for eight
    waits(engine, "b", [4])
    steps_until(engine, lambda: in_host(engine, 1, 2) == [1, 2])
    steps(engine)
    assert in_host(engine, 1, 2, 3, 4) == [1, 2]
    engine.ends(first)
    steps_until(engine, lambda: in_host(engine, 1, 2, 3, 4) == [1, 2, 4])


def test_pieces_are_short(engine: Engine, reads: Reads) -> None:
    for _ in range(20):
        engine.manager.prices.ended("DiskTier", CHUNK, 0.04)
        engine.manager.prices.ended("DiskTier", 2 * CHUNK, 0.08)
    waits(engine, "a", [1, 2], prefill_ms=1e3)
    steps(engine)
    assert engine.manager.prices.counts["DiskTier"].prefetched_bytes == CHUNK
    reads.may_go_on.set()
    steps_until(engine, lambda: in_host(engine, 1, 2) == [1, 2])


def test_nothing_is_begun_while_somebody_waits_for_a_load(engine: Engine, reads: Reads) -> None:
    loads = engine.request("now", [1])
    engine.manager.lookup(key(1), loads)
    engine.manager.on_schedule_end(END)
    waits(engine, "later", [2])
    steps(engine)
    steps_until(engine, lambda: reads.of(1))
    reads.may_go_on.set()
    steps_until(engine, lambda: reads.of(1, 2))


def test_a_load_does_not_wait_for_what_nobody_needs_yet(engine: Engine, reads: Reads) -> None:
    waits(engine, "later", [2, 3])
    steps_until(engine, lambda: reads.of(2))
    loads = engine.request("now", [1])
    engine.manager.lookup(key(1), loads)
    steps_until(engine, lambda: reads.of(2, 1))  # both are read at this moment


def test_online_requests_come_first(engine: Engine, reads: Reads) -> None:
    waits(engine, "offline", [1], online=False)
    waits(engine, "online", [2])
    reads.may_go_on.set()
    steps_until(engine, lambda: reads.of(2, 1))


def test_who_has_gone_is_not_fetched_for(engine: Engine, reads: Reads) -> None:
    engine.ends(waits(engine, "a", [1]))
    steps(engine)
    assert reads.of()


def test_vllms_scheduler_says_which_requests_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = _tiers(KvSection(host_gib=0.01, disk=str(tmp_path)))
    monkeypatch.setattr(
        lab,
        "VllmConfig",
        functools.partial(VllmConfig, kv_transfer_config=KVTransferConfig(**child)),
    )
    scheduler = build(Scheduler)
    connector = scheduler.connector
    assert isinstance(connector, TiersConnector)
    one = request("a", 16)
    one.sampling_params.extra_args = {"xllm_pin_s": 30}
    scheduler.add_request(one)
    expected = connector._manager._expected["a"]
    assert (len(expected.chains[0]), expected.first, expected.pin_s) == (4, 0, 30.0)
    assert kv_tiers.tokens_on_device(connector, one) == 0
    scheduler.schedule()
    assert not connector._manager._expected
    assert kv_tiers.tokens_on_device(connector, one) == 16
    scheduler.shutdown()


@pytest.mark.parametrize("asked", [-1.0, 1e9, float("nan"), "long", None])
def test_a_pin_that_is_no_time_is_ignored_with_a_sentence(
    asked: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *args: told.append(text % args))
    assert _pin_s({"xllm_pin_s": asked}) == 0.0
    assert told == [
        f"xllm_pin_s is {asked!r}, which is ignored; allowed is a number of seconds from 0 to 86400"
    ]

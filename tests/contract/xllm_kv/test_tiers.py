"""The tiers over vLLM's own manager: what is kept, fetched, priced, damaged and given up."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugins.compat import inspect_seam

if not inspect_seam("kv_tiers").holds:
    pytest.skip(inspect_seam("kv_tiers").reason, allow_module_level=True)

import torch
from vllm.v1.kv_offload.base import LookupResult, ReqContext
from vllm.v1.kv_offload.config import OffloadingModelConfig

from tests.contract.xllm_kv.harness import (
    CHUNK,
    CHUNKS,
    END,
    HIT,
    MISS,
    PENDING,
    TOKENS,
    Engine,
    config,
    key,
)
from xllm_kv.config import Admission, Stop
from xllm_kv.report import Room
from xllm_kv.tiers import store
from xllm_kv.tiers.block_file import read_block
from xllm_kv.tiers.manager import HOST
from xllm_kv.tiers.spec import TiersSpec

pytestmark = pytest.mark.vllm


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
    assert engine.manager.prices.counts[HOST].missed_tokens == TOKENS  # of the first request


def test_the_unlikely_is_given_up_for_the_likely(engine: Engine) -> None:
    for name in "ab":
        engine.keeps(engine.request(name, [1, 2]), [1, 2])
    other = engine.request("c", [3, 4, 5, 6, 7, 8, 9, 10])
    engine.keeps(other, [3, 4, 5, 6, 7, 8])
    offline = engine.request("d", [11, 12], online=False)
    assert engine.keeps(offline, [11, 12]) == []  # full of what online requests use
    assert engine.found(engine.request("e", [1, 2]), 1, 2) == [HIT, HIT]


def test_a_tenant_above_its_share_makes_room_for_others() -> None:
    engine = Engine("tenants", xllm={"tenant_share": 0.5})
    for name in ("b", "c"):
        engine.keeps(engine.request(name, [1, 2, 3, 4, 5, 6, 7], tenant="large"), list(range(1, 8)))
    engine.keeps(engine.request("a", [8], online=False, tenant="small"), [8])
    other = engine.request("d", [9, 10, 11], online=False, tenant="small")
    assert engine.keeps(other, [9, 10, 11]) == [9, 10, 11]
    assert engine.found(engine.request("e", [8, 9, 10, 11]), 8, 9, 10, 11) == [HIT] * 4
    assert engine.found(engine.request("f", [1, 2, 3, 4, 5]), 4, 5) == [HIT, MISS]
    engine.closes()


def test_what_a_request_pins_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, clock = Engine("pinned"), SimpleNamespace(s=0.0)
    monkeypatch.setattr(engine.manager, "_clock", lambda: clock.s)
    engine.keeps(engine.request("a", [1, 2], online=False, pin_s=60.0), [1, 2])
    for others in ([3, 4, 5, 6, 7, 8], [9, 10]):  # by which it is full, and two have to go
        engine.keeps(engine.request(f"b{others[0]}", others), others)
    assert engine.found(engine.request("c", [1, 2], online=False), 1, 2) == [HIT, HIT]
    clock.s = 60.0
    engine.manager.on_schedule_end(END)
    engine.keeps(engine.request("d", [11, 12]), [11, 12])
    assert MISS in engine.found(engine.request("e", [1, 2], online=False), 1, 2)
    engine.closes()


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
    host, behind = Room(3 * CHUNK, CHUNKS * CHUNK), Room(3 * CHUNK, 100 * CHUNK)
    assert engine.manager.rooms == {HOST: host, "DiskTier": behind}
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


def test_a_folder_that_is_deleted_is_made_again(tmp_path: Path) -> None:
    engine = Engine("deleted", **disk(tmp_path / "kv"))
    engine.keeps(engine.request("a", [1]), [1])
    engine.settled()
    shutil.rmtree(tmp_path / "kv")
    engine.keeps(engine.request("b", [2]), [2])
    engine.settled()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [key(2).hex()]
    engine.manager.reset_cache()
    assert engine.found(engine.request("c", [1]), 1) == [MISS]
    engine.closes()


def test_what_cannot_even_be_removed_is_missed(tmp_path: Path) -> None:
    engine = Engine("stuck", **disk(tmp_path))
    engine.keeps(engine.request("a", [1]), [1])
    engine.settled()
    (file,) = tmp_path.rglob(key(1).hex())
    file.unlink()
    file.mkdir()
    engine.manager.reset_cache()
    assert engine.found(engine.request("b", [1]), 1) == [MISS]
    engine.closes()


def test_what_a_killed_process_had_not_finished_goes(tmp_path: Path) -> None:
    engine = Engine("killed", **disk(tmp_path))
    engine.keeps(engine.request("a", [1]), [1])
    engine.settled()
    engine.closes()
    (file,) = tmp_path.rglob(key(1).hex())
    (file.parent / f".{key(2).hex()}.4711").write_bytes(file.read_bytes()[:100])
    engine = Engine("again", **disk(tmp_path))
    assert engine.found(engine.request("b", [1, 2]), 1, 2) == [HIT, MISS]
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    engine.closes()


@pytest.mark.parametrize(
    ("stop", "at_once", "later", "late"),
    [
        pytest.param(Stop.DEADLINE, PENDING, MISS, 1, id="late"),
        pytest.param(Stop.WAIT, PENDING, PENDING, 0, id="waited for"),
        pytest.param(Stop.BEST_EFFORT, MISS, MISS, 0, id="not waited for"),
    ],
)
def test_a_fetch_that_takes_long(
    stop: Stop,
    at_once: LookupResult,
    later: LookupResult,
    late: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from xllm_kv.tiers import disk as module

    engine = Engine("late", **disk(tmp_path))
    first = engine.request("a", [1])
    engine.keeps(first, [1])
    engine.settled()
    engine.closes()

    clock = SimpleNamespace(s=0.0)
    engine = Engine("late", **disk(tmp_path), xllm={"stop": stop.value})
    monkeypatch.setattr(engine.manager, "_clock", lambda: clock.s)

    may_go_on = threading.Event()

    def slowly(*args: Any) -> None:
        may_go_on.wait(120)
        read_block(*args)

    monkeypatch.setattr(module, "read_block", slowly)
    slow = engine.request("b", [1], prefill_ms=1.0)
    assert engine.manager.lookup(key(1), slow) is at_once
    engine.manager.on_schedule_end(END)
    clock.s = 60.0
    assert engine.manager.lookup(key(1), slow) is later
    may_go_on.set()
    engine.settled()
    assert engine.manager.prices.counts["DiskTier"].late == late
    # It has come in the meantime, and lies in host memory.
    assert engine.found(engine.request("c", [1]), 1) == [HIT]
    engine.closes()


def test_a_fetch_has_taken_no_longer_because_the_engine_was_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine("busy", **disk(tmp_path))
    engine.keeps(engine.request("a", [1]), [1])
    engine.settled()
    engine.manager.reset_cache()
    clock = SimpleNamespace(s=0.0)
    monkeypatch.setattr(store, "time", SimpleNamespace(monotonic=lambda: clock.s))
    assert engine.manager.lookup(key(1), engine.request("b", [1])) is PENDING
    engine.manager.on_schedule_end(END)
    engine.manager._inner.secondary_tiers[0].drain_jobs()
    clock.s = 60.0  # a step that computes prompts
    engine.settled()
    counts = engine.manager.prices.counts["DiskTier"]
    assert (counts.fetched_bytes, counts.fetch_s) == (CHUNK, 0.0)
    engine.closes()

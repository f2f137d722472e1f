"""A real ``mooncake_master``: what the tier does with a store of Redis' kind, it does with this."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from benchmarks.lab.mooncake_master import MooncakeMaster, find_master, mooncake_master
from xllm_plugins.compat import inspect_seam

if not inspect_seam("kv_tiers").holds:
    pytest.skip(inspect_seam("kv_tiers").reason, allow_module_level=True)
if find_master() is None:
    pytest.skip("needs the extra mooncake", allow_module_level=True)

from tests.contract.xllm_kv.harness import CHUNK, HIT, MISS, Engine, counts, kept, key
from xllm_kv.tiers import remote
from xllm_kv.tiers.mooncake_store import MooncakeStore
from xllm_kv.tiers.remote_store import StoreError

pytestmark = pytest.mark.vllm
TIER = {"type": "RemoteTier", "module_path": "xllm_kv.tiers.remote", "expiry_s": 60.0}
SEGMENT_GIB = 1 / 64
PEER = """
import sys
from xllm_kv.tiers.mooncake_store import MooncakeStore
store = MooncakeStore(sys.argv[1])
store.put("peers", b"kept here")
print("kept", flush=True)
sys.stdin.read()
"""
Start = Callable[[], Engine]


@pytest.fixture
def master() -> Iterator[MooncakeMaster]:
    with mooncake_master() as running:
        yield running


@pytest.fixture
def store(master: MooncakeMaster) -> Iterator[MooncakeStore]:
    """A client that gives memory, and looks into the store."""
    made = MooncakeStore(master.url(SEGMENT_GIB))
    assert made.held(["nothing"]) == [False]
    yield made
    made.close()


@pytest.fixture
def start(
    store: MooncakeStore, master: MooncakeMaster, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    """Starts engines on the store, which give it nothing."""
    monkeypatch.setenv("XLLM_KV_REMOTE", master.url())
    made: list[Engine] = []

    def start() -> Engine:
        made.append(Engine(f"mooncake-{len(made)}", secondary_tiers=[TIER]))
        return made[-1]

    yield start
    for engine in made:
        engine.closes()


def name(engine: Engine, number: int) -> str:
    """What a block is called in the store."""
    (tier,) = engine.manager._inner.secondary_tiers
    return str(tier._name(key(number)))


def test_one_computes_and_the_other_fetches(start: Start) -> None:
    one, other = start(), start()
    kept(one, [1, 2, 3])
    asked = other.request("b", [1, 2, 3, 4])
    assert other.found(asked, 1, 2, 3, 4) == [HIT, HIT, HIT, MISS]
    other.fetched(asked, [1, 2, 3], [5, 6, 7])
    assert [int(other.device[n, 7]) for n in (5, 6, 7)] == [1, 2, 3]
    assert counts(one).stored_bytes == counts(other).fetched_bytes == 3 * CHUNK
    again = start()
    kept(again, [1, 2, 3])
    assert counts(again).stored_bytes == 0  # it is there already


@pytest.mark.parametrize("damage", ["flipped", "short", "long", "swapped"])
def test_a_damaged_block_is_missed_counted_and_replaced(
    start: Start, store: MooncakeStore, damage: str
) -> None:
    before = start()
    kept(before, [1, 2])
    victim, other = name(before, 2), store.get(name(before, 1))
    whole = store.get(victim)
    assert whole is not None
    assert other is not None
    bad = {
        "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        "short": whole[:-1],
        "long": whole + b"x",
        "swapped": other,
    }[damage]
    store.delete(victim)
    store.put(victim, bad)
    engine = start()
    assert engine.found(engine.request("b", [1, 2]), 1, 2) == [HIT, MISS]
    assert counts(engine).errors == 1
    assert store.held([victim]) == [False]
    engine.keeps(engine.request("c", [1, 2]), [2])
    engine.settled()
    assert store.get(victim) == whole


def test_a_dead_master_costs_nothing_and_comes_back(
    start: Start, store: MooncakeStore, master: MooncakeMaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    kept(engine, [1])
    master.stop()
    engine.manager.reset_cache()
    assert engine.found(engine.request("b", [1]), 1) == [MISS]
    kept(engine, [2])  # not written, and nobody minds
    assert counts(engine).skipped == 1
    master.start()
    until_s = time.monotonic() + 30.0
    while not takes(store):
        assert time.monotonic() < until_s, "who gives memory never came back"
        time.sleep(0.1)
    monkeypatch.setattr(remote, "_REST_S", 0.0)
    (tier,) = engine.manager._inner.secondary_tiers
    monkeypatch.setattr(tier, "_rests_until_s", 0.0)
    kept(engine, [3])
    engine.manager.reset_cache()
    assert engine.found(engine.request("d", [3]), 3) == [HIT]


def takes(store: MooncakeStore) -> bool:
    """Whether anything can be kept."""
    try:
        store.put("anything", b"at all")
    except (StoreError, OSError):
        return False
    return True


def test_where_nobody_gives_memory_nothing_is_kept_and_nothing_fails(
    master: MooncakeMaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLLM_KV_REMOTE", master.url())
    engine = Engine("full", secondary_tiers=[TIER])
    kept(engine, [1])
    assert (counts(engine).errors, counts(engine).stored_bytes) == (1, 0)
    assert engine.found(engine.request("b", [1]), 1) == [HIT]
    engine.closes()


def test_what_a_dead_instance_gave_is_away_and_not_waited_for(master: MooncakeMaster) -> None:
    here = MooncakeStore(master.url())
    with subprocess.Popen(
        [sys.executable, "-c", PEER, master.url(SEGMENT_GIB)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as peer:  # fmt: skip
        assert peer.stdout is not None
        assert peer.stdout.readline() == "kept\n"
        assert here.get("peers") == b"kept here"
        peer.kill()
        peer.wait()
        assert here.held(["peers"]) == [True]  # for all that the master knows
        with pytest.raises(OSError, match="does not answer"):
            here.get("peers")
    here.close()


def test_what_cannot_be_reached_says_so() -> None:
    with pytest.raises(OSError, match="refused"):
        MooncakeStore("mooncake://127.0.0.1:1").held(["a"])


def test_a_name_that_is_taken_stays_as_it_is(store: MooncakeStore) -> None:
    store.put("a", b"first")
    store.put("a", b"second")
    assert store.get("a") == b"first"
    with pytest.raises(StoreError):
        store.put("larger than all there is", bytes(1 << 25))

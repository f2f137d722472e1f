"""A real Redis behind host memory: shared, checked, bounded, and left alone while it is away."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.lab.redis_server import RedisServer, redis_server
from benchmarks.lab.server import free_port
from xllm_plugins.compat import inspect_seam

if not inspect_seam("kv_tiers").holds:
    pytest.skip(inspect_seam("kv_tiers").reason, allow_module_level=True)
pytest.importorskip("redis")

import redis
from vllm.v1.kv_offload.base import Locality
from vllm.v1.kv_offload.config import OffloadingModelConfig

from tests.contract.xllm_kv.harness import END, HIT, MISS, TOKENS, Engine, counts, kept, key
from xllm_kv.config import KvSection
from xllm_kv.plugin import prepare
from xllm_kv.prices import PROBE_S
from xllm_kv.tiers import redis_store, remote
from xllm_plugins.errors import ConfigError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server"),
]
TIER = {"type": "RemoteTier", "module_path": "xllm_kv.tiers.remote", "expiry_s": 60.0}
Start = Callable[..., Engine]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store on a busy machine is not taken for one that is away."""
    for module, name in (
        (redis_store, "_CONNECT_S"),
        (redis_store, "_ANSWER_S"),
        (remote, "_SLOW_S"),
    ):
        monkeypatch.setattr(module, name, 60.0)


@pytest.fixture
def store() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def start(store: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts engines on the store."""
    monkeypatch.setenv("XLLM_KV_REMOTE", store.url)
    made: list[Engine] = []

    def start(**more: Any) -> Engine:
        made.append(Engine(f"remote-{len(made)}", secondary_tiers=[TIER], **more))
        return made[-1]

    yield start
    for engine in made:
        engine.closes()


def value(store: RedisServer, number: int) -> tuple[Any, Any]:
    """A client, and the name of a block."""
    client = redis.Redis(port=store.port)
    (name,) = client.keys(f"*:{key(number).hex()}")
    return client, name


def test_one_computes_and_the_other_fetches(start: Start, store: RedisServer) -> None:
    one, other = start(), start()
    kept(one, [1, 2, 3])
    asked = other.request("b", [1, 2, 3])
    assert other.found(asked, 1, 2, 3) == [HIT] * 3
    other.fetched(asked, [1, 2, 3], [4, 5, 6])
    assert [int(other.device[n, 7]) for n in (4, 5, 6)] == [1, 2, 3]
    client, name = value(store, 1)
    assert 0 < client.ttl(name) <= 60
    assert counts(one).stored_bytes == counts(other).fetched_bytes > 0


def test_what_is_there_is_not_written_again(start: Start) -> None:
    kept(start(), [1, 2])
    other = start()
    kept(other, [1, 2])
    assert counts(other).stored_bytes == 0


def test_routers_are_told(start: Start, store: RedisServer) -> None:
    engine = start()
    kept(engine, [1])
    told = [e for e in engine.manager.take_events() if e.locality is Locality.REMOTE]
    assert [(event.keys, event.removed) for event in told] == [([key(1)], False)]
    redis.Redis(port=store.port).flushall()
    engine.manager.reset_cache()
    assert engine.found(engine.request("b", [1]), 1) == [MISS]
    told = [e for e in engine.manager.take_events() if e.locality is Locality.REMOTE]
    assert [(event.keys, event.removed) for event in told] == [([key(1)], True)]


def test_only_what_the_store_holds_is_counted(start: Start) -> None:
    kept(start(), [1])
    other = start()
    asked = other.request("b", [1, 2, 3])
    assert other.found(asked, 1, 2, 3) == [HIT, MISS, MISS]
    other.plans(asked, [1, 2, 3])
    assert counts(other).won_tokens == 0  # it has arrived in host memory
    assert other.manager.prices.counts["host"].won_tokens == TOKENS


@pytest.mark.parametrize("damage", ["flipped", "short", "long", "swapped", "empty"])
def test_a_damaged_block_is_missed_counted_and_replaced(
    start: Start, store: RedisServer, damage: str
) -> None:
    kept(start(), [1, 2])
    client, name = value(store, 2)
    whole = client.get(name)
    bad = {
        "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        "short": whole[:-1],
        "long": whole + b"x",
        "swapped": client.get(value(store, 1)[1]),
        "empty": b"",
    }[damage]
    client.set(name, bad)
    engine = start()
    assert engine.found(engine.request("b", [1, 2]), 1, 2) == [HIT, MISS]
    assert counts(engine).errors == 1
    assert not client.exists(name)
    engine.keeps(engine.request("c", [1, 2]), [2])
    engine.settled()
    assert client.get(name) == whole


def test_a_block_that_goes_between_question_and_fetch_is_missed(
    start: Start, store: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(start(), [1])
    engine = start()
    monkeypatch.setattr(remote.RemoteTier, "held", lambda self, keys: [True] * len(keys))
    assert engine.found(engine.request("b", [1, 7]), 1, 7) == [HIT, MISS]
    assert counts(engine).errors == 1


def test_another_models_blocks_are_not_used(start: Start) -> None:
    kept(start(), [1])
    other = start()
    model = OffloadingModelConfig("another/model", "float32")
    object.__setattr__(other.spec.config, "model", model)
    assert other.found(other.request("b", [1]), 1) == [MISS]


def test_a_dead_store_costs_nothing_and_comes_back(
    start: Start, store: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    kept(engine, [1])
    monkeypatch.setattr(remote, "_REST_S", 600.0)
    store.stop()
    engine.manager.reset_cache()
    assert engine.found(engine.request("b", [1]), 1) == [MISS]
    kept(engine, [2])  # not written, and nobody minds
    assert counts(engine).skipped == 1
    store.start()
    monkeypatch.setattr(remote, "_REST_S", 0.0)
    tier = engine.manager._inner.secondary_tiers[0]
    monkeypatch.setattr(tier, "_rests_until_s", 0.0)
    kept(engine, [3])
    engine.manager.reset_cache()
    assert engine.found(engine.request("d", [3]), 3) == [HIT]


def test_a_full_store_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with redis_server("--maxmemory", "100kb", "--maxmemory-policy", "noeviction") as full:
        monkeypatch.setenv("XLLM_KV_REMOTE", full.url)
        engine = Engine("full", secondary_tiers=[TIER])
        kept(engine, [1])
        assert (counts(engine).errors, counts(engine).stored_bytes) == (1, 0)
        assert engine.found(engine.request("b", [1]), 1) == [HIT]
        engine.closes()


def test_a_silent_store_is_waited_for_no_longer_than_that_pays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("XLLM_KV_REMOTE", f"redis://127.0.0.1:{silent.getsockname()[1]}")
        engine = Engine("silent", secondary_tiers=[TIER])
        now = [0.0]
        monkeypatch.setattr(engine.manager, "_clock", lambda: now[0])
        asked = engine.request("a", [1], prefill_ms=1000.0)
        assert engine.manager.lookup(key(1), asked) not in (HIT, MISS)
        engine.manager.on_schedule_end(END)
        while not engine.manager._inner.secondary_tiers[0].busy:
            time.sleep(0.001)
        now[0] = 1.0  # computing takes 16 s, of which a twentieth is risked
        assert engine.manager.lookup(key(1), asked) is MISS
        assert counts(engine).late == 1
        # The next one does not wait at all.
        assert engine.manager.lookup(key(1), engine.request("b", [1])) is MISS
    engine.closes()  # now that nobody holds the question any more


def test_a_late_tier_is_looked_at_with_nobody_waiting_and_comes_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(start(), [1, 2])
    engine, now = start(), [0.0]
    monkeypatch.setattr(engine.manager, "_clock", lambda: now[0])
    engine.manager.prices.late("RemoteTier")
    now[0] += PROBE_S
    asked = engine.request("a", [1, 2])
    assert engine.manager.lookup(key(1), asked) is MISS
    engine.keeps(asked, [1, 2])  # computed in the step before which the store has not answered
    while counts(engine).fetched_bytes == 0:
        engine.settled()
    assert counts(engine).probes == 1
    engine.manager.reset_cache()
    assert engine.found(engine.request("b", [1, 2]), 2) == [HIT]


def test_the_address_is_not_in_what_vllm_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "redis://:hidden@kv.example"
    section = KvSection(host_gib=0.01, remote=url)
    args = SimpleNamespace(kv_transfer_config=None, kv_offloading_size=None)
    with pytest.raises(ConfigError, match="XLLM_KV_REMOTE"):
        prepare(args, section)  # it came in --additional-config
    monkeypatch.setenv("XLLM_KV_REMOTE", url)
    assert "hidden" not in repr(prepare(args, section)["kv_transfer_config"])


def test_writing_that_lags_behind_is_not_queued(
    start: Start, store: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    may_go_on = threading.Event()
    monkeypatch.setattr(remote.RemoteTier, "_put", lambda *args: may_go_on.wait(120))
    context = engine.request("a", list(range(1, 9)))
    for number in range(1, 9):
        engine.keeps(context, [number])
    may_go_on.set()
    engine.settled()
    assert counts(engine).skipped == 2  # three quarters of host memory's chunks were under way


def test_password_and_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    certificate, secret = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", secret, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    tls_port = str(free_port())
    options = (
        "--requirepass", "pass", "--tls-port", tls_port, "--tls-cert-file", str(certificate),
        "--tls-key-file", str(secret), "--tls-auth-clients", "no",
    )  # fmt: skip
    with redis_server(*options):
        address = f"localhost:{tls_port}?ssl_ca_certs={certificate}"
        for url, stored in ((f"rediss://:pass@{address}", True), (f"rediss://{address}", False)):
            monkeypatch.setenv("XLLM_KV_REMOTE", url)
            engine = Engine("tls", secondary_tiers=[TIER])
            kept(engine, [1 if stored else 2])
            assert (counts(engine).stored_bytes > 0) is stored
            engine.closes()

"""An engine can say at any time which blocks its cache holds, and says so to routers alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.config import KVEventsConfig, VllmConfig
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.lab import engine as lab
from tests.contract.engine import BLOCK, BOTH, Engine, build, request
from xllm_kv.index import KvIndex, Prompt
from xllm_kv.ledger import Ledger
from xllm_kv.snapshot import Snapshot
from xllm_plugins.compat import engine_status, kv_events
from xllm_scheduler import plugin
from xllm_scheduler.engine import load
from xllm_scheduler.service import instance_api
from xllm_scheduler.service.member import ServiceSection

pytestmark = pytest.mark.vllm
EVENTS = KVEventsConfig(enable_kv_cache_events=True, publisher="null")


@pytest.fixture
def follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers are made as in an engine in which the feature ``service`` is active."""
    monkeypatch.setattr(Scheduler, "__init__", Scheduler.__init__)
    kv_events.install(plugin.followed)
    monkeypatch.setattr(load, "active_features", lambda config: [plugin.SERVICE])
    with_events = functools.partial(VllmConfig, kv_events_config=EVENTS)
    monkeypatch.setattr(lab, "VllmConfig", with_events)


@BOTH
def test_a_snapshot_names_what_the_cache_holds(base: type, follows: None) -> None:
    engine = Engine(build(base, blocks=9))
    first, third = list(range(16)), [5] * 16
    for name, tokens in (("a", first), ("b", [9] * 20), ("c", third)):
        engine.add(request(name, tokens, max_tokens=1))
        engine.run()
    core = SimpleNamespace(scheduler=engine.scheduler)
    assert plugin.tell(core, {"snapshot_of": 1}) == {}
    snapshot = Snapshot.read(plugin.tell(core, {"snapshot_of": 0})["snapshot"])
    pool = engine.scheduler.kv_cache_manager.block_pool
    held = {block.block_hash for block in pool.blocks if block.block_hash is not None}
    index = KvIndex()
    index.add("here", snapshot.model, snapshot.block_tokens)
    for part in snapshot.parts(2):
        index.load("here", part)
    (of_device,) = snapshot.held
    assert {maybe_convert_block_hash(get_block_hash(one)) for one in held} == set(of_device.names)
    assert snapshot.block_tokens == BLOCK
    assert index.match(Prompt(snapshot.model, third))["here"].tokens == (16, 0, 0, 0)
    kept = index.match(Prompt(snapshot.model, first))
    assert kept.get("here", SimpleNamespace(total=0)).total < 16  # some of it was given up


def test_without_the_service_or_events_the_publisher_is_vllms(
    follows: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(build(Scheduler).kv_event_publisher, Ledger)
    monkeypatch.setattr(lab, "VllmConfig", VllmConfig)
    assert not isinstance(build(Scheduler).kv_event_publisher, Ledger)
    monkeypatch.setattr(lab, "VllmConfig", functools.partial(VllmConfig, kv_events_config=EVENTS))
    monkeypatch.setattr(load, "active_features", lambda config: [])
    scheduler = build(Scheduler)
    assert not isinstance(scheduler.kv_event_publisher, Ledger)
    assert load.snapshot_of(scheduler, 0) == {}


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """An instance's API server, before two engines of which the second one has a ledger."""

    async def tell(client: Any, feature: str, command: dict[str, Any]) -> list[dict[str, Any]]:
        assert feature == "service"
        return [{}, {"snapshot": b"all"} if command["snapshot_of"] == 1 else {}]

    monkeypatch.setattr(engine_status, "tell_engines", tell)
    monkeypatch.setattr(instance_api, "active_features", lambda config: [plugin.SERVICE])
    monkeypatch.setattr(instance_api, "section_of", lambda *_: ServiceSection(token="secret"))
    app = FastAPI()
    app.state.engine_client = SimpleNamespace(vllm_config=None)
    instance_api.add_endpoints(app)
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize(
    ("token", "rank", "status", "content"),
    [
        ("secret", 1, 200, b"all"),
        ("secret", 0, 404, b"publishes KV events"),
        ("wrong", 1, 401, b"token"),
        ("", 1, 401, b"token"),
    ],
)
def test_an_instance_tells_routers_and_nobody_else(
    token: str, rank: int, status: int, content: bytes, instance: TestClient
) -> None:
    headers = {"authorization": f"Bearer {token}"}
    answer = instance.get("/xllm/v1/kv", params={"rank": rank}, headers=headers)
    assert answer.status_code == status
    assert content in answer.content

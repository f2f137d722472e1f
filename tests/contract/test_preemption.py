"""Offline requests are preempted for an online one that finds no room, and only if that helps."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler

from tests.contract.engine import (
    BOTH,
    OFFLINE,
    Clock,
    Engine,
    build,
    check_kv_books,
    request,
    warm_up,
)
from tests.contract.worker import completion
from xllm_scheduler.engine.elastic import ElasticPolicy
from xllm_scheduler.engine.scheduler import elastic_class

pytestmark = pytest.mark.vllm


def _waiting_on_offline_work(
    base: type, clock: Clock, lacking: str, *, preempts: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], float]:
    """Two long offline requests run, and leave an online one without a slot or without KV.

    Returns:
        Whom the plans preempted, and how long the online request waited for its first token.
    """
    if not preempts:
        monkeypatch.setattr(ElasticPolicy, "is_urgent", lambda *args: False)
    clock.now_s = 1000.0
    options: dict[str, Any] = (
        {"seqs": 2, "blocks": 128} if lacking == "slot" else {"seqs": 8, "blocks": 28}
    )
    built = build(elastic_class(base), settings={"ttft_ms": 300.0}, budget=32, **options)
    engine = Engine(built, clock)
    warm_up(built, engine.token_ms)
    for name, shared in (("large", 1), ("small", 2)):
        prompt = [shared] * (24 if name == "small" else 40)
        engine.add(request(name, prompt, max_tokens=50, xargs=OFFLINE))
    while not all(engine.streams[name] for name in ("large", "small")):
        engine.step()
    arrival_s, xargs = clock.now_s, {"xllm_ttft_ms": 200}
    engine.add(request("online", [3] * 48, max_tokens=6, xargs=xargs, arrival_s=arrival_s))
    engine.run()
    check_kv_books(built)
    for name, prompt, tokens in (
        ("large", [1] * 40, 50),
        ("small", [2] * 24, 50),
        ("online", [3] * 48, 6),
    ):
        assert engine.streams[name] == completion(prompt, tokens)
    return _preempted_by_plan(engine), engine.times_s["online"][0] - arrival_s


def _preempted_by_plan(engine: Engine) -> list[str]:
    return [name for step in engine.ended for name in step.plan.preempt]


@BOTH
@pytest.mark.parametrize("lacking", ["slot", "KV"])
def test_offline_work_is_preempted_for_an_online_request_that_finds_no_room(
    base: type, lacking: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _can_preempt_in_flight(base):
        pytest.skip("vLLM before 0.26 loses tokens in flight of a preempted request")
    run = partial(_waiting_on_offline_work, base, clock, lacking, monkeypatch=monkeypatch)
    preempted, waited_s = run(preempts=True)
    assert preempted == ["small"], "the one with the least to compute again"
    assert waited_s < 0.2
    preempted, waited_without_s = run(preempts=False)
    assert preempted == []
    assert waited_s < waited_without_s


def _can_preempt_in_flight(base: type) -> bool:
    return base is Scheduler or hasattr(base, "_request_blocks_can_be_freed")


@BOTH
def test_nobody_is_preempted_where_it_would_not_make_enough_room(base: type, clock: Clock) -> None:
    engine = Engine(
        build(elastic_class(base), settings={"ttft_ms": 50.0}, blocks=33, budget=64), clock
    )
    warm_up(engine.scheduler, engine.token_ms)
    engine.add(request("holds", [1] * 76, max_tokens=16))
    engine.add(request("offline", [2] * 9, max_tokens=12, xargs=OFFLINE))
    while not engine.streams["holds"] or not engine.streams["offline"]:
        engine.step()
    engine.add(request("waits", [3] * 60, max_tokens=2, arrival_s=clock.now_s))
    engine.run()
    assert _preempted_by_plan(engine) == []
    assert engine.streams["offline"] == completion([2] * 9, 12)
    assert engine.streams["waits"] == completion([3] * 60, 2)


@BOTH
def test_a_paused_scheduler_preempts_nobody(base: type, clock: Clock) -> None:
    engine = Engine(build(elastic_class(base), settings={"ttft_ms": 50.0}, seqs=1), clock)
    warm_up(engine.scheduler, engine.token_ms)
    engine.add(request("offline", [1] * 20, max_tokens=40, xargs=OFFLINE))
    for _ in range(4):
        engine.step()
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.add(request("online", [2] * 20, max_tokens=4, arrival_s=clock.now_s))
    for _ in range(30):
        engine.step()
    assert _preempted_by_plan(engine) == []
    assert len(engine.streams["offline"]) > 20
    assert not engine.streams["online"]
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    assert engine.streams["offline"] == completion([1] * 20, 40)
    assert engine.streams["online"] == completion([2] * 20, 4)


@BOTH
def test_a_request_that_is_aborted_while_preempted_leaves_nothing_behind(
    base: type, clock: Clock
) -> None:
    engine = Engine(build(elastic_class(base), settings={"ttft_ms": 50.0}, seqs=1), clock)
    warm_up(engine.scheduler, engine.token_ms)
    engine.add(request("offline", [1] * 20, max_tokens=40, xargs=OFFLINE))
    while not engine.streams["offline"]:
        engine.step()
    one = engine.scheduler.requests["offline"]
    engine.scheduler.running.remove(one)
    engine.scheduler._preempt_request(one, clock.now_s)
    before = len(engine.streams["offline"])
    engine.abort("offline")
    engine.add(request("online", [2] * 20, arrival_s=clock.now_s))
    engine.run()
    check_kv_books(engine.scheduler)
    assert not engine.scheduler._first_token_pending
    assert engine.scheduler.requests == {}
    assert engine.streams["offline"] == completion([1] * 20, 40)[: len(engine.streams["offline"])]
    assert len(engine.streams["offline"]) <= before + 1
    assert engine.streams["online"] == completion([2] * 20, 4)

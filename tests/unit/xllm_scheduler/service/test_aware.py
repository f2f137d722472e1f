"""Routing by prediction, in ms of each instance's own step times."""

from __future__ import annotations

import math
from typing import Any

import pytest

from xllm_plugins.latency import StepTime
from xllm_scheduler.service.aware import KvAware, SloAware
from xllm_scheduler.service.forecast import decode_tpot_ms, prefill, transfer_ms, whole
from xllm_scheduler.service.routing import InstanceView, RequestView, Role
from xllm_scheduler.service.staged import least_loaded

# 10 ms a step, 0.1 ms a prompt token, 0.5 ms a decode, 1 us a token of context.
TIMES = StepTime(base=10.0, token=0.1, decode=0.5, context=0.001, ready=True)
IDLE = InstanceView("i", Role.MIXED, step_time=TIMES, step_tokens=1000)
ASK = RequestView("r", True, 1000, 500.0, 50.0, output_tokens=100.0)


def view(name: str, role: Role = Role.MIXED, **more: Any) -> InstanceView:
    return IDLE._replace(instance_id=name, role=role, **more)


def test_a_prompt_at_an_idle_instance_takes_its_step() -> None:
    assert prefill(ASK, IDLE) == (100.0 + 10.0, 100.0)


def test_cached_tokens_cost_nothing_but_what_reads_them() -> None:
    cached = ASK._replace(cached={"i": 600.0})
    assert prefill(cached, IDLE) == pytest.approx((50.0, 40.0))
    quadratic = IDLE._replace(step_time=StepTime(base=10.0, token=0.1, square=1e-5, cross=2e-5))
    assert prefill(cached, quadratic)[1] == pytest.approx(40.0 + 400 * 600 * 2e-5 + 400**2 * 1e-5)


def test_what_waits_comes_first_and_takes_more_steps() -> None:
    ttft_ms, work_ms = prefill(ASK, IDLE._replace(waiting=2, waiting_tokens=1500, waiting_ms=150.0))
    # 250 ms of prefill in steps of 1,000 tokens are three, and half of the one that is under way.
    assert (ttft_ms, work_ms) == pytest.approx((250.0 + 3.5 * 10.0, 100.0))


def test_an_engine_that_keeps_a_pace_gives_prefills_what_decodes_leave() -> None:
    busy = IDLE._replace(running=40, context_tokens=0)
    assert prefill(ASK, busy)[0] == pytest.approx(100.0 + 1.5 * 30.0)
    paced = busy._replace(pace_ms=50.0)  # 20 ms of prefill a step
    assert prefill(ASK, paced)[0] == pytest.approx(100.0 + 5.5 * 30.0)


def test_time_per_token_grows_with_those_that_generate_and_with_prefills() -> None:
    busy = IDLE._replace(running=10, context_tokens=10_000)
    alone = decode_tpot_ms(ASK, busy)
    assert alone == pytest.approx(10.0 + 0.5 * 11 + 0.001 * (10_000 + 1000 + 50))
    assert decode_tpot_ms(ASK, busy._replace(prefill_share=0.5)) == pytest.approx(2 * alone)
    paced = busy._replace(prefill_share=0.5, pace_ms=1.5 * alone)  # as prefills may slow it there
    assert decode_tpot_ms(ASK, paced) == pytest.approx(1.5 * alone)
    assert decode_tpot_ms(ASK, paced._replace(pace_ms=0.5 * alone)) == pytest.approx(alone)
    assert whole(ASK, busy._replace(waiting=2, waiting_tokens=500)).tpot_ms == pytest.approx(
        10.0 + 0.5 * 13 + 0.001 * (11_550)
    )


def test_a_transfer_takes_what_the_receiver_lacks() -> None:
    there = view("d", transfer_ms=2.0, transfer_token_ms=0.01)
    assert transfer_ms(ASK, there) == pytest.approx(12.0)
    assert transfer_ms(ASK._replace(cached={"d": 1000.0}), there) == pytest.approx(2.0)


def test_kv_draws_a_request_until_the_queue_there_costs_more() -> None:
    policy = KvAware()
    cached = ASK._replace(cached={"a": 900.0})
    idle = view("b")

    def goes_to(waiting_ms: float) -> str:
        route = policy.route(cached, [view("a", waiting=1, waiting_ms=waiting_ms), idle], 0.0)
        assert route is not None
        assert dict(route.costs).keys() == {"a", "b"}
        return route.prefill

    assert goes_to(10.0) == "a"
    assert goes_to(500.0) == "b"


def test_generating_apart_pays_where_prefills_would_delay_those_that_generate() -> None:
    policy = SloAware()
    prefiller = view("p", Role.PREFILL)
    generator = view("d", Role.DECODE, running=30, prefill_share=0.3, transfer_token_ms=0.001)
    route = policy.route(ASK, [prefiller, generator], 0.0)
    assert route is not None
    assert (route.prefill, route.decode) == ("p", "d")
    assert {name for name, _ in route.costs} == {"d", "p>d"}


def test_kv_is_moved_only_between_those_that_can() -> None:
    generator = view("d", Role.DECODE, running=30, prefill_share=0.3)
    for prefiller, goes_to in (
        (view("p", Role.PREFILL, transfers=False), generator),
        (view("p", Role.PREFILL), generator._replace(transfers=False)),
    ):
        for policy in (SloAware(), least_loaded()):
            route = policy.route(ASK, [prefiller, goes_to], 0.0)
            assert route is not None
            assert route.prefill == route.decode


def test_a_prompt_that_is_there_already_stays_with_those_that_generate() -> None:
    prefiller = view("p", Role.PREFILL, waiting=3, waiting_ms=300.0)
    generator = view("d", Role.DECODE, running=5, transfer_token_ms=0.1)
    known = ASK._replace(cached={"d": 950.0})
    route = SloAware().route(known, [prefiller, generator], 0.0)
    assert route is not None
    assert (route.prefill, route.decode) == ("d", "d")


def test_the_slo_decides_between_soon_and_in_time() -> None:
    # a: the first token soon, the others late; b: the first later, but all in time.
    a = view("a", running=120, context_tokens=0)
    b = view("b", waiting=1, waiting_ms=200.0)
    relaxed = ASK._replace(tpot_ms=1000.0, output_tokens=2.0)
    chosen = {
        ask.tpot_ms: route.prefill
        for ask in (ASK._replace(output_tokens=2.0), relaxed)
        if (route := SloAware().route(ask, [a, b], 0.0))
    }
    assert chosen[50.0] == "b"


def test_offline_requests_have_no_slo_to_miss() -> None:
    offline = ASK._replace(online=False, ttft_ms=math.inf, tpot_ms=math.inf)
    route = SloAware().route(offline, [view("a", waiting=50, waiting_ms=9e4), view("b")], 0.0)
    assert route is not None
    assert route.prefill == "b"


def test_a_full_kv_cache_is_avoided() -> None:
    route = KvAware().route(ASK, [view("a", kv_used=1.0), view("b", running=20)], 0.0)
    assert route is not None
    assert route.prefill == "b"

"""Roles follow the load: by pressure, with patience, and not too often."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from xllm_plugins.latency import StepTime
from xllm_scheduler.service.config import RouterSection, roles_of
from xllm_scheduler.service.roles import Demand, DynamicRoles, demand_of
from xllm_scheduler.service.routing import InstanceView, Role

TIMES = StepTime(base=7.0, token=0.03, decode=0.2, context=1e-5, ready=True)
# Long prompts and short answers: what generates beside them is held up.
EIGHT = [
    InstanceView(f"i{n}", Role.MIXED, step_time=TIMES, prompt_ms=500.0, answer_tokens=20.0)
    for n in range(8)
]


def split(prefills: int, *, prefill_share: float, running: int) -> list[InstanceView]:
    return [
        view._replace(
            role=Role.PREFILL if n < prefills else Role.DECODE,
            prefill_share=prefill_share if n < prefills else 0.0,
            running=0 if n < prefills else running,
        )
        for n, view in enumerate(EIGHT)
    ]


def policy(**more: float) -> DynamicRoles:
    return DynamicRoles(2000.0, 50.0, **{"patience": 1, "cool_down_s": 0.0, **more})  # type: ignore[arg-type]


def prefills(there: list[InstanceView], changes: Mapping[str, Role]) -> int:
    return sum(changes.get(v.instance_id, v.role) is Role.PREFILL for v in there)


def scaled(demand: Demand, times: float) -> Demand:
    return demand._replace(prefills=demand.prefills * times, running=demand.running * times)


def test_the_pressure_is_that_of_the_busiest_pool() -> None:
    one = policy()
    demand = Demand(prefills=2.0, running=600.0, context_tokens=0.0)
    assert one.pressure(EIGHT, demand, 4) == pytest.approx(0.2 * 150 / (50.0 - 7.0))
    assert one.pressure(EIGHT, demand, 1) == 2.0


def test_all_mixed_are_under_a_pressure_of_one_where_the_slo_just_holds() -> None:
    one = policy()
    demand = Demand(2.0, 600.0, 0.0, prompt_ms=125.0, answer_tokens=20.0)
    paced = [view._replace(pace_ms=50.0) for view in EIGHT]
    most = scaled(demand, 1.0 / one.pressure(paced, demand, 0))
    assert most.prefills / 8 + (7.0 + 0.2 * most.running / 8) / 50.0 == pytest.approx(1.0)
    # Without a pace prompts of 125 ms interrupt an answer of 20 tokens and one second.
    most = scaled(demand, 1.0 / one.pressure(EIGHT, demand, 0))
    prompts = most.prefills / 8 * 1000.0 / 125.0
    stalls_ms = 125.0 * (prompts + 1.3 * prompts**0.5) / 20.0
    assert 7.0 + 0.2 * most.running / 8 + stalls_ms == pytest.approx(50.0)


def test_where_there_is_little_to_do_nothing_changes() -> None:
    assert policy().roles(split(1, prefill_share=0.2, running=1), 0.0) == {}
    assert policy().roles(split(1, prefill_share=0.0, running=0), 0.0) == {}


def test_prompts_that_wait_are_demand() -> None:
    waiting = [view._replace(waiting_ms=1000.0) for view in EIGHT]
    assert demand_of(waiting).prefills == 8 * 1.0 / 2.0


def test_more_prompts_make_more_prefill_instances_and_longer_answers_fewer() -> None:
    busy = split(2, prefill_share=0.95, running=20)
    more = prefills(busy, policy().roles(busy, 0.0))
    assert more > 2
    answers = split(5, prefill_share=0.1, running=180)
    assert 0 < prefills(answers, policy().roles(answers, 0.0)) < 5


def test_those_that_generate_least_begin_to_prefill() -> None:
    busy = split(1, prefill_share=1.0, running=30)
    busy[5] = busy[5]._replace(running=1)
    changes = policy().roles(busy, 0.0)
    assert changes["i5"] is Role.PREFILL
    assert "i0" not in changes


def test_a_small_gain_is_no_reason() -> None:
    calm = split(4, prefill_share=0.4, running=60)
    assert policy(margin=0.9).roles(calm, 0.0) == {}


def test_it_takes_several_looks_and_a_pause() -> None:
    busy = split(2, prefill_share=0.95, running=20)
    one = policy(patience=3, cool_down_s=60.0, overload=99.0)
    assert [bool(one.roles(busy, float(n))) for n in range(3)] == [False, False, True]
    assert not any(one.roles(busy, 3.0 + n) for n in range(50))
    assert one.roles(busy, 70.0)


def test_a_look_that_disagrees_begins_the_count_anew() -> None:
    busy, calm = split(2, prefill_share=0.95, running=20), split(3, prefill_share=0.3, running=60)
    one = policy(patience=2, overload=99.0)
    looks = [bool(one.roles(v, 0.0)) for v in (busy, calm, busy, busy)]
    assert looks == [False, False, False, True]


def test_overload_waits_for_nothing() -> None:
    over = split(1, prefill_share=1.0, running=20)
    over[0] = over[0]._replace(waiting_ms=20_000.0)
    assert policy(patience=5, cool_down_s=60.0).roles(over, 0.0)


def test_who_does_not_accept_is_not_counted_and_one_alone_does_all() -> None:
    alone = [EIGHT[0]._replace(role=Role.PREFILL), EIGHT[1]._replace(accepts=False)]
    assert policy().roles(alone, 0.0) == {"i0": Role.MIXED}


def test_who_moves_no_kv_stays_mixed() -> None:
    busy = [view._replace(role=Role.MIXED) for view in split(1, prefill_share=1.0, running=30)]
    busy[2] = busy[2]._replace(transfers=False, running=0)
    changes = policy().roles(busy, 0.0)
    assert changes
    assert "i2" not in changes


def test_settings_choose_it() -> None:
    assert roles_of(RouterSection()) is None
    assert isinstance(roles_of(RouterSection(roles="dynamic")), DynamicRoles)


def test_instances_of_different_models_are_divided_apart() -> None:
    busy = split(0, prefill_share=0.0, running=0)
    busy = [v._replace(prefill_share=0.6, running=40, model="a") for v in busy]
    idle = [v._replace(instance_id=f"b{n}", model="b") for n, v in enumerate(EIGHT)]
    changes = policy().roles([*busy, *idle], 0.0)
    assert changes
    assert all(name.startswith("i") for name in changes)
    assert policy().roles(busy, 0.0) == changes

"""What the elastic policy plans for online requests, on worked examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.xllm_scheduler.plans import (
    COLD,
    MARGIN_MS,
    SECTION,
    TIME,
    new_prompt,
    offline,
    online,
    plan,
    prompt,
    step_ms,
    target_ms,
)
from xllm_plugins.latency import StepTime
from xllm_scheduler.engine.elastic import ElasticPolicy
from xllm_scheduler.engine.policy import (
    Late,
    StepPlan,
    Victim,
)

# Online work alone


@pytest.mark.parametrize("step_time", [TIME, COLD])
@pytest.mark.parametrize("due_ms", [-500.0, 20.0, 1000.0])
def test_online_decodes_alone_are_left_to_vllm(step_time: StepTime, due_ms: float) -> None:
    found = plan(online=online(due_ms), step_time=step_time)
    plain = StepPlan(4096, admit_offline=False)
    assert found._replace(target_ms=math.inf, planned_ms=0.0, late=None) == plain
    assert found.late is (None if found.planned_ms <= found.target_ms else Late.ONLINE)


def test_online_prompts_that_fit_are_left_to_vllm() -> None:
    found = plan(online=online(1000), waiting=[new_prompt("on", 100, due_ms=1500)])
    plain = StepPlan(4096, admit_offline=False)
    assert found == plain._replace(target_ms=found.target_ms, planned_ms=10 + 1 + 50)
    assert found.target_ms == pytest.approx(950.0)


def test_online_prompts_go_by_deadline() -> None:
    calm, urgent = new_prompt("calm", 80, due_ms=900), new_prompt("urgent", 80, due_ms=500)
    assert plan(waiting=[calm, urgent], max_tokens=100).chunk_tokens == {"calm": 20}


def test_a_prompt_that_is_late_already_goes_after_those_that_are_not() -> None:
    late, timely = new_prompt("late", 80, due_ms=-1), new_prompt("timely", 80, due_ms=900)
    assert plan(waiting=[late, timely], max_tokens=100).chunk_tokens == {"late": 20}


def test_a_prompt_that_has_nothing_to_compute_now_stops_no_offline_work() -> None:
    found = plan(prefills=[prompt("on", 0, due_ms=1000), prompt("off", 500)], offline=offline(1))
    assert (found.held, found.chunk_tokens) == (frozenset(), {})


# How long a step may take


@pytest.mark.parametrize(("due_ms", "left_ms"), [([140], 90), ([1000, 140], 90), ([40], -10)])
def test_a_step_ends_a_margin_before_the_next_online_token_is_due(
    due_ms: Sequence[float], left_ms: float
) -> None:
    assert target_ms(online=online(*due_ms)) == pytest.approx(left_ms)


@pytest.mark.parametrize(("produced", "margin_ms"), [(0, 0), (1, 10), (3, 30), (5, 50), (99, 50)])
def test_the_margin_grows_by_a_tenth_of_the_tpot_with_each_token(
    produced: int, margin_ms: float
) -> None:
    found = target_ms(online=online(140, produced=produced))
    assert found == pytest.approx(140 - margin_ms)


def test_the_margin_is_counted_in_steps_of_the_strictest_tpot() -> None:
    mixed = online(140, 140)._replace(tpot_ms=[100.0, 40.0])
    assert target_ms(online=mixed) == pytest.approx(140 - 20)
    assert target_ms(online=online(70, tpot_ms=40.0)) == pytest.approx(70 - 20)


@pytest.mark.parametrize(
    ("error", "margin_ms"), [(0.0, 50), (0.05, 50), (0.1, 60), (0.3, 100), (0.8, 200), (1.0, 200)]
)
def test_the_margin_is_wider_while_the_model_errs(error: float, margin_ms: float) -> None:
    found = target_ms(online=online(230), step_time=replace(TIME, error=error))
    assert found == pytest.approx(230 - margin_ms)


@pytest.mark.parametrize(("error", "margin_ms"), [(0.0, 100), (0.3, 100), (1.0, 200)])
def test_with_a_step_in_flight_the_margin_is_at_least_a_whole_step(
    error: float, margin_ms: float
) -> None:
    step_time = replace(TIME, error=error)
    found = target_ms(online=online(230), step_time=step_time, in_flight=True)
    assert found == pytest.approx(230 - margin_ms)


@pytest.mark.parametrize(("due_ms", "takes_ms"), [(190.1, 140), (250.1, 200), (9000, 200)])
def test_time_that_was_not_used_carries_over_but_two_tpots_are_the_most(
    due_ms: float, takes_ms: float
) -> None:
    assert step_ms(online=online(due_ms)) == pytest.approx(takes_ms)


# One decode takes 11 ms of 100, so prompts can be computed beside it for 890 ms of half a TTFT.
@pytest.mark.parametrize(
    ("prompt_tokens", "rate", "reserve_ms"),
    [(600, 0.0, MARGIN_MS), (668, 0.0, 112), (668, 0.5, 112), (167, 2.0, 112), (167, 1.0, 50)],
)
def test_time_for_coming_online_prompts_is_kept_in_reserve(
    prompt_tokens: float, rate: float, reserve_ms: float
) -> None:
    # Three prompts at least, or three times those that come in one TTFT, each 0.5 ms a token.
    found = target_ms(online=online(230), online_prompt_tokens=prompt_tokens, online_rate=rate)
    assert found == pytest.approx(230 - reserve_ms)


@pytest.mark.parametrize(("produced", "left_ms"), [(0, 230), (1, 130), (2, 118)])
def test_a_reserve_grows_by_a_tpot_with_each_token(produced: int, left_ms: float) -> None:
    decodes = online(230, produced=produced)
    assert target_ms(online=decodes, online_prompt_tokens=668) == pytest.approx(left_ms)


# Online prompts


def test_online_prompts_come_before_offline_ones_whatever_their_order() -> None:
    # 0.25 of the TTFT: 10 + 400 tokens online + 580 tokens offline.
    found = plan(prefills=[prompt("off", 3000), prompt("on", 400, due_ms=1000)])
    assert (found.chunk_tokens, found.planned_ms) == ({"off": 580}, 500.0)


def test_offline_work_never_delays_a_first_token_beyond_its_deadline() -> None:
    # 400 ms less 5 %: 10 + 400 tokens online + 340 tokens offline.
    found = plan(prefills=[prompt("on", 400, due_ms=400.1), prompt("off", 3000)])
    assert found.chunk_tokens == {"off": 340}
    assert found.target_ms == pytest.approx(380.095)


def test_an_online_prompt_of_several_steps_shares_its_time_among_them() -> None:
    # 400 of 800 tokens in this step, so it may take half of the 760 ms.
    prefills = [prompt("on", 800, due_ms=800), prompt("off", 3000)]
    found = plan(prefills=prefills, max_tokens=400)
    assert found.target_ms == pytest.approx(380.0)
    assert (found.chunk_tokens, found.max_tokens) == ({"off": 0}, 400)


def test_an_online_prompt_keeps_to_the_pace_of_the_decodes_while_it_has_time() -> None:
    # 50 ms: 10 + 1 online + 78 tokens.
    found = plan(online=online(100), prefills=[prompt("on", 600, due_ms=5000)])
    assert (found.chunk_tokens, found.late) == ({"on": 78}, None)
    assert found.planned_ms == pytest.approx(50.0)


def test_an_online_prompt_hurries_when_its_first_token_would_be_late() -> None:
    # 3.75 steps of a TPOT in half of the 950 ms less one: 160 tokens in each.
    found = plan(online=online(100), prefills=[prompt("on", 600, due_ms=1000)])
    assert (found.chunk_tokens, found.late) == ({"on": 160}, Late.FIRST_TOKEN)


def test_a_prompt_in_a_hurry_may_use_up_the_margin_but_not_make_decodes_late() -> None:
    # Half of the 600 tokens would be needed; 178 fit into 100 ms.
    found = plan(online=online(100), prefills=[prompt("on", 600, due_ms=600)])
    assert found.chunk_tokens == {"on": 178}
    assert found.planned_ms == pytest.approx(100.0)


@pytest.mark.parametrize(("rivals", "tokens"), [(0, 325), (4, 178)])
def test_one_prompt_in_a_hurry_but_not_many_may_make_decodes_late_that_will_catch_up(
    rivals: int, tokens: int
) -> None:
    # Decodes gain 89 ms a token, which over half of 100 tokens are 4450 ms.
    # 1.85 steps of a TPOT are half of the 570 ms less one: 325 tokens in each.
    prompts = [prompt("on", 600, due_ms=600)]
    prompts += [prompt(f"calm{i}", 600, due_ms=9000) for i in range(rivals)]
    found = plan(online=online(100), prefills=prompts, online_output_tokens=100)
    assert found.chunk_tokens["on"] == tokens


def test_a_prompt_that_is_late_already_makes_nobody_else_late() -> None:
    found = plan(online=online(100), prefills=[prompt("on", 600, due_ms=-1)])
    assert (found.chunk_tokens, found.late) == ({"on": 78}, None)


def test_the_first_online_prompt_advances_however_late_the_decodes() -> None:
    prefills = [prompt("calm", 500, due_ms=-1), prompt("urgent", 500, due_ms=-2)]
    found = plan(online=online(-10), prefills=prefills)
    assert found.chunk_tokens == {"urgent": 16, "calm": 0}


def test_an_online_prompt_that_cannot_be_split_is_whole_or_not() -> None:
    prefills = [prompt(name, 600, due_ms=9000, splittable=False) for name in "ab"]
    found = plan(online=online(100), prefills=prefills)
    assert (found.chunk_tokens, found.max_tokens) == ({"b": 0}, 1 + 600)


# Preemption


NEEDS_SIX = new_prompt("on", 40, due_ms=900, blocks=10)


def preempted(*victims: tuple[str, int, int], **view: Any) -> list[str]:
    """Who loses its KV for a request that lacks six blocks; victims with tokens and blocks."""
    values = {"waiting": [NEEDS_SIX], "free_blocks": 4, "free_slots": 1, **view}
    found = plan(victims=[Victim(*v) for v in victims], offline=offline(1, 1), **values)
    return list(found.preempt)


def test_the_requests_with_the_least_to_recompute_are_preempted() -> None:
    assert preempted(("big", 300, 9), ("small", 100, 3), ("tiny", 50, 3)) == ["tiny", "small"]


def test_nobody_is_preempted_where_it_would_not_suffice() -> None:
    assert preempted(("a", 100, 3), ("b", 50, 2)) == []


def test_whom_a_larger_victim_makes_unnecessary_is_not_preempted() -> None:
    assert preempted(("tiny", 50, 2), ("small", 100, 3), ("big", 300, 6)) == ["big"]


def test_for_a_slot_one_request_is_preempted() -> None:
    victims = [("a", 100, 3), ("b", 50, 2)]
    assert preempted(*victims, free_slots=0, free_blocks=99) == ["b"]


def test_without_a_waiting_online_request_nobody_is_preempted() -> None:
    assert preempted(("a", 100, 99), waiting=[new_prompt("off", 20, blocks=10)]) == []


def test_who_is_preempted_takes_no_part_and_nobody_is_admitted_in_its_place() -> None:
    found = plan(
        waiting=[NEEDS_SIX, new_prompt("new", 20)],
        offline=offline(1, 1),
        prefills=[prompt("half", 300)],
        victims=[Victim("half", 50, 3), Victim("off0", 60, 3)],
        free_blocks=4,
    )
    assert list(found.preempt) == ["half", "off0"]
    assert (found.held, found.chunk_tokens) == (frozenset(), {})
    assert (found.admit_offline, found.max_tokens) == (False, 40 + 1)


@pytest.mark.parametrize(("due_ms", "urgent"), [(1101, False), (1099, True), (-1, True)])
def test_a_request_is_urgent_once_half_its_ttft_and_two_prefills_are_left(
    due_ms: float, urgent: bool
) -> None:
    assert ElasticPolicy(SECTION).is_urgent(due_ms, 100, TIME) is urgent  # 50 ms

"""The elastic policy on worked examples, with times that a reader can add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from xllm_plugins.latency import StepShape, StepTime
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine.elastic import ElasticPolicy
from xllm_scheduler.engine.policy import (
    Late,
    OfflineDecodes,
    OnlineDecodes,
    PrefillView,
    StepPlan,
    StepView,
    Victim,
)

# A step takes 10 ms, and 0.5 ms for each prefill token, and 1 ms for each decode.
TIME = StepTime(base=10.0, token=0.5, decode=1.0, error=0.0, ready=True, most_prefill_tokens=4096)
COLD = StepTime()
# The margin is 50 ms, half a TPOT; a step without online work lasts at most 500 ms.
SECTION = SchedulerSection(
    ttft_ms=2000.0,
    tpot_ms=100.0,
    online_share=0.9,
    margin_steps=0.5,
    idle_step_share=0.25,
    offline_floor=0.02,
    offline_ageing_s=30.0,
)
MARGIN_MS = 50.0
NOW_S = 50.0


def online(*due_ms: float, produced: int = 1000, tpot_ms: float = 100.0) -> OnlineDecodes:
    """Online requests that generate; so long already that their margin has built up."""
    count = len(due_ms)
    return OnlineDecodes(
        due_s=[NOW_S + due / 1e3 for due in due_ms],
        produced=[produced] * count,
        tpot_ms=[tpot_ms] * count,
        shape=StepShape(decodes=count),
        tokens=count,
    )


def offline(*new_tokens: int) -> OfflineDecodes:
    """Offline requests that generate, ``off0``, ``off1`` and so on."""
    count = len(new_tokens)
    return OfflineDecodes([f"off{i}" for i in range(count)], [0] * count, new_tokens)


def prompt(name: str, tokens: int, due_ms: float = math.inf, **changes: Any) -> PrefillView:
    """A running request in prefill. A finite ``due_ms`` makes it online."""
    return PrefillView(
        name,
        online=math.isfinite(due_ms),
        running=True,
        due_s=NOW_S + due_ms / 1e3,
        new_tokens=tokens,
    )._replace(**changes)


def new_prompt(name: str, tokens: int, due_ms: float = math.inf, **changes: Any) -> PrefillView:
    """A waiting request."""
    return prompt(name, tokens, due_ms, **{"running": False, **changes})


def plan(section: SchedulerSection = SECTION, **view: Any) -> StepPlan:
    values = {"start_s": NOW_S, "max_tokens": 4096, "step_time": TIME, **view}
    return ElasticPolicy(section).plan(StepView(**values))


def target_ms(**view: Any) -> float:
    """How long a step may take into which an endless offline prompt would like to go."""
    return plan(prefills=[prompt("off", 4000)], **view).target_ms


def step_ms(**view: Any) -> float:
    """How long such a step takes."""
    return plan(prefills=[prompt("off", 4000)], **view).planned_ms


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


# Offline decodes beside online ones


def test_a_step_of_decodes_that_all_fit_is_left_to_vllm() -> None:
    found = plan(online=online(140), offline=offline(1, 1))
    plain = StepPlan(4096, admit_offline=False)
    assert found == plain._replace(target_ms=found.target_ms, planned_ms=13.0)
    assert found.target_ms == pytest.approx(90.0)


def test_offline_decodes_that_would_make_the_step_late_are_held() -> None:
    # 20.9 ms: 10 + 1 online + 9 offline.
    found = plan(online=online(MARGIN_MS + 20.9), offline=offline(*[1] * 12))
    assert found.held == {"off9", "off10", "off11"}
    assert (found.max_tokens, found.planned_ms, found.late) == (10, 20.0, None)


def test_no_cheap_decode_overtakes_a_held_one() -> None:
    # 2.9 ms are left. Drafted tokens take 0.5 ms each: 1, 3 and 1 ms.
    found = plan(online=online(MARGIN_MS + 13.9), offline=offline(1, 5, 1))
    assert found.held == {"off1", "off2"}


@pytest.mark.parametrize("due_ms", [-1.0, MARGIN_MS])
def test_nothing_offline_runs_while_online_needs_all_the_time(due_ms: float) -> None:
    found = plan(
        online=online(due_ms),
        offline=offline(1),
        prefills=[prompt("running", 50)],
        waiting=[new_prompt("waiting", 50)],
    )
    assert found.held == {"off0"}
    assert found.chunk_tokens == {"running": 0}
    assert (found.admit_offline, found.max_tokens) == (False, 1)
    assert found.late is Late.ONLINE


def test_decodes_beyond_the_token_budget_are_held() -> None:
    assert plan(online=online(1000), offline=offline(1, 4), max_tokens=5).held == {"off1"}


# Offline prompts beside online work


def test_an_offline_prompt_gets_the_chunk_that_fits() -> None:
    # 90 ms: 10 + 1 online + 2 offline + 154 tokens of 0.5 ms.
    found = plan(online=online(140), offline=offline(1, 1), prefills=[prompt("off", 1000)])
    assert found.chunk_tokens == {"off": 154}
    assert (found.max_tokens, found.planned_ms) == (157, 90.0)


def test_a_chunk_not_worth_its_overhead_is_not_taken() -> None:
    # 18.5 ms: room for 15 tokens; fewer than 16 only where they are the prompt's last ones.
    prefills = [prompt("long", 1000), prompt("rest", 10)]
    found = plan(online=online(MARGIN_MS + 18.6), prefills=prefills)
    assert found.chunk_tokens == {"long": 0}
    assert found.max_tokens == 1 + 10


@pytest.mark.parametrize(
    ("due_ms", "error", "expected", "most_tokens"),
    [
        (140.1, 0.0, 0, 158),
        (500.1, 0.0, 0, 878),
        (5000.0, 0.0, 500, 2978),
        (5000.0, 0.0, 1200, 1978),
        (5000.0, 0.2, 1200, 1578),
    ],
)
def test_a_prompt_that_cannot_be_split_waits_until_decodes_are_so_far_ahead(
    due_ms: float, error: float, expected: int, most_tokens: int
) -> None:
    # It may take all the time until a token is due, less the model's error; but at most a TTFT less
    # two of the prompts that are to be expected, or half a TTFT where these leave less.
    step_time = replace(TIME, error=error)
    for tokens in (most_tokens, most_tokens + 1):
        whole = prompt("off", tokens, splittable=False)
        found = plan(
            online=online(due_ms),
            prefills=[whole],
            step_time=step_time,
            online_prompt_tokens=expected,
        )
        assert found.max_tokens == 1 + (tokens if tokens == most_tokens else 0)


def test_waiting_offline_requests_are_admitted_in_order_while_they_fit() -> None:
    waiting = [new_prompt(f"off{i}", 100) for i in range(3)]
    found = plan(online=online(140.1), waiting=waiting)
    assert found.admit_offline
    assert found.chunk_tokens == {"off1": 58}  # 158 tokens in all
    assert found.max_tokens == 1 + 158


def test_no_waiting_request_is_admitted_past_one_that_does_not_fit() -> None:
    waiting = [new_prompt("long", 400, splittable=False), new_prompt("short", 20)]
    found = plan(online=online(140), waiting=waiting)
    assert (found.admit_offline, found.max_tokens) == (False, 1)


def test_where_chunks_cannot_be_capped_nobody_runs_after_one_that_the_budget_cuts() -> None:
    prefills = [prompt("off", 900), prompt("next", 16)]
    found = plan(online=online(140.1), prefills=prefills, can_cap=False)
    assert found.held == {"next"}
    assert found.max_tokens == 1 + 158
    assert plan(online=online(140.1), prefills=prefills[1:], can_cap=False).held == frozenset()


def test_where_chunks_cannot_be_capped_a_waiting_online_prompt_keeps_its_tokens() -> None:
    waiting = [new_prompt("on", 300, due_ms=900)]
    found = plan(
        online=online(140.1), prefills=[prompt("off", 900)], waiting=waiting, can_cap=False
    )
    assert found.held == {"off"}


def test_a_model_that_knows_nothing_takes_no_offline_prompt_beside_online_work() -> None:
    found = plan(
        step_time=COLD,
        online=online(1000),
        offline=offline(1),
        prefills=[prompt("running", 500)],
        waiting=[new_prompt("waiting", 500)],
    )
    assert found.chunk_tokens == {"running": 0}
    assert (found.held, found.admit_offline, found.max_tokens) == (frozenset(), False, 2)


def test_a_model_that_knows_nothing_takes_small_steps_without_online_work() -> None:
    found = plan(step_time=COLD, offline=offline(1), prefills=[prompt("off", 500)])
    assert (found.chunk_tokens, found.max_tokens) == ({"off": 64}, 1 + 64)


@pytest.mark.parametrize(("most_seen", "tokens"), [(10, 64), (50, 100), (200, 378)])
def test_beside_online_work_no_prediction_far_beyond_what_was_seen_is_relied_on(
    most_seen: int, tokens: int
) -> None:
    step_time = replace(TIME, most_prefill_tokens=most_seen)
    prefills = [prompt("a", 40), prompt("b", 1000)]
    found = plan(online=online(1000), prefills=prefills, step_time=step_time)
    assert found.chunk_tokens == {"b": tokens - 40}


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


# The offline floor


@pytest.mark.parametrize(("idle_s", "runs"), [(0.0, False), (0.049, False), (0.05, True)])
def test_offline_work_that_waited_too_long_takes_part(idle_s: float, runs: bool) -> None:
    # 11 ms are enough for the online decode alone; 1 ms is 2 % of 50 ms.
    decodes, work = online(MARGIN_MS + 11.1), offline(1, 1)
    found = plan(online=decodes, offline=work, offline_idle_s=idle_s)
    assert found.held == ({"off1"} if runs else {"off0", "off1"})
    assert found.late is (Late.FLOOR if runs else None)


@pytest.mark.parametrize(("idle_s", "tokens"), [(0.39, 0), (0.4, 16)])
@pytest.mark.parametrize("running", [True, False])
def test_of_an_overdue_prompt_the_least_chunk_is_computed(
    idle_s: float, tokens: int, running: bool
) -> None:
    late, work = online(-1), prompt("off", 500, running=running)
    where: dict[str, Any] = {"prefills": [work]} if running else {"waiting": [work]}
    found = plan(online=late, offline_idle_s=idle_s, **where)
    assert found.chunk_tokens.get("off", 0) == tokens
    assert found.max_tokens == 1 + tokens
    assert found.admit_offline is (not running and tokens > 0)


@pytest.mark.parametrize(("idle_s", "most_tokens"), [(3.0, 132), (30.0, 2400), (60.0, 7200)])
def test_the_floor_rises_while_offline_work_waits(idle_s: float, most_tokens: int) -> None:
    # 2 % of 30 s are 600 ms; by then that share has doubled.
    for tokens in (most_tokens, most_tokens + 1):
        found = plan(
            online=online(-1),
            prefills=[prompt("off", tokens, splittable=False)],
            offline_idle_s=idle_s + 1e-6,
            max_tokens=8192,
        )
        assert found.max_tokens == 1 + (tokens if tokens == most_tokens else 0)


def test_without_a_floor_offline_work_waits_for_ever() -> None:
    section = replace(SECTION, offline_floor=0.0)
    found = plan(section, online=online(-1), offline=offline(1), offline_idle_s=9999.0)
    assert found.held == {"off0"}


@pytest.mark.parametrize(
    "changes", [{"free_slots": 0}, {"waiting": [new_prompt("on", 20, due_ms=900)]}]
)
def test_an_overdue_request_that_could_not_be_admitted_takes_no_time(
    changes: dict[str, Any],
) -> None:
    waiting = [*changes.get("waiting", []), new_prompt("off", 500)]
    view = {"online": online(-1), **changes, "waiting": waiting}
    assert not plan(offline_idle_s=9.0, **view).admit_offline


# KV blocks


@pytest.mark.parametrize(
    ("blocks", "admitted"), [([7], 0), ([6], 1), ([3, 3], 2), ([4, 3], 1), ([7, 1], 0)]
)
def test_offline_requests_are_admitted_into_the_blocks_beyond_the_headroom(
    blocks: list[int], admitted: int
) -> None:
    waiting = [new_prompt(f"off{i}", 20, blocks=count) for i, count in enumerate(blocks)]
    found = plan(online=online(1000), waiting=waiting, free_blocks=10, headroom_blocks=4)
    assert found.max_tokens == 1 + 20 * admitted
    assert found.admit_offline is (admitted > 0)


def test_the_blocks_of_waiting_online_requests_are_not_given_away() -> None:
    waiting = [new_prompt("on", 20, due_ms=900, blocks=5), new_prompt("off", 20, blocks=6)]
    assert plan(waiting=waiting, free_blocks=11).admit_offline
    assert not plan(waiting=waiting, free_blocks=10).admit_offline


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


# Without online work


def test_without_online_work_a_step_fills_a_share_of_the_ttft() -> None:
    # 0.25 * 2000 ms: 10 + 2 decodes + 976 tokens of 0.5 ms.
    found = plan(offline=offline(1, 1), prefills=[prompt("off", 4000)])
    assert (found.held, found.chunk_tokens) == (frozenset(), {"off": 976})
    assert found.max_tokens == 2 + 976


def test_without_online_work_an_offline_prompt_may_fill_the_whole_budget() -> None:
    fast = replace(TIME, token=0.01, most_prefill_tokens=10)
    assert plan(waiting=[new_prompt("off", 9000)], step_time=fast).max_tokens == 4096


def test_without_online_work_every_decode_runs_however_long_the_step() -> None:
    # 610 ms, more than the 500 ms of the idle share, so nothing is left for the prompt.
    found = plan(offline=offline(*[1] * 600), prefills=[prompt("off", 500)])
    assert (found.held, found.chunk_tokens) == (frozenset(), {"off": 0})
    assert found.max_tokens == 600


@pytest.mark.parametrize(("splittable", "tokens"), [(True, 64), (False, 900)])
@pytest.mark.parametrize("running", [True, False])
def test_a_step_is_never_empty_however_slow_the_engine(
    splittable: bool, tokens: int, running: bool
) -> None:
    slow = StepTime(base=10_000.0, token=1.0, error=0.0, ready=True)
    work = prompt("off", 900, splittable=splittable, running=running)
    where: dict[str, Any] = {"prefills": [work]} if running else {"waiting": [work]}
    found = plan(step_time=slow, **where)
    assert (found.max_tokens, found.held) == (tokens, frozenset())
    assert found.admit_offline is not running


# Mixtures of experts

MOE = replace(TIME, experts=20.0, idle_experts=0.5)  # one token 10 ms, two 15 ms, many 20 ms


def test_a_chunk_pays_for_all_experts_that_nothing_else_needs() -> None:
    # 90 ms: 10 + 1 online + 20 for experts + 118 tokens.
    found = plan(online=online(140.1), prefills=[prompt("off", 1000)], step_time=MOE)
    assert found.chunk_tokens == {"off": 118}
    assert found.planned_ms == pytest.approx(90.0)


def test_offline_decodes_pay_for_the_experts_that_they_add() -> None:
    # 4 tokens need 18.75 ms for experts: 10 + 1 online + 18.75 leave 2 ms of 31.75.
    found = plan(online=online(MARGIN_MS + 31.8), offline=offline(1, 1, 1), step_time=MOE)
    assert found.held == {"off2"}
    assert found.planned_ms == pytest.approx(10 + 3 + 17.5)


# Faults that were found in the policy


def test_an_overdue_decode_is_served_before_an_online_prompt_takes_the_whole_budget() -> None:
    prefills = [prompt("on", 9000, due_ms=9000)]
    found = plan(offline=offline(1), prefills=prefills, offline_idle_s=9.0)
    assert (found.chunk_tokens, found.max_tokens) == ({}, 4096)  # a decode, and the rest
    assert found.held == frozenset()


def test_an_overdue_prompt_that_cannot_be_split_is_not_cut_to_the_budget() -> None:
    whole = prompt("off", 4096, splittable=False)
    found = plan(online=online(-1), prefills=[whole], offline_idle_s=100.0)
    assert (found.chunk_tokens, found.max_tokens) == ({"off": 0}, 1)


def test_an_overdue_request_that_is_preempted_gets_no_tokens() -> None:
    found = plan(
        prefills=[prompt("half", 300)],
        waiting=[NEEDS_SIX],
        free_blocks=4,
        victims=[Victim("half", 5, 9)],
        offline_idle_s=9.0,
    )
    assert (found.preempt, found.chunk_tokens, found.max_tokens) == (("half",), {}, 40)


@pytest.mark.parametrize("decodes", [offline(), offline(1)])
def test_without_online_work_a_prompt_is_computed_even_where_chunks_cannot_be_capped(
    decodes: OfflineDecodes,
) -> None:
    found = plan(offline=decodes, prefills=[prompt("off", 3000)], can_cap=False)
    assert found.held == frozenset()
    assert found.max_tokens > 900


def test_the_floor_of_a_model_that_knows_nothing_takes_no_long_prompt_at_once() -> None:
    whole = prompt("off", 3000, splittable=False)
    found = plan(online=online(1000), prefills=[whole], step_time=COLD, offline_idle_s=0.001)
    assert found.max_tokens == 1


def test_an_overdue_prompt_gets_no_less_than_what_fits() -> None:
    found = plan(online=online(1000), prefills=[prompt("off", 1000)], offline_idle_s=9.0)
    assert found.chunk_tokens == {"off": 378}


def test_an_overdue_request_without_blocks_is_not_admitted() -> None:
    waiting = [new_prompt("off", 500, blocks=50)]
    found = plan(online=online(-1), waiting=waiting, free_blocks=10, offline_idle_s=9.0)
    assert not found.admit_offline


def test_the_blocks_of_an_overdue_request_are_not_given_away() -> None:
    waiting = [new_prompt("a", 16, blocks=6), new_prompt("b", 16, blocks=6)]
    found = plan(online=online(1000), waiting=waiting, free_blocks=10, offline_idle_s=9.0)
    assert found.max_tokens == 1 + 16


def test_a_chunk_in_a_hurry_is_worth_its_overhead() -> None:
    found = plan(online=online(-10), prefills=[prompt("on", 500, due_ms=8000)])
    assert found.chunk_tokens["on"] >= 16


def test_drafted_tokens_of_offline_decodes_take_their_time() -> None:
    # 10 + 1 online + 4 * 2.5 offline leave 69 ms of 90.
    found = plan(online=online(140.1), offline=offline(5, 5, 5, 5), prefills=[prompt("off", 1000)])
    assert found.chunk_tokens == {"off": 138}


def test_more_online_tokens_than_budget_give_no_negative_chunk() -> None:
    drafts = online(1000)._replace(shape=StepShape(50, 2500), tokens=50)
    found = plan(online=drafts, prefills=[prompt("on", 100, due_ms=900)], max_tokens=40)
    assert (found.chunk_tokens, found.max_tokens) == ({"on": 0}, 40)


def test_a_prompt_without_tokens_now_does_not_stand_for_overdue_work() -> None:
    prefills = [prompt("none", 0), prompt("off", 50)]
    found = plan(online=online(-1), prefills=prefills, offline_idle_s=9.0)
    assert found.chunk_tokens["off"] == 16

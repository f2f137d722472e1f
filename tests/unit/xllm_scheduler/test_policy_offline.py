"""What the elastic policy plans for offline requests, on worked examples."""

from __future__ import annotations

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
)
from xllm_plugins.latency import StepShape, StepTime
from xllm_scheduler.engine.policy import (
    Late,
    OfflineDecodes,
    StepPlan,
    Victim,
)

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
        waiting=[new_prompt("on", 40, due_ms=900, blocks=10)],
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

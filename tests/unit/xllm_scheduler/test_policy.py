"""The elastic policy on worked examples, with times that a reader can add up."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from xllm_plugins.latency import StepTime
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine.policy import ElasticPolicy, RequestView, StepPlan, StepView

# A step takes 10 ms, and 0.5 ms for each prefill token, and 1 ms for each decode. With an error
# of 0 the margin is at its least, 5 %.
TIME = StepTime(base=10.0, token=0.5, decode=1.0, error=0.0, ready=True)
SECTION = SchedulerSection(
    ttft_ms=2000.0, tpot_ms=100.0, online_share=0.9, idle_step_share=0.25, offline_hold_ms=2000.0
)
NOW_S = 50.0


def request(name: str, due_ms: float, prefill: int, **changes: Any) -> RequestView:
    """A running request; with no ``prefill`` it decodes. Finite ``due_ms`` makes it online."""
    is_online = math.isfinite(due_ms)
    values: dict[str, Any] = {
        "online": is_online,
        "running": True,
        "due_s": NOW_S + due_ms / 1e3,
        "new_tokens": prefill or 1,
        "context_tokens": 0 if prefill else 100,
        "decoding": not prefill,
        "tpot_ms": 100.0 if is_online else math.inf,
        "splittable": bool(prefill),
    }
    return RequestView(name, **(values | changes))


def online(name: str, due_ms: float, prefill: int = 0, **changes: Any) -> RequestView:
    return request(name, due_ms, prefill, **changes)


def offline(name: str, prefill: int = 0, **changes: Any) -> RequestView:
    return request(name, math.inf, prefill, **changes)


def view_of(*requests: RequestView, now_s: float = NOW_S, **changes: Any) -> StepView:
    values: dict[str, Any] = {"max_tokens": 4096, "step_time": TIME} | changes
    running = tuple(r for r in requests if r.running)
    waiting = tuple(r for r in requests if not r.running)
    return StepView(start_s=now_s, running=running, waiting=waiting, **values)


def plan(*requests: RequestView, **changes: Any) -> StepPlan:
    return ElasticPolicy(SECTION).plan(view_of(*requests, **changes))


@pytest.mark.parametrize("step_time", [TIME, StepTime()])
def test_online_alone_is_left_to_vllm(step_time: StepTime) -> None:
    requests = [online("late", -500), online("new", 900, prefill=3000, running=False)]
    assert plan(*requests, step_time=step_time) == StepPlan(4096)


def test_offline_decodes_run_beside_online_where_there_is_time() -> None:
    found = plan(online("on", 1000), offline("a"), offline("b"))
    assert found == StepPlan(3, admit_offline=False, target_ms=90.0)  # 0.9 of the TPOT


def test_offline_decodes_that_would_make_online_late_are_held() -> None:
    # 20.9 ms less 5 % are 19.9 ms: 10 + 1 online + 8 offline.
    found = plan(online("on", 20.9), *(offline(f"off{i}") for i in range(10)))
    assert found.held == {"off8", "off9"}
    assert found.max_tokens == 9


def test_an_offline_prefill_gets_the_chunk_that_fits() -> None:
    # Target 90 ms: 10 + 1 online + 158 tokens of 0.5 ms.
    found = plan(online("on", 1000), offline("off", prefill=1000))
    assert found.chunk_tokens == {"off": 158}
    assert found.max_tokens == 159


def test_a_chunk_not_worth_its_overhead_is_not_taken() -> None:
    # 18.5 ms: room for 13 tokens; fewer than 16 only where they are the prompt's last ones.
    requests = [online("on", 18.5), offline("long", prefill=1000), offline("rest", prefill=10)]
    found = plan(*requests)
    assert found.held == {"long"}
    assert found.max_tokens == 1 + 10


def test_waiting_offline_requests_are_admitted_in_order_while_they_fit() -> None:
    waiting = [offline(f"off{i}", prefill=100, running=False) for i in range(3)]
    found = plan(online("on", 1000), *waiting)
    assert found.admit_offline
    assert found.chunk_tokens == {"off1": 58}  # 158 tokens in all
    assert found.max_tokens == 1 + 158


def test_no_waiting_request_is_admitted_past_one_that_does_not_fit() -> None:
    long = offline("long", prefill=400, running=False, splittable=False)
    found = plan(online("on", 1000), long, offline("short", prefill=20, running=False))
    assert (found.admit_offline, found.max_tokens) == (False, 1)


def test_nothing_offline_runs_while_online_is_late() -> None:
    waiting = offline("new", prefill=50, running=False)
    found = plan(online("on", -1), offline("a"), offline("b", prefill=50), waiting)
    assert found.held == {"a", "b"}
    assert not found.admit_offline
    assert found.max_tokens == 1


def test_the_tightest_online_request_decides() -> None:
    assert plan(online("a", 1000), online("b", 60), offline("c")).target_ms == pytest.approx(57.0)
    calm, strict = online("a", 1000), online("b", 1000, tpot_ms=40.0)
    assert plan(calm, strict, offline("c")).target_ms == pytest.approx(36.0)


@pytest.mark.parametrize(("error", "margin"), [(0.0, 0.05), (0.2, 0.2), (0.4, 0.4), (1.0, 0.4)])
def test_the_margin_grows_with_the_error_of_the_model(error: float, margin: float) -> None:
    time = StepTime(base=1.0, decode=1.0, error=error, ready=True)
    found = plan(online("on", 50), offline("off"), step_time=time)
    assert found.target_ms == pytest.approx(50 * (1 - margin))


@pytest.mark.parametrize(
    ("prompt_tokens", "target_ms"),
    [(0, 90.0), (10, 90.0), (60, 65.0), (1000, -85.0)],
)
def test_time_for_the_next_online_prompt_is_kept_in_reserve(
    prompt_tokens: float, target_ms: float
) -> None:
    # 95 ms of slack less 0.5 ms a token, which is 180 ms, two steps, at most.
    found = plan(online("on", 100), offline("off"), online_prompt_tokens=prompt_tokens)
    assert found.target_ms == pytest.approx(target_ms)


def test_without_online_work_a_step_fills_a_share_of_the_ttft() -> None:
    # 0.25 * 2000 ms: 10 + 2 decodes + 976 tokens of 0.5 ms.
    found = plan(offline("a"), offline("b"), offline("c", prefill=4000))
    assert found.held == frozenset()
    assert found.chunk_tokens == {"c": 976}
    assert found.max_tokens == 2 + 976


def test_without_online_work_every_decode_runs_however_long_the_step() -> None:
    # 610 ms, more than the 500 ms of the idle share, so nothing is left for the prefill.
    found = plan(*(offline(f"off{i}") for i in range(600)), offline("new", prefill=500))
    assert (found.held, found.max_tokens) == (frozenset({"new"}), 600)


def test_an_online_prefill_goes_first_and_offline_gets_what_its_ttft_leaves() -> None:
    # 1000 ms less 5 % to the first token; 10 + 200 ms of prefill; 740 ms are 1480 tokens.
    found = plan(online("on", 1000, prefill=400), offline("off", prefill=3000))
    assert found.target_ms == pytest.approx(950.0)
    assert found.chunk_tokens == {"off": 1480}


def test_an_online_prefill_of_several_steps_shares_its_time_among_them() -> None:
    # 500 of 1000 tokens a step: two steps, and each may take half of 950 ms.
    found = plan(online("on", 1000, prefill=1000), offline("off"), max_tokens=500)
    assert found.target_ms == pytest.approx(475.0)
    assert found.chunk_tokens["on"] == 500


def test_the_most_urgent_online_prefill_goes_first_and_advances_however_late() -> None:
    calm, urgent = online("calm", 900, prefill=500), online("urgent", 200, prefill=500)
    found = plan(online("decode", -10), calm, urgent, offline("off"))
    # No time is left beyond the pace of 90 ms: 10 + 1 + 158 tokens of the urgent one.
    assert found.chunk_tokens == {"urgent": 158, "calm": 0}
    slow = StepTime(base=500.0, token=1.0, decode=1.0, error=0.0, ready=True)
    found = plan(online("decode", -10), calm, urgent, offline("off"), step_time=slow)
    assert found.chunk_tokens == {"urgent": 64, "calm": 0}


def test_offline_prefills_are_held_whole_where_chunks_cannot_be_capped() -> None:
    requests = [
        online("new", 1000, prefill=50, running=False),
        offline("decode"),
        offline("prefill", prefill=500),
    ]
    assert plan(*requests, can_cap=False).held == {"prefill"}
    assert plan(*requests, can_cap=True).held == frozenset()


def test_a_prompt_that_cannot_be_split_waits_until_it_fits_whole() -> None:
    whole = offline("off", prefill=200, splittable=False)
    assert plan(online("on", 1000), whole).held == {"off"}
    found = plan(online("on", 1000), offline("off", prefill=158, splittable=False))
    assert (found.held, found.max_tokens) == (frozenset(), 159)


@pytest.mark.parametrize("splittable", [True, False])
def test_a_step_is_never_empty_however_slow_the_engine(splittable: bool) -> None:
    slow = StepTime(base=10_000.0, token=1.0, ready=True)
    waiting = offline("off", prefill=900, splittable=splittable, running=False)
    found = plan(waiting, step_time=slow)
    assert found.admit_offline
    assert found.max_tokens == (64 if splittable else 900)


def test_a_model_that_knows_nothing_yet_gets_small_steps() -> None:
    decodes = [online("on", 1000), offline("a")]
    found = plan(*decodes, offline("b", prefill=4000), step_time=StepTime())
    assert found.max_tokens == 2 + 256
    assert found.held == frozenset()


def held_for(policy: ElasticPolicy, at_ms: float, *requests: RequestView) -> bool:
    """Whether all offline work is held in a step at this time."""
    step = policy.plan(view_of(*requests, now_s=NOW_S + at_ms / 1e3))
    return not step.admit_offline and len(step.held) == 1


def test_a_hold_ends_for_one_step_after_its_longest_time() -> None:
    policy = ElasticPolicy(SECTION)
    requests = [online("late", -1), offline("off")]
    moments = [0, 1000, 1999, 2000, 2010, 4000, 4010, 4011]
    held = {at_ms: held_for(policy, at_ms, *requests) for at_ms in moments}
    # The second hold begins at 2010 ms.
    assert [at_ms for at_ms, was in held.items() if not was] == [2000, 4010]


def test_a_hold_that_was_not_of_all_offline_work_starts_anew() -> None:
    policy = ElasticPolicy(SECTION)
    late, calm, off = online("on", -1), online("on", 9000), offline("off")
    assert held_for(policy, 0, late, off)
    assert not held_for(policy, 1500, calm, off)
    assert held_for(policy, 1600, late, off)
    assert held_for(policy, 3500, late, off)
    assert not held_for(policy, 3600, late, off)


def test_speculative_online_decodes_run_whole_while_the_model_is_cold() -> None:
    decodes = [online(f"on{i}", 1000, new_tokens=5) for i in range(100)]
    found = plan(*decodes, offline("off"), step_time=StepTime())
    assert found.chunk_tokens == {}
    assert found.max_tokens >= 500


@pytest.mark.parametrize(
    "requests",
    [
        [offline("off", prefill=1000, splittable=False, running=False)],
        [
            online("on", 1000, prefill=1000, splittable=False, running=False),
            offline("off", prefill=50, running=False),
        ],
    ],
)
def test_a_prompt_that_cannot_be_split_fits_into_a_cold_step(requests: list[RequestView]) -> None:
    assert plan(*requests, step_time=StepTime()).max_tokens >= 1000


@pytest.mark.parametrize(
    "requests",
    [
        # Longer than a step at the pace of the TPOT.
        [online("on", -1), offline("off", prefill=400, splittable=False)],
        # Online prompts without end take every step's whole budget.
        [online("on", -1, prefill=100_000), offline("off", prefill=400)],
    ],
)
def test_a_hold_ends_whatever_holds_it(requests: list[RequestView]) -> None:
    policy = ElasticPolicy(SECTION)
    assert held_for(policy, 0, *requests)
    assert not held_for(policy, 2000, *requests)


def test_a_hold_never_ends_at_the_cost_of_an_online_decode() -> None:
    policy = ElasticPolicy(SECTION)
    requests = [online("on", -1), offline("off", prefill=4096, splittable=False)]
    for at_ms in (0, 2000):
        found = policy.plan(view_of(*requests, now_s=NOW_S + at_ms / 1e3))
        assert "on" not in found.chunk_tokens
        assert found.max_tokens >= 1


def test_an_online_prompt_that_has_nothing_to_compute_now_stops_no_offline_work() -> None:
    idle = replace(online("on", 1000, prefill=10), new_tokens=0)
    found = plan(idle, offline("a"), offline("b", prefill=500))
    assert found.held == frozenset()
    assert found.max_tokens > 1

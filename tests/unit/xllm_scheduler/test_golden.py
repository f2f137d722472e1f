"""What xLLM's own scheduler tests expect (arXiv 2510.14686), put to our policy.

Ours plans steps for vLLM's scheduler, so what vLLM itself does is in ``tests/contract``; the fit of
the quadratic is in ``test_latency.py``. Left out is what has no counterpart: beam search, the
per-request chunk of 4 tokens (ours has at least 16), chunks that shrink to the free KV (vLLM's
allocation is whole), and priorities among online requests, which are vLLM's own.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from xllm_plugins.latency import StepShape, StepTime
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine.elastic import ElasticPolicy
from xllm_scheduler.engine.policy import (
    OfflineDecodes,
    OnlineDecodes,
    PrefillView,
    StepPlan,
    StepView,
    Victim,
)

NOW_S = 50.0
BLOCK = 32
# xLLM's fit of {(2, 22), (4, 48), (6, 78), (8, 112)}: ten tokens take 150 ms.
QUADRATIC = StepTime(token=10.0, square=0.5, error=0.0, ready=True, most_prefill_tokens=4096)
FAST = StepTime(base=1.0, token=0.001, decode=0.1, error=0.0, ready=True, most_prefill_tokens=9999)


def prompt(name: str, tokens: int, due_ms: float = math.inf, *, running: bool) -> PrefillView:
    return PrefillView(
        name,
        online=math.isfinite(due_ms),
        running=running,
        due_s=NOW_S + due_ms / 1e3,
        new_tokens=tokens,
        blocks=0 if running else -(-tokens // BLOCK),
    )


def plan(section: SchedulerSection | None = None, **view: Any) -> StepPlan:
    values = {"start_s": NOW_S, "max_tokens": 4096, "step_time": FAST, **view}
    return ElasticPolicy(section or SchedulerSection()).plan(StepView(**values))


def decodes(count: int) -> OnlineDecodes:
    shape = StepShape(decodes=count)
    return OnlineDecodes([NOW_S + 0.9] * count, [9] * count, [100.0] * count, shape, count)


def test_on_prefill_preempt_off_decode_takes_one_of_two_offline_requests() -> None:
    """As xLLM's Chunked: 8 usable blocks, all held by two offline requests of 100 tokens.

    A new online one of 80 tokens takes three of the four blocks of one; the other goes on beside
    it. Continuous has no mixed batches, so there both stand still. Of equals xLLM evicts the last
    and we the first; they cost the same.
    """
    found = plan(
        offline=OfflineDecodes(["a", "b"], [100, 100], [1, 1]),
        waiting=[prompt("online", 80, 1000.0, running=False)],
        free_blocks=0,
        victims=[Victim("a", 100, 4), Victim("b", 100, 4)],
    )
    assert list(found.preempt) == ["a"]
    assert (found.held, found.max_tokens) == (frozenset(), 80 + 1)


def test_on_prefill_preempt_off_decode_takes_nothing_where_it_would_not_suffice() -> None:
    """As xLLM: 200 tokens need 7 blocks; the only offline request has 4."""
    found = plan(
        online=decodes(1),
        offline=OfflineDecodes(["a"], [100], [1]),
        waiting=[prompt("online", 200, 1000.0, running=False)],
        free_blocks=0,
        victims=[Victim("a", 100, 4)],
    )
    assert (list(found.preempt), found.held) == ([], frozenset())


def test_a_request_with_time_left_preempts_nobody_yet() -> None:
    """Unlike xLLM, which preempts as soon as blocks lack.

    What an offline request has computed is lost then. While more than half of the TTFT is left,
    blocks may well come free by themselves.
    """
    policy = ElasticPolicy(SchedulerSection(ttft_ms=2000.0))
    assert not policy.is_urgent(1900.0, 80, FAST)
    assert policy.is_urgent(900.0, 80, FAST)


def test_online_prompts_and_decodes_share_a_step() -> None:
    """Unlike xLLM's Continuous, which decodes only where nothing is prefilled.

    There an endless run of prompts, offline ones too, stops every online decode. vLLM mixes both,
    and what keeps decodes in time is the length of the step.
    """
    found = plan(online=decodes(5), prefills=[prompt("new", 1000, 1000.0, running=True)])
    assert (found.held, found.chunk_tokens, found.max_tokens) == (frozenset(), {}, 4096)


def test_latency_aware_steps_take_two_of_three_offline_prompts_then_one() -> None:
    """As xLLM: three prompts of 150 ms against 350 ms; for us the idle share of the TTFT."""
    section = SchedulerSection(ttft_ms=1400.0, idle_step_share=0.25)
    waiting = [prompt(name, 10, running=False) for name in "abc"]
    first = plan(section, waiting=waiting, step_time=QUADRATIC)
    assert (first.max_tokens, first.planned_ms) == (20, 300.0)
    then = plan(section, waiting=waiting[2:], step_time=QUADRATIC)
    assert (then.max_tokens, then.planned_ms) == (10, 150.0)


def test_latency_aware_steps_take_two_of_three_online_prompts_then_one() -> None:
    """As xLLM: with a TTFT of 350 ms two of the prompts can be in time, if the third waits."""
    waiting = [prompt(name, 10, 350.0, running=False) for name in "abc"]
    assert plan(waiting=waiting, step_time=QUADRATIC).max_tokens == 20


def test_the_first_prompt_is_admitted_however_slow() -> None:
    """As xLLM, which compares with the budget only where something runs: 6 s against 0.5 s."""
    whole = prompt("a", 100, running=False)._replace(splittable=False)
    found = plan(waiting=[whole], step_time=QUADRATIC)
    assert (found.admit_offline, found.max_tokens) == (True, 100)


def test_chunked_a_token_budget_of_one_takes_one_of_two_prompts() -> None:
    """As xLLM."""
    prefills = [prompt(name, 10, 1000.0, running=True) for name in "ab"]
    found = plan(prefills=prefills, max_tokens=1)
    assert (found.chunk_tokens, found.max_tokens) == ({"b": 0}, 1)


@pytest.mark.parametrize("online", [True, False])
def test_chunked_a_long_prompt_gets_what_five_decodes_leave(online: bool) -> None:
    """As xLLM: 10000 - 5 tokens; an offline prompt too, as long as the step is in time."""
    due_ms = 1000.0 if online else math.inf
    found = plan(
        online=decodes(5),
        prefills=[prompt("long", 10000, due_ms, running=True)],
        max_tokens=10000,
    )
    assert found.max_tokens == 10000
    assert found.chunk_tokens == ({} if online else {"long": 9995})


def test_chunked_prompts_of_any_length_are_cut_only_by_time_and_budget() -> None:
    """Unlike xLLM, which cuts {10, 1024, 2048} to chunks of at most 1024.

    That bounds a step by tokens. Ours is bounded by its time; a limit in tokens besides is vLLM's
    own ``long_prefill_token_threshold``.
    """
    prefills = [prompt(f"p{n}", n, 1000.0, running=True) for n in (10, 1024, 2048)]
    found = plan(prefills=prefills)
    assert (found.chunk_tokens, found.max_tokens) == ({}, 4096)

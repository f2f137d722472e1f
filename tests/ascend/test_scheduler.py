"""The elastic scheduler on each of vllm-ascend's schedulers, or why it stands back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ascend.configs import configured, decision, scheduler_of
from tests.contract.engine import OFFLINE, Engine, request
from tests.contract.worker import completion
from xllm_plugins.compat.dry_schedule import obeyed_levers
from xllm_plugins.compat.scheduler_levers import Lever
from xllm_scheduler.engine.scheduler import ElasticMixin
from xllm_scheduler.plugin import SCHEDULER

ASYNC = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
BALANCE = "vllm_ascend.patch.platform.patch_balance_schedule.BalanceScheduler"
CORE = "vllm_ascend.core"
UNREAD = "does not read next_decode_eligible_step"
DISOBEYED = "does not as configured obey next_decode_eligible_step"


class Case(NamedTuple):
    """A configuration, and the scheduler that vllm-ascend would run under it."""

    arguments: dict[str, Any]
    base: str
    reason: str = ""  # why ours stands back


def _recompute(**arguments: Any) -> dict[str, Any]:
    switch = {"recompute_scheduler_enable": True}
    return {"role": "kv_consumer", "additional": switch, **arguments}


CASES = {
    "asynchronous": Case({}, ASYNC),
    "synchronous": Case({"async_scheduling": False}, BALANCE),
    "decode node": Case({"role": "kv_consumer"}, ASYNC),
    "balance": Case({"additional": {"enable_balance_scheduling": True}}, ASYNC, DISOBEYED),
    "prefill node": Case({"role": "kv_producer"}, ASYNC, DISOBEYED),
    "synchronous prefill node": Case(
        {"role": "kv_producer", "async_scheduling": False}, BALANCE, DISOBEYED
    ),
    "recompute": Case(_recompute(), f"{CORE}.recompute_scheduler.AsyncRecomputeScheduler", UNREAD),
    "synchronous recompute": Case(
        _recompute(async_scheduling=False),
        f"{CORE}.recompute_scheduler.RecomputeScheduler",
        UNREAD,
    ),
    "dynamic batch": Case(
        {"additional": {"SLO_limits_for_dynamic_batch": 100}},
        f"{CORE}.scheduler_dynamic_batch.SchedulerDynamicBatch",
        UNREAD,
    ),
    "profiling chunk": Case(
        {
            "pipeline_parallel_size": 2,
            "additional": {"profiling_chunk_config": {"enabled": True}},
        },
        f"{CORE}.scheduler_profiling_chunk.ProfilingChunkScheduler",
        UNREAD,
    ),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@EVERY
def test_it_attaches_where_every_lever_works_and_says_why_where_not(
    case: Case, tmp_path: Path
) -> None:
    config = configured(tmp_path, **case.arguments)
    row = decision(config, "scheduler")
    assert row["active"] is not bool(case.reason), row["reason"]
    if case.reason:
        assert row["reason"] == f"{case.base.rpartition('.')[2]}.schedule() {case.reason}"
    else:
        assert row["attached_to"] == case.base


@EVERY
def test_a_dry_schedule_finds_the_levers_that_really_work(case: Case, tmp_path: Path) -> None:
    config = configured(tmp_path, **case.arguments)
    config.scheduler_config.disable_hybrid_kv_cache_manager = False  # as with some connectors
    expected = {Lever.BUDGET} if case.reason else {Lever.BUDGET, Lever.HOLD}
    config.scheduler_config.scheduler_cls = None if case.base in (ASYNC, BALANCE) else case.base
    base = config.scheduler_config.get_scheduler_cls()
    assert f"{base.__module__}.{base.__qualname__}" == case.base
    assert obeyed_levers(base, config) == expected


@EVERY
def test_the_scheduler_that_an_engine_builds_serves_requests_to_their_end(
    case: Case, tmp_path: Path
) -> None:
    config = configured(tmp_path, **case.arguments)
    config.__post_init__()  # as vLLM does once more in the engine's process
    scheduler = scheduler_of(config)
    assert isinstance(scheduler, ElasticMixin) is not bool(case.reason)
    engine = Engine(scheduler)
    prompts = {"online": [1] * 200, "offline": [2] * 300}
    for name, prompt in prompts.items():
        xargs = OFFLINE if name == "offline" else None
        engine.add(request(name, prompt, max_tokens=9, xargs=xargs, block=scheduler.block_size))
    engine.run()
    assert engine.streams == {name: completion(prompt, 9) for name, prompt in prompts.items()}


def test_an_offline_request_is_held_on_a_scheduler_of_vllm_ascends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(scheduler_of(configured(tmp_path)))
    assert [cls.__name__ for cls in type(engine.scheduler).__mro__][2:5] == [
        "AsyncScheduler",
        "BalanceScheduler",
        "Scheduler",
    ]
    block = engine.scheduler.block_size
    engine.add(request("a", max_tokens=9, block=block), request("b", max_tokens=9, block=block))
    engine.step()
    plan = engine.scheduler._plan

    def hold_b(now_s: float) -> Any:
        return plan(now_s)._replace(held=frozenset({"b"}))

    monkeypatch.setattr(engine.scheduler, "_plan", hold_b)
    assert set(engine.step()) == {"a"}
    monkeypatch.undo()
    assert "b" in engine.step()


def test_a_scheduler_that_a_switch_selects_is_left_as_it_is(tmp_path: Path) -> None:
    config = configured(tmp_path, **CASES["dynamic batch"].arguments)
    assert config.scheduler_config.scheduler_cls == CASES["dynamic batch"].base


def test_ours_is_what_the_engine_process_finds_after_configuring_again(tmp_path: Path) -> None:
    config = configured(tmp_path)
    config.__post_init__()
    assert config.scheduler_config.scheduler_cls == SCHEDULER

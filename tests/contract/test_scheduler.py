"""Whatever the policy plans, vLLM's scheduler keeps its promises and every request its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from tests.contract.engine import Clock, Engine, build, check_kv_books, request
from tests.contract.worker import completion
from xllm_plugins.latency import StepShape
from xllm_scheduler.engine.scheduler import elastic_class

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_model")]

BOTH = pytest.mark.parametrize("base", [Scheduler, AsyncScheduler])
MOST_STEPS = 2000
MOST_EMPTY_STEPS = 3  # in a row: steps in flight, then a try to admit what does not fit


@dataclass(frozen=True)
class Job:
    """One request of a scenario; ``arrives`` and ``aborted`` are numbers of steps."""

    prompt: tuple[int, ...]
    max_tokens: int
    offline: bool
    arrives: int
    aborted: int | None
    priority: int
    stop: tuple[int, ...]

    def request(self, index: int) -> Request:
        kind = "offline" if self.offline else "online"
        return request(
            f"r{index}",
            self.prompt,
            max_tokens=self.max_tokens,
            xargs={"xllm_class": kind},
            priority=self.priority,
            arrival_s=1000.0 + index / 1e3,
            stop=self.stop,
        )


@dataclass(frozen=True)
class Scenario:
    """Everything that a run depends on."""

    jobs: tuple[Job, ...]
    budget: int
    seqs: int
    blocks: int
    policy: str
    token_ms: float
    warm: bool
    ttft_ms: float
    tpot_ms: float


# Prompts share their beginnings, so that the prefix cache has something to do.
_prompts = st.builds(
    lambda shared, length, last: (*([shared] * length), last),
    st.integers(0, 2),
    st.integers(0, 49),
    st.integers(3, 9),
)
_jobs = st.builds(
    Job,
    prompt=_prompts,
    max_tokens=st.integers(1, 40),
    offline=st.booleans(),
    arrives=st.integers(0, 25),
    aborted=st.none() | st.integers(0, 40),
    priority=st.integers(0, 3),
    stop=st.just(()) | st.just((7, 23)),
)
_scenarios = st.builds(
    Scenario,
    jobs=st.lists(_jobs, min_size=2, max_size=10).map(tuple),
    budget=st.sampled_from([8, 16, 40, 256]),
    seqs=st.integers(1, 8),
    blocks=st.sampled_from([25, 32, 60]),
    policy=st.sampled_from(["fcfs", "priority"]),
    token_ms=st.sampled_from([0.05, 1.0, 20.0]),
    warm=st.booleans(),
    ttft_ms=st.sampled_from([50.0, 2000.0]),
    tpot_ms=st.sampled_from([10.0, 100.0]),
)


def _warm_up(scheduler: Any, token_ms: float) -> None:
    for i in range(1, 17):
        shape = StepShape().with_chunk(i * 4, 8 * i)
        for _ in range(i % 4):
            shape = shape.with_chunk(1, 10 * i)
        tokens = shape.prefill_tokens + shape.decodes
        scheduler._model.observe(shape, 5.0 + token_ms * tokens)
    assert scheduler._model.current.ready


def _serve(scheduler_class: type, scenario: Scenario, clock: Clock) -> Engine:
    """Run a scenario to its end, checking after every step what must hold between steps."""
    scheduler = build(
        scheduler_class,
        settings={"ttft_ms": scenario.ttft_ms, "tpot_ms": scenario.tpot_ms},
        budget=scenario.budget,
        seqs=scenario.seqs,
        blocks=scenario.blocks,
        policy=scenario.policy,
    )
    if scenario.warm and hasattr(scheduler, "_model"):
        _warm_up(scheduler, scenario.token_ms)
    engine = Engine(scheduler, clock, scenario.token_ms)
    full = scheduler.max_num_scheduled_tokens
    for step in range(MOST_STEPS):
        for index, job in enumerate(scenario.jobs):
            if job.arrives == step:
                engine.add(job.request(index))
            if job.aborted is not None and job.arrives + job.aborted == step:
                engine.abort(f"r{index}")
        scheduled = engine.step()
        assert sum(scheduled.values()) <= full
        assert scheduler.max_num_scheduled_tokens == full
        assert len(scheduler.running) <= scenario.seqs
        if scheduler.has_unfinished_requests() and len(engine.steps) > MOST_EMPTY_STEPS:
            assert any(engine.steps[-MOST_EMPTY_STEPS - 1 :])
        check_kv_books(scheduler)
        last = max(job.arrives + (job.aborted or 0) for job in scenario.jobs)
        if step > last and not scheduler.has_requests():
            break
    else:
        raise AssertionError(f"after {MOST_STEPS} steps still busy with {scheduler.requests}")
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == scenario.blocks - 1  # one is vLLM's null block
    return engine


@BOTH
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scenario=_scenarios)
def test_every_request_gets_the_tokens_that_it_gets_from_vllm_alone(
    base: type, scenario: Scenario, clock: Clock
) -> None:
    clock.now_s = 1000.0
    ours = _serve(elastic_class(base), scenario, clock)
    assert ours.scheduler.xllm_report().facts["policy_failure"] == ""
    clock.now_s = 1000.0
    theirs = _serve(base, scenario, clock)

    for index, job in enumerate(scenario.jobs):
        name = f"r{index}"
        stream, right = ours.streams[name], completion(job.prompt, job.max_tokens)
        assert stream == right[: len(stream)]
        if ours.reasons[name] != "abort" and theirs.reasons[name] != "abort":
            assert stream == theirs.streams[name]
            assert ours.reasons[name] == theirs.reasons[name]


@BOTH
@pytest.mark.parametrize(
    ("lacking", "options"), [("slot", {"seqs": 1}), ("KV", {"seqs": 8, "blocks": 24})]
)
def test_an_online_request_that_cannot_be_admitted_holds_up_nothing(
    base: type, lacking: str, options: dict[str, Any], clock: Clock
) -> None:
    engine = Engine(build(elastic_class(base), budget=16, **options), clock)
    _warm_up(engine.scheduler, engine.token_ms)
    engine.add(request("offline", [1] * 50, max_tokens=40, xargs={"xllm_class": "offline"}))
    for _ in range(8):
        engine.step()
    engine.add(request("online", [2] * 60, max_tokens=9))
    engine.run(most=300)
    assert engine.streams["offline"] == completion([1] * 50, 40)
    assert engine.streams["online"] == completion([2] * 60, 9)


@BOTH
def test_what_vllm_does_to_requests_between_steps_still_works(base: type, clock: Clock) -> None:
    engine = Engine(build(elastic_class(base), budget=32), clock)
    for index in range(4):
        kind = "offline" if index % 2 else "online"
        engine.add(request(f"r{index}", [index] * 20, max_tokens=9, xargs={"xllm_class": kind}))
    for _ in range(4):
        engine.step()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.step()
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert engine.step() == {}
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    check_kv_books(engine.scheduler)
    for index in range(4):
        assert engine.streams[f"r{index}"] == completion([index] * 20, 9)

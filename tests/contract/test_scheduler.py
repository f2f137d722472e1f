"""Whatever the policy plans, vLLM's scheduler keeps its promises and every request its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request

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
from xllm_scheduler.engine.scheduler import elastic_class

pytestmark = pytest.mark.vllm

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

    def request(self, index: int, now_s: float) -> Request:
        kind = "offline" if self.offline else "online"
        return request(
            f"r{index}",
            self.prompt,
            max_tokens=self.max_tokens,
            xargs={"xllm_class": kind},
            priority=self.priority,
            arrival_s=now_s,
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


def _job(offline: bool) -> st.SearchStrategy[Job]:
    return st.builds(
        Job,
        prompt=_prompts,
        max_tokens=st.integers(1, 40),
        offline=st.just(offline),
        arrives=st.integers(0, 25),
        aborted=st.none() | st.integers(0, 40),
        priority=st.integers(0, 3),
        stop=st.just(()) | st.just((7, 23)),
    )


_pairs = st.tuples(_job(offline=False), _job(offline=True))
_scenarios = st.builds(
    Scenario,
    jobs=st.lists(_pairs, min_size=1, max_size=5).map(lambda pairs: tuple(chain(*pairs))),
    budget=st.sampled_from([8, 16, 40, 256]),
    seqs=st.integers(1, 8),
    blocks=st.sampled_from([25, 32, 60]),
    policy=st.sampled_from(["fcfs", "priority"]),
    token_ms=st.sampled_from([0.05, 1.0, 20.0]),
    warm=st.booleans(),
    ttft_ms=st.sampled_from([50.0, 2000.0]),
    tpot_ms=st.sampled_from([10.0, 100.0]),
)


def _check_promises(engine: Engine, scenario: Scenario) -> None:
    """Offline work makes no online token later than was planned without a recorded reason."""
    names = [f"r{index}" for index in range(len(scenario.jobs))]
    offline = {name for name, job in zip(names, scenario.jobs, strict=True) if job.offline}
    for step in engine.ended:
        took_ms = (step.end_s - step.start_s) * 1e3
        if step.scheduled:
            assert step.plan.late or took_ms <= step.plan.target_ms + 0.01, step
    for name in set(names) - offline:
        times_s = engine.times_s[name]
        timely_s = times_s[0] if times_s else 0.0
        for count, at_s in enumerate(times_s):
            if at_s <= times_s[0] + count * scenario.tpot_ms / 1e3 + 1e-5:
                timely_s = at_s
                continue
            steps = [s for s in engine.ended if timely_s < s.end_s <= at_s]
            # One that lost its KV to vLLM was made late by no step, and steps of online decodes
            # that fill all slots are left to vLLM unplanned.
            lost_kv = any(name not in s.scheduled for s in steps)
            alone = not any(s.scheduled.keys() & offline for s in steps)
            unplanned = alone and any(s.plan.target_ms == math.inf for s in steps)
            assert lost_kv or unplanned or any(s.plan.late for s in steps), (name, count, steps)


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
        warm_up(scheduler, scenario.token_ms)
    engine = Engine(scheduler, clock, scenario.token_ms)
    full = scheduler.max_num_scheduled_tokens
    for step in range(MOST_STEPS):
        for index, job in enumerate(scenario.jobs):
            if job.arrives == step:
                engine.add(job.request(index, clock.now_s))
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
    assert not ours.scheduler._first_token_pending
    if scenario.warm:
        _check_promises(ours, scenario)
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
    warm_up(engine.scheduler, engine.token_ms)
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


@BOTH
def test_the_samples_of_one_prompt_are_requests_of_one_class_with_one_due_time(
    base: type, clock: Clock
) -> None:
    # With n above 1 the engine core gets a request for each sample, with the parent's arguments.
    engine = Engine(build(elastic_class(base), seqs=2), clock)
    for index in range(4):
        engine.add(request(f"{index}_parent", [5] * 17, max_tokens=6, xargs=OFFLINE))
    engine.add(request("online", [6] * 9, arrival_s=clock.now_s))
    records = [engine.scheduler.requests[f"{index}_parent"].xllm for index in range(4)]
    assert len({(r.online, r.arrival_s, r.first_due_s) for r in records}) == 1
    assert len({id(record) for record in records}) == 4
    engine.run()
    for index in range(4):
        assert engine.streams[f"{index}_parent"] == completion([5] * 17, 6)
    assert not engine.scheduler._first_token_pending


@BOTH
def test_what_was_learned_is_saved_when_vllm_shuts_down(
    base: type, clock: Clock, tmp_path: Path
) -> None:
    built = build(elastic_class(base), settings={"profile_dir": str(tmp_path)})
    engine = Engine(built, clock)
    engine.add(request("a", 20, max_tokens=30), request("b", 9, max_tokens=30, xargs=OFFLINE))
    engine.run()
    assert not list(tmp_path.iterdir())
    built.shutdown()
    (saved,) = tmp_path.iterdir()
    again = build(elastic_class(base), settings={"profile_dir": str(tmp_path)})
    assert again.xllm_report().facts["profile"] == str(saved)
    assert again._model.current == built._model.current


def _planned(base: type, clock: Clock, token_ms: float, *requests: Request, **options: Any) -> Any:
    """The steps that these requests take on an engine whose step time is known."""
    engine = Engine(build(elastic_class(base), **options), clock, token_ms)
    warm_up(engine.scheduler, token_ms)
    engine.add(*requests)
    engine.run()
    return [
        (step, (step.end_s - step.start_s) * 1e3)
        for step in engine.ended
        if step.scheduled and step.plan.late is None
    ]


@BOTH
def test_online_decodes_that_take_too_long_alone_are_recorded(base: type, clock: Clock) -> None:
    online = request("online", 4, max_tokens=6, xargs={"xllm_tpot_ms": 10})
    for step, took_ms in _planned(base, clock, 20.0, online, settings={"tpot_ms": 10.0})[1:]:
        assert took_ms <= 10.0, step


@BOTH
@pytest.mark.parametrize("kind", ["online", "offline"])
def test_a_prompt_alone_takes_no_longer_than_planned_without_a_reason(
    base: type, kind: str, clock: Clock
) -> None:
    alone = request("alone", 40, max_tokens=1, xargs={"xllm_class": kind})
    settings = {"ttft_ms": 50.0, "tpot_ms": 10.0}
    for step, took_ms in _planned(base, clock, 1.0, alone, budget=40, settings=settings):
        assert took_ms <= step.plan.target_ms + 0.01, step

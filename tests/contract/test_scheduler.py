"""Whatever the policy plans, vLLM's scheduler keeps its promises and every request its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
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
from xllm_scheduler.engine.elastic import ElasticPolicy
from xllm_scheduler.engine.scheduler import elastic_class

pytestmark = pytest.mark.vllm

OFFLINE = {"xllm_class": "offline"}
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


def _warm_up(scheduler: Any, token_ms: float) -> None:
    for i in range(1, 17):
        shape = StepShape().with_chunk(i * 4, 8 * i)
        for _ in range(i % 4):
            shape = shape.with_chunk(1, 10 * i)
        tokens = shape.prefill_tokens + shape.decodes
        scheduler._model.observe(shape, 5.0 + token_ms * tokens)
    assert scheduler._model.current.ready


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
        _warm_up(scheduler, scenario.token_ms)
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


def _waiting_on_offline_work(
    base: type, clock: Clock, lacking: str, *, preempts: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], float]:
    """Two long offline requests run, and leave an online one without a slot or without KV.

    Returns:
        Whom the plans preempted, and how long the online request waited for its first token.
    """
    if not preempts:
        monkeypatch.setattr(ElasticPolicy, "is_urgent", lambda *args: False)
    clock.now_s = 1000.0
    options: dict[str, Any] = (
        {"seqs": 2, "blocks": 128} if lacking == "slot" else {"seqs": 8, "blocks": 28}
    )
    built = build(elastic_class(base), settings={"ttft_ms": 300.0}, budget=32, **options)
    engine = Engine(built, clock)
    _warm_up(built, engine.token_ms)
    for name, shared in (("large", 1), ("small", 2)):
        prompt = [shared] * (24 if name == "small" else 40)
        engine.add(request(name, prompt, max_tokens=50, xargs=OFFLINE))
    while not all(engine.streams[name] for name in ("large", "small")):
        engine.step()
    arrival_s, xargs = clock.now_s, {"xllm_ttft_ms": 200}
    engine.add(request("online", [3] * 48, max_tokens=6, xargs=xargs, arrival_s=arrival_s))
    engine.run()
    check_kv_books(built)
    for name, prompt, tokens in (
        ("large", [1] * 40, 50),
        ("small", [2] * 24, 50),
        ("online", [3] * 48, 6),
    ):
        assert engine.streams[name] == completion(prompt, tokens)
    return _preempted_by_plan(engine), engine.times_s["online"][0] - arrival_s


def _preempted_by_plan(engine: Engine) -> list[str]:
    return [name for step in engine.ended for name in step.plan.preempt]


@BOTH
@pytest.mark.parametrize("lacking", ["slot", "KV"])
def test_offline_work_is_preempted_for_an_online_request_that_finds_no_room(
    base: type, lacking: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not _can_preempt_in_flight(base):
        pytest.skip("vLLM before 0.26 loses tokens in flight of a preempted request")
    run = partial(_waiting_on_offline_work, base, clock, lacking, monkeypatch=monkeypatch)
    preempted, waited_s = run(preempts=True)
    assert preempted == ["small"], "the one with the least to compute again"
    assert waited_s < 0.2
    preempted, waited_without_s = run(preempts=False)
    assert preempted == []
    assert waited_s < waited_without_s


def _can_preempt_in_flight(base: type) -> bool:
    return base is Scheduler or hasattr(base, "_request_blocks_can_be_freed")


@BOTH
def test_nobody_is_preempted_where_it_would_not_make_enough_room(base: type, clock: Clock) -> None:
    engine = Engine(
        build(elastic_class(base), settings={"ttft_ms": 50.0}, blocks=33, budget=64), clock
    )
    _warm_up(engine.scheduler, engine.token_ms)
    engine.add(request("holds", [1] * 76, max_tokens=16))
    engine.add(request("offline", [2] * 9, max_tokens=12, xargs=OFFLINE))
    while not engine.streams["holds"] or not engine.streams["offline"]:
        engine.step()
    engine.add(request("waits", [3] * 60, max_tokens=2, arrival_s=clock.now_s))
    engine.run()
    assert _preempted_by_plan(engine) == []
    assert engine.streams["offline"] == completion([2] * 9, 12)
    assert engine.streams["waits"] == completion([3] * 60, 2)


@BOTH
def test_a_paused_scheduler_preempts_nobody(base: type, clock: Clock) -> None:
    engine = Engine(build(elastic_class(base), settings={"ttft_ms": 50.0}, seqs=1), clock)
    _warm_up(engine.scheduler, engine.token_ms)
    engine.add(request("offline", [1] * 20, max_tokens=40, xargs=OFFLINE))
    for _ in range(4):
        engine.step()
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    engine.add(request("online", [2] * 20, max_tokens=4, arrival_s=clock.now_s))
    for _ in range(30):
        engine.step()
    assert _preempted_by_plan(engine) == []
    assert len(engine.streams["offline"]) > 20
    assert not engine.streams["online"]
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.run()
    assert engine.streams["offline"] == completion([1] * 20, 40)
    assert engine.streams["online"] == completion([2] * 20, 4)


@BOTH
def test_a_request_that_is_aborted_while_preempted_leaves_nothing_behind(
    base: type, clock: Clock
) -> None:
    engine = Engine(build(elastic_class(base), settings={"ttft_ms": 50.0}, seqs=1), clock)
    _warm_up(engine.scheduler, engine.token_ms)
    engine.add(request("offline", [1] * 20, max_tokens=40, xargs=OFFLINE))
    while not engine.streams["offline"]:
        engine.step()
    one = engine.scheduler.requests["offline"]
    engine.scheduler.running.remove(one)
    engine.scheduler._preempt_request(one, clock.now_s)
    before = len(engine.streams["offline"])
    engine.abort("offline")
    engine.add(request("online", [2] * 20, arrival_s=clock.now_s))
    engine.run()
    check_kv_books(engine.scheduler)
    assert not engine.scheduler._first_token_pending
    assert engine.scheduler.requests == {}
    assert engine.streams["offline"] == completion([1] * 20, 40)[: len(engine.streams["offline"])]
    assert len(engine.streams["offline"]) <= before + 1
    assert engine.streams["online"] == completion([2] * 20, 4)


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


def _session_part(tokens: int, now_s: float, ttft_ms: float, *, more: bool = True) -> Request:
    xargs = {"xllm_ttft_ms": ttft_ms}
    return request(
        "session", [4] * tokens, max_tokens=3, xargs=xargs, arrival_s=now_s, resumable=more
    )


@BOTH
def test_each_part_of_a_streaming_session_has_slos_of_its_own(base: type, clock: Clock) -> None:
    engine = Engine(build(elastic_class(base)), clock)
    engine.add(_session_part(9, clock.now_s, 500.0))
    session = engine.scheduler.requests["session"]
    while session.status.name != "WAITING_FOR_STREAMING_REQ":
        engine.step()
    clock.now_s += 7.0
    began_s = clock.now_s
    engine.scheduler.add_request(_session_part(5, began_s, 800.0))
    assert session.xllm.arrival_s == pytest.approx(began_s)
    assert session.xllm.first_due_s == pytest.approx(began_s + 0.8)
    assert session.xllm.first_token_s is None
    given = len(engine.streams["session"])
    while len(engine.streams["session"]) == given:
        engine.step()
    assert session.xllm.first_token_s == engine.times_s["session"][given]
    while session.status.name != "WAITING_FOR_STREAMING_REQ":
        engine.step()
    engine.abort("session")
    engine.run()
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
    _warm_up(engine.scheduler, token_ms)
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


@BOTH
@pytest.mark.parametrize("more", [True, False], ids=["another part", "the end"])
def test_what_comes_during_a_part_of_a_session_changes_nothing_for_that_part(
    more: bool, base: type, clock: Clock
) -> None:
    engine = Engine(build(elastic_class(base)), clock)
    engine.add(_session_part(9, clock.now_s, 500.0))
    session = engine.scheduler.requests["session"]
    while not engine.streams["session"]:
        engine.step()
    first_token_s = session.xllm.first_token_s
    engine.scheduler.add_request(_session_part(1, clock.now_s, 800.0, more=more))
    assert session.xllm.first_token_s == first_token_s


@BOTH
def test_the_end_of_a_session_is_no_request(base: type, clock: Clock) -> None:
    engine = Engine(build(elastic_class(base)), clock)
    engine.add(_session_part(9, clock.now_s, 500.0))
    session = engine.scheduler.requests["session"]
    while session.status.name != "WAITING_FOR_STREAMING_REQ":
        engine.step()
    engine.scheduler.add_request(_session_part(1, clock.now_s, 500.0, more=False))
    samples = engine.scheduler.xllm_report().samples
    assert [s.value for s in samples if s.name == "scheduler_requests"] == [1, 0]

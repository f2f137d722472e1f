"""Each lever that shapes a step works on vLLM's own scheduler classes and leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from tests.contract.engine import BOTH, OFFLINE, Clock, Engine, build, request
from xllm_plugins.compat import vllm_version
from xllm_plugins.compat.scheduler_levers import Lever, effective_levers
from xllm_plugins.features import Policy
from xllm_plugins.hookspecs import hookimpl
from xllm_plugins.manager import registry
from xllm_scheduler.engine.policy import StepPlan, StepPolicy, StepView
from xllm_scheduler.engine.scheduler import elastic_class
from xllm_scheduler.plugin import POLICY_KIND

pytestmark = pytest.mark.vllm

CAN_CAP = Lever.CHUNK in effective_levers(Scheduler)
needs_cap = pytest.mark.skipif(not CAN_CAP, reason="vLLM before 0.28 cannot cap one chunk")


class Scripted(StepPolicy):
    """Plans what the test says; ``changes`` are those to a plan that changes nothing."""

    def __init__(self) -> None:
        self.changes: dict[str, Any] = {}
        self.view: StepView | None = None

    def plan(self, view: StepView) -> StepPlan:
        self.view = view
        return StepPlan(view.max_tokens)._replace(**self.changes)

    @hookimpl
    def xllm_policies(self) -> list[Policy]:
        return [Policy(POLICY_KIND, "scripted", lambda section: self)]


@pytest.fixture
def script() -> Iterator[Scripted]:
    policy = Scripted()
    registry().hooks.register(policy)
    yield policy
    registry().hooks.unregister(policy)


def _engine(base: type, clock: Clock, **options: Any) -> Engine:
    settings = {"policy": "scripted"}
    return Engine(build(elastic_class(base), settings=settings, **options), clock)


@BOTH
def test_a_held_request_computes_nothing_keeps_its_kv_and_goes_on_in_the_next_step(
    base: type, script: Scripted, clock: Clock
) -> None:
    engine = _engine(base, clock)
    engine.add(request("held", 9, max_tokens=9), request("free", 9, max_tokens=9))
    engine.step()
    manager = engine.scheduler.kv_cache_manager
    blocks = manager.get_block_ids("held")

    script.changes = {"held": frozenset({"held"})}
    assert engine.step() == {"free": 1}
    assert manager.get_block_ids("held") == blocks

    script.changes = {}
    assert engine.step() == {"held": 1, "free": 1}
    engine.run()
    assert engine.streams["held"] == engine.streams["free"]


@BOTH
@needs_cap
def test_a_chunk_cap_binds_a_waiting_and_a_running_request_and_no_other(
    base: type, script: Scripted, clock: Clock
) -> None:
    engine = _engine(base, clock, budget=64)
    engine.add(request("capped", [1] * 30), request("free", [2] * 30))

    script.changes = {"chunk_tokens": {"capped": 7}}
    assert engine.step() == {"capped": 7, "free": 30}
    script.changes = {"chunk_tokens": {"capped": 5}}
    assert engine.step() == {"capped": 5, "free": 1}
    script.changes = {}
    assert engine.step() == {"capped": 18, "free": 1}
    engine.run()


@BOTH
def test_the_token_budget_binds_one_step(base: type, script: Scripted, clock: Clock) -> None:
    engine = _engine(base, clock, budget=64)
    engine.add(request("a", [1] * 20), request("b", [2] * 20))

    script.changes = {"max_tokens": 25}
    assert engine.step() == {"a": 20, "b": 5}
    assert engine.scheduler.max_num_scheduled_tokens == 64
    script.changes = {}
    assert engine.step() == {"a": 1, "b": 15}


@BOTH
def test_a_budget_above_that_of_vllm_is_that_of_vllm(
    base: type, script: Scripted, clock: Clock
) -> None:
    engine = _engine(base, clock, budget=16)
    engine.add(request("a", 40))
    script.changes = {"max_tokens": 1000}
    assert engine.step() == {"a": 16}


@BOTH
def test_a_closed_offline_lane_lets_only_online_requests_in(
    base: type, script: Scripted, clock: Clock
) -> None:
    engine = _engine(base, clock)
    engine.add(request("offline", [1] * 9, xargs=OFFLINE), request("online", [2] * 9))

    script.changes = {"admit_offline": False}
    assert engine.step() == {"online": 9}
    assert engine.scheduler.get_num_unfinished_requests() == 2
    assert engine.scheduler.get_request_counts() == (1, 1)
    script.changes = {}
    assert engine.step() == {"online": 1, "offline": 9}


@BOTH
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_online_requests_are_admitted_and_served_before_offline_ones(
    base: type, policy: str, script: Scripted, clock: Clock
) -> None:
    engine = _engine(base, clock, policy=policy, budget=16)
    engine.add(request("offline", [1] * 12, xargs=OFFLINE, priority=-1))
    engine.add(request("online", [2] * 12))
    assert engine.step() == {"online": 12, "offline": 4}
    engine.add(request("late", [3] * 9))
    assert list(engine.step()) == ["online", "offline", "late"]
    assert list(engine.step())[:2] == ["online", "late"]


@BOTH
def test_the_policy_sees_the_requests_as_vllm_will_schedule_them(
    base: type, script: Scripted, clock: Clock
) -> None:
    engine = _engine(base, clock, budget=16)
    engine.add(
        request("a", [1] * 20, max_tokens=9, xargs=OFFLINE), request("b", [2] * 4, max_tokens=9)
    )
    for _ in range(6):
        scheduled = engine.step()
        assert script.view is not None
        view = script.view
        left = view.max_tokens - view.online.tokens - sum(view.offline.new_tokens)
        assert sum(scheduled[name] for name in view.offline.ids) == sum(view.offline.new_tokens)
        for one in (*view.prefills, *view.waiting):
            expected = min(one.new_tokens, left)
            left -= expected
            assert scheduled.get(one.request_id, 0) == expected
        assert sum(scheduled.values()) == view.max_tokens - left
    assert (view.online.tokens, view.offline.ids) == (1, ["a"])


@BOTH
def test_everything_is_restored_when_vllm_fails_to_schedule(
    base: type, script: Scripted, clock: Clock
) -> None:
    class Failing(base):  # type: ignore[misc]
        fails = True

        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            if self.fails:
                raise RuntimeError("no step")
            return super().schedule(*args, **kwargs)

    engine = _engine(Failing, clock, budget=64)
    engine.add(request("a", [1] * 9, xargs=OFFLINE))
    script.changes = {"max_tokens": 3, "admit_offline": False, "chunk_tokens": {"a": 2}}
    with pytest.raises(RuntimeError, match="no step"):
        engine.step()

    assert engine.scheduler.max_num_scheduled_tokens == 64
    assert bool(engine.scheduler.waiting)
    engine.scheduler.fails = False
    script.changes = {}
    assert engine.step() == {"a": 9}


@BOTH
def test_vllms_own_schedulers_read_every_lever_of_their_version(base: type) -> None:
    expected = {Lever.HOLD, Lever.BUDGET}
    if tuple(map(int, str(vllm_version()).split(".")[:2])) >= (0, 28):
        expected.add(Lever.CHUNK)
    assert effective_levers(base) == expected


def test_a_scheduler_with_a_body_of_its_own_has_only_the_levers_that_it_reads() -> None:
    class Copy(Scheduler):  # type: ignore[misc]
        def schedule(self) -> Any:
            return self.max_num_scheduled_tokens

    class Around(Scheduler):  # type: ignore[misc]
        def schedule(self) -> Any:
            return super().schedule()

    assert effective_levers(Copy) == {Lever.BUDGET}
    assert effective_levers(Around) == effective_levers(Scheduler)


@BOTH
def test_a_held_request_keeps_its_lora_slot(base: type, script: Scripted, clock: Clock) -> None:
    engine = _engine(base, clock)
    engine.scheduler.lora_config = one_slot = SimpleNamespace(max_loras=1)
    engine.add(request("held", 9, lora=1))
    engine.step()

    script.changes = {"held": frozenset({"held"})}
    engine.add(request("other", 9, lora=2), request("same", 9, lora=1))
    assert set(engine.step()) <= {"same"}
    assert engine.scheduler.lora_config is one_slot

    script.changes = {}
    engine.run()
    assert {name: len(tokens) for name, tokens in engine.streams.items()} == dict.fromkeys(
        ("held", "other", "same"), 4
    )

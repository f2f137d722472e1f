"""What the elastic scheduler makes of a request, what it reports, and when it is attached."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from tests.contract.engine import BOTH, OFFLINE, Clock, Engine, build, request
from tests.contract.worker import completion
from xllm_plugins.compat import request_class
from xllm_plugins.config import Mode
from xllm_plugins.errors import NotAvailableError
from xllm_plugins.features import Attachment
from xllm_plugins.status import engine_status
from xllm_scheduler import plugin
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine import scheduler as scheduler_module
from xllm_scheduler.engine.books import is_online, served
from xllm_scheduler.engine.elastic import ElasticPolicy
from xllm_scheduler.engine.policy import StepPlan, StepView
from xllm_scheduler.engine.scheduler import elastic_class

pytestmark = pytest.mark.vllm

SETTINGS = {"ttft_ms": 900.0, "tpot_ms": 90.0, "offline_above_priority": 2}


@pytest.mark.parametrize(
    ("xargs", "priority", "online", "ttft_ms", "tpot_ms"),
    [
        (None, 0, True, 900.0, 90.0),
        (None, 2, True, 900.0, 90.0),
        (None, 3, False, 900.0, 90.0),
        (OFFLINE, 0, False, 900.0, 90.0),
        ({"xllm_class": "online"}, 3, True, 900.0, 90.0),
        ({"xllm_ttft_ms": 500, "xllm_tpot_ms": "40"}, 0, True, 500.0, 40.0),
        ({"foreign": 1}, 0, True, 900.0, 90.0),
    ],
)
def test_a_request_is_served_as_its_arguments_and_priority_say(
    xargs: Mapping[str, Any] | None, priority: int, online: bool, ttft_ms: float, tpot_ms: float
) -> None:
    scheduler = build(elastic_class(Scheduler), settings=SETTINGS)
    one = request("one", xargs=xargs, priority=priority)
    scheduler.add_request(one)
    record = served(one)
    assert record is not None
    service = record.service
    assert (service.online, service.ttft_ms, service.tpot_ms) == (online, ttft_ms, tpot_ms)


@pytest.mark.parametrize("xargs", [{"xllm_class": "batch"}, {"xllm_tpot_ms": -1}])
def test_arguments_that_nobody_refused_before_are_served_as_online_with_a_warning(
    xargs: Mapping[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM has a say in what loggers under its name pass on.
    monkeypatch.setattr(scheduler_module, "logger", logging.getLogger("test"))
    engine = Engine(build(elastic_class(Scheduler)))
    one = request("odd", xargs=xargs, priority=9)
    engine.add(one)
    assert is_online(one)
    assert "odd" in caplog.text
    assert "It is served as online." in caplog.text
    engine.run()
    assert len(engine.streams["odd"]) == 4


@BOTH
def test_a_request_that_came_past_add_request_is_online(base: type, clock: Clock) -> None:
    engine = Engine(build(elastic_class(base)), clock)
    unknown = request("unknown", xargs=OFFLINE)
    engine.streams["unknown"], engine.times_s["unknown"] = [], []
    base.add_request(engine.scheduler, unknown)  # type: ignore[attr-defined]
    engine.add(request("offline", xargs=OFFLINE))
    assert served(unknown) is None
    assert is_online(unknown)
    engine.run()
    assert len(engine.streams["unknown"]) == len(engine.streams["offline"]) == 4


def _counted(engine: Engine, name: str) -> dict[str, float]:
    samples = engine.scheduler.xllm_report().samples
    return {s.labels[0]: s.value for s in samples if s.name == f"scheduler_{name}"}


@BOTH
def test_counts_follow_what_happened(base: type, clock: Clock) -> None:
    engine = Engine(build(elastic_class(base), seqs=2), clock)
    engine.add(request("a"), request("b"), request("c", xargs=OFFLINE))
    engine.step()
    assert _counted(engine, "requests") == {"online": 2, "offline": 1}
    assert _counted(engine, "requests_running") == {"online": 2, "offline": 0}
    assert _counted(engine, "requests_waiting") == {"online": 0, "offline": 1}
    engine.abort("c")
    assert _counted(engine, "requests_waiting") == {"online": 0, "offline": 0}
    engine.run()
    assert _counted(engine, "requests_running") == {"online": 0, "offline": 0}
    assert _counted(engine, "requests") == {"online": 2, "offline": 1}


@BOTH
@pytest.mark.parametrize("kinds", [("offline", "online"), ("online",) * 2])
def test_when_kv_runs_out_an_offline_request_loses_it_first(
    base: type, kinds: tuple[str, str], clock: Clock
) -> None:
    engine = Engine(build(elastic_class(base), blocks=12), clock)
    for index, kind in enumerate(kinds):
        one = request(kind + str(index), [index] * 16, max_tokens=12, xargs={"xllm_class": kind})
        engine.add(one)
        for _ in range(2):
            engine.step()  # both run before blocks lack
    engine.run()
    lost = "offline" if "offline" in kinds else "online"
    assert _counted(engine, "preempted") == {"online": 0, "offline": 0} | {lost: 1}
    for index, kind in enumerate(kinds):
        assert engine.streams[kind + str(index)] == completion([index] * 16, 12)


@BOTH
def test_offline_work_leaves_blocks_for_online_growth(base: type, clock: Clock) -> None:
    engine = Engine(build(elastic_class(base), blocks=12), clock)
    engine.add(request("online", [0] * 16, max_tokens=12))
    engine.add(request("offline", [1] * 16, max_tokens=12, xargs=OFFLINE))
    engine.run()
    assert _counted(engine, "preempted") == {"online": 0, "offline": 0}
    assert engine.streams["offline"] == completion([1] * 16, 12)


@BOTH
def test_held_steps_are_counted(base: type, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    def hold_b(self: ElasticPolicy, view: StepView) -> StepPlan:
        both = len(view.online.due_s) + len(view.offline.ids) > 1
        return StepPlan(view.max_tokens, held=frozenset({"b"}) if both else frozenset())

    monkeypatch.setattr(ElasticPolicy, "plan", hold_b)
    engine = Engine(build(elastic_class(base)), clock)
    engine.add(request("a", max_tokens=5), request("b", max_tokens=5, xargs=OFFLINE))
    engine.run()
    sat_out = sum("a" in step and "b" not in step for step in engine.steps[1:])
    assert sat_out > 0
    assert _counted(engine, "held")["online"] == 0
    assert sat_out <= _counted(engine, "held")["offline"] <= sat_out + engine.depth


def test_what_is_reported_is_what_the_feature_declares(clock: Clock) -> None:
    engine = Engine(build(elastic_class(Scheduler)), clock)
    engine.add(request("a"), request("b", xargs=OFFLINE))
    engine.run()
    declared = {(metric.name, len(metric.labels)) for metric in plugin.FEATURE.metrics}
    report = engine.scheduler.xllm_report()
    assert {(sample.name, len(sample.labels)) for sample in report.samples} == declared
    assert report.facts["steps_learned_from"] > 0
    assert engine_status()["scheduler"]["facts"] == report.facts


@BOTH
def test_a_policy_that_fails_leaves_scheduling_to_vllm_and_says_so(
    base: type, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    def fail(self: ElasticPolicy, view: StepView) -> StepPlan:
        raise ZeroDivisionError("no time")

    monkeypatch.setattr(ElasticPolicy, "plan", fail)
    ours, theirs = Engine(build(elastic_class(base)), clock), Engine(build(base), Clock())
    for engine in (ours, theirs):
        engine.add(request("a", [1] * 40), request("b", [2] * 40, xargs=OFFLINE))
        engine.run()
    assert ours.steps == theirs.steps
    assert ours.streams == theirs.streams
    facts = ours.scheduler.xllm_report().facts
    assert facts["policy_failure"] == "ZeroDivisionError: no time"


def test_vllm_finds_the_scheduler_by_name_on_the_base_that_was_attached_to() -> None:
    plain = build(Scheduler)
    config = plain.vllm_config
    config.scheduler_config.scheduler_cls = plugin.SCHEDULER
    scheduler = config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=plain.kv_cache_config,
        structured_output_manager=plain.structured_output_manager,
        include_finished_set=False,
        log_stats=True,
        block_size=plain.block_size,
    )
    assert type(scheduler) is elastic_class(Scheduler)


def _attachment(own: Any = None, mode: Mode = Mode.AUTO, runner: str = "generate") -> Any:
    scheduler_config = SimpleNamespace(
        scheduler_cls=own, get_scheduler_cls=lambda: own or Scheduler
    )
    return Attachment(
        engine_args=SimpleNamespace(scheduler_cls=own),
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(runner_type=runner), scheduler_config=scheduler_config
        ),
        section=SchedulerSection(mode=mode),
    )


class Own(Scheduler):  # type: ignore[misc]
    """A scheduler that the user brought."""


class Deaf(Scheduler):  # type: ignore[misc]
    """A scheduler that reads no lever."""

    def schedule(self) -> Any:
        return None


@pytest.mark.parametrize(
    ("attachment", "reason"),
    [
        (_attachment(runner="pooling"), "pooling models generate no tokens"),
        (_attachment(own=Own), "Own is kept; scheduler.mode=on wraps it"),
        (_attachment(own="their.Scheduler"), "their.Scheduler is kept"),
        (_attachment(own=Deaf, mode=Mode.ON), "Deaf.schedule() does not read max_num"),
    ],
)
def test_it_stands_back_and_says_why(attachment: Any, reason: str) -> None:
    before = attachment.vllm_config.scheduler_config.scheduler_cls
    with pytest.raises(NotAvailableError) as refusal:
        plugin.attach(attachment)
    assert reason in str(refusal.value)
    assert attachment.vllm_config.scheduler_config.scheduler_cls is before


@pytest.mark.parametrize(
    ("attachment", "base"),
    [
        (_attachment(), Scheduler),
        (_attachment(mode=Mode.ON), Scheduler),
        (_attachment(own=Own, mode=Mode.ON), Own),
    ],
)
def test_it_goes_over_the_class_that_vllm_would_have_used(
    attachment: Any, base: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_class, "install", lambda complete: None)
    assert plugin.attach(attachment) == f"{base.__module__}.{base.__qualname__}"
    assert attachment.vllm_config.scheduler_config.scheduler_cls == plugin.SCHEDULER

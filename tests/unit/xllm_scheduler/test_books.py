"""What the scheduler counts: demand, times to tokens, attainment, and its metrics by name."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugins.latency import StepTime
from xllm_scheduler.classes import Service, ServiceClass
from xllm_scheduler.engine.books import METRICS, Books, Demand, Served, due_s, is_online, served
from xllm_scheduler.engine.policy import Late, StepPlan

TTFT_MS, TPOT_MS = 500.0, 50.0


def request(
    kind: ServiceClass = ServiceClass.ONLINE, arrival_s: float = 10.0, status: str = "RUNNING"
) -> Any:
    return SimpleNamespace(
        num_output_tokens=0,
        status=SimpleNamespace(name=status),
        xllm=Served.of(Service(kind, TTFT_MS, TPOT_MS), arrival_s),
    )


def answered(
    books: Books, first_s: float, last_s: float, tokens: int, status: str = "FINISHED_STOPPED"
) -> Any:
    """An online request that arrived at 10 s and was answered in full."""
    one = request()
    books.now_s, one.num_output_tokens = first_s, 1
    books.first_token(one)
    books.now_s, one.num_output_tokens = last_s, tokens
    one.status.name = status
    books.finished(one)
    return one


def values(books: Books, queues: Any = (), running: Any = ()) -> dict[tuple[str, ...], float]:
    samples = books.samples(queues, running, StepTime(error=0.25))
    return {(s.name.removeprefix("scheduler_"), *s.labels): s.value for s in samples}


def test_a_record_knows_when_the_first_token_is_due() -> None:
    online, offline = request(), request(ServiceClass.OFFLINE)
    assert (online.xllm.first_due_s, online.xllm.tpot_s) == (10.5, 0.05)
    assert offline.xllm.first_due_s == math.inf
    assert (is_online(online), is_online(offline)) == (True, False)


def test_the_next_token_is_due_by_the_first_one_and_the_tokens_since() -> None:
    one = request()
    assert due_s(one) == 10.5
    one.xllm.first_token_s, one.num_output_tokens = 10.25, 4
    assert due_s(one) == pytest.approx(10.25 + 4 * 0.05)


def test_a_request_without_a_record_is_online_and_due_at_once() -> None:
    unknown = SimpleNamespace(num_output_tokens=3)
    assert served(unknown) is None
    assert is_online(unknown)
    assert due_s(unknown) == 0.0


def test_a_first_token_counts_once_and_for_the_class_of_its_request() -> None:
    books = Books()
    one, other = request(), request(ServiceClass.OFFLINE, arrival_s=9.0)
    books.now_s = 10.25
    for _ in range(2):
        books.first_token(one)
        books.first_token(other)
    books.now_s = 99.0
    books.first_token(one)
    found = values(books)
    assert found["ttft_seconds", "online"] == pytest.approx(0.25)
    assert found["ttft_seconds", "offline"] == pytest.approx(1.25)
    assert one.xllm.first_token_s == 10.25


def test_the_time_per_output_token_is_a_mean_over_those_after_the_first() -> None:
    books = Books()
    answered(books, first_s=10.25, last_s=10.65, tokens=11)
    answered(books, first_s=10.25, last_s=10.25, tokens=1)
    found = values(books)
    assert found["tpot_seconds", "online"] == pytest.approx(0.04)
    assert found["requests_finished", "online"] == 2


@pytest.mark.parametrize(
    ("first_s", "last_s", "met"),
    [(10.5, 10.8, 1), (10.51, 10.8, 0), (10.2, 11.3, 0), (10.6, 12.0, 0)],
    ids=["both", "late first token", "slow tokens", "neither"],
)
def test_a_request_is_attained_if_it_met_both_slos(first_s: float, last_s: float, met: int) -> None:
    books = Books()
    answered(books, first_s, last_s, tokens=21)
    found = values(books)
    assert found["slo_met",] == met
    assert (found["attainment_ratio",] == 1.0) is bool(met)


def test_attainment_follows_the_newest_requests() -> None:
    books = Books()
    for _ in range(300):
        answered(books, 11.0, 11.0, tokens=1)
    assert values(books)["attainment_ratio",] < 0.01
    for _ in range(300):
        answered(books, 10.1, 10.1, tokens=1)
    assert values(books)["attainment_ratio",] > 0.99


@pytest.mark.parametrize(
    ("first_s", "last_s", "before_s", "since_s", "expected"),
    [
        (10.4, 11.4, 9.0, 9.0, 1.0),  # met all
        (10.7, 11.0, 0.1, 0.0, 1.0),  # a late first token, of which offline work explains half
        (10.7, 11.0, 0.2, 0.0, 0.95),  # and one that it explains
        (10.4, 11.6, 9.0, 0.1, 1.0),  # 20 tokens, 0.2 s late, and half of that by offline work
        (10.4, 11.6, 0.0, 0.2001, 0.95),
        (10.7, 11.9, 0.3, 0.1, 1.0),  # only one of two explained
        (10.7, 11.9, 0.3, 0.3, 0.95),
    ],
)
def test_only_what_offline_work_cost_counts_against_it(
    first_s: float, last_s: float, before_s: float, since_s: float, expected: float
) -> None:
    books, one = Books(), request()
    books.offline_s, books.now_s, one.num_output_tokens = before_s, first_s, 1
    books.first_token(one)
    books.offline_s, books.now_s, one.num_output_tokens = before_s + since_s, last_s, 21
    one.status.name = "FINISHED_STOPPED"
    books.finished(one)
    assert books.relative_attainment(last_s) == pytest.approx(expected)
    assert books.relative_attainment(last_s + 600.0) == pytest.approx(1.0, abs=1e-4)


def test_an_aborted_request_says_nothing_about_slos() -> None:
    books = Books()
    answered(books, 10.9, 12.0, tokens=5, status="FINISHED_ABORTED")
    found = values(books)
    assert found["requests_finished", "online"] == 0
    assert found["tpot_seconds", "online"] == 0.0
    assert (found["slo_met",], found["attainment_ratio",]) == (0, 1.0)


def test_a_request_that_ended_without_a_token_or_a_record_is_not_counted() -> None:
    books = Books()
    books.finished(request(status="FINISHED_STOPPED"))
    books.finished(SimpleNamespace(num_output_tokens=1))
    assert values(books)["requests_finished", "online"] == 0


def test_an_offline_request_counts_as_finished_but_has_no_slos() -> None:
    books = Books()
    one = request(ServiceClass.OFFLINE, status="FINISHED_LENGTH_CAPPED")
    one.num_output_tokens, books.now_s = 1, 99.0
    books.first_token(one)
    books.finished(one)
    found = values(books)
    assert found["requests_finished", "offline"] == 1
    assert (found["slo_met",], found["attainment_ratio",]) == (0, 1.0)


def test_what_was_counted_is_reported_by_class() -> None:
    books = Books()
    for what, one in (
        ("requests", request()),
        ("held", request(ServiceClass.OFFLINE)),
        ("preempted", request(ServiceClass.OFFLINE)),
        ("preempted", SimpleNamespace()),
    ):
        books.count(what, one)
    found = values(books)
    assert (found["requests", "online"], found["requests", "offline"]) == (1, 0)
    assert (found["held", "online"], found["held", "offline"]) == (0, 1)
    assert (found["preempted", "online"], found["preempted", "offline"]) == (1, 1)


def test_those_that_wait_and_run_are_counted_where_they_are() -> None:
    queues = [SimpleNamespace(count=lambda online: 3 if online else 4)] * 2
    running = [request(), request(ServiceClass.OFFLINE), request(ServiceClass.OFFLINE)]
    found = values(Books(), queues, running)
    assert (found["requests_waiting", "online"], found["requests_waiting", "offline"]) == (6, 8)
    assert (found["requests_running", "online"], found["requests_running", "offline"]) == (1, 2)


def test_planned_steps_and_the_reasons_of_late_ones_are_counted() -> None:
    books = Books()
    books.planned(StepPlan(8, late=Late.FLOOR), took_s=0.5)
    books.planned(StepPlan(8, late=Late.FLOOR), took_s=0.25)
    books.planned(StepPlan(8, target_ms=40.0, planned_ms=10.0), took_s=0.25)
    found = values(books)
    assert (found["steps",], found["policy_seconds",]) == (3, 1.0)
    reasons = {reason: found["late_steps", reason.value] for reason in Late}
    assert reasons == {Late.FLOOR: 2, Late.ONLINE: 0, Late.FIRST_TOKEN: 0}
    assert found["slack_seconds",] == pytest.approx(0.04)
    assert found["budget_used_ratio",] == pytest.approx(0.25)
    assert found["step_time_error_ratio",] == 0.25


@pytest.mark.parametrize("target_ms", [math.inf, 0.0, -3.0])
def test_without_time_that_is_bound_there_is_no_slack_and_no_share(target_ms: float) -> None:
    books = Books()
    books.planned(StepPlan(8, target_ms=target_ms, planned_ms=10.0), took_s=0.0)
    found = values(books)
    assert (found["slack_seconds",], found["budget_used_ratio",]) == (0.0, 0.0)


def test_samples_are_exactly_those_that_are_declared() -> None:
    samples = Books().samples([], [], StepTime())
    declared = {metric.name: metric for metric in METRICS}
    assert len(declared) == len(METRICS)
    assert {sample.name for sample in samples} == declared.keys()
    for name, metric in declared.items():
        labels = [sample.labels for sample in samples if sample.name == name]
        expected: list[tuple[str, ...]] = [()]
        if metric.labels == ("class",):
            expected = [(kind.value,) for kind in ServiceClass]
        elif metric.labels == ("reason",):
            expected = [(reason.value,) for reason in Late]
        assert sorted(labels) == sorted(expected), name


def test_demand_starts_with_the_first_request_and_follows_the_newest() -> None:
    demand = Demand()
    assert (demand.prompt_tokens, demand.output_tokens, demand.rate(5.0)) == (0.0, 0.0, 0.0)
    demand.arrived(100, now_s=1.0)
    demand.finished(50)
    assert (demand.prompt_tokens, demand.output_tokens) == (100.0, 50.0)
    demand.arrived(200, now_s=2.0)
    demand.finished(150)
    assert demand.prompt_tokens == pytest.approx(110.0)
    assert demand.output_tokens == pytest.approx(60.0)


def test_the_rate_is_that_of_arrivals_and_falls_while_none_comes() -> None:
    demand = Demand()
    demand.arrived(10, now_s=1.0)
    demand.arrived(10, now_s=1.5)
    assert demand.rate(1.5) == pytest.approx(2.0)
    demand.arrived(10, now_s=2.5)
    assert demand.rate(2.5) == pytest.approx(1 / (0.5 + 0.2 * 0.5))
    assert demand.rate(12.5) == pytest.approx(0.1)


def test_requests_that_come_at_the_same_time_have_no_infinite_rate() -> None:
    demand = Demand()
    for _ in range(3):
        demand.arrived(10, now_s=1.0)
    assert demand.rate(1.0) < math.inf


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_prompt_blocks_are_those_of_a_mean_prompt(tokens: int, blocks: int) -> None:
    demand = Demand()
    demand.arrived(tokens, now_s=1.0)
    assert demand.prompt_blocks(16) == blocks

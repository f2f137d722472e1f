"""Figures drawn from what became of requests."""

from __future__ import annotations

import math

import pytest

from xllm_scheduler.simulate.outcomes import Outcome, Run
from xllm_scheduler.simulate.table import as_text, ratios
from xllm_scheduler.simulate.workload import Slo

SLO = Slo(ttft_ms=1000.0, tpot_ms=100.0)


def outcome(times_s: list[float], *, online: bool = True, wanted: int | None = None) -> Outcome:
    made = Outcome(
        "r", "s", online, SLO if online else Slo(), 1.0, 50, wanted or len(times_s), prefill="i0"
    )
    for at_s in times_s:
        made.produced(1, at_s)
    return made


def run(*outcomes: Outcome, offline_tokens: int = 0, seconds: float = 10.0) -> Run:
    return Run(outcomes, [], seconds, 0, {}, 0, offline_tokens)


def test_ttft_tpot_and_the_longest_gap_are_the_clients() -> None:
    one = outcome([1.5, 1.6, 1.9])
    assert one.ttft_ms == pytest.approx(500.0)
    assert one.tpot_ms == pytest.approx(200.0)
    assert one.longest_gap_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("times_s", "wanted", "met"),
    [
        ([2.0, 2.09], 2, True),
        ([2.001, 2.002], 2, False),
        ([1.5, 1.601], 2, False),
        ([1.5], 1, True),
        ([1.5, 1.6], 3, False),
        ([], 1, False),
    ],
)
def test_both_slos_have_to_be_met_by_a_whole_answer(
    times_s: list[float], wanted: int, met: bool
) -> None:
    assert outcome(times_s, wanted=wanted).met is met


def test_a_summary_counts_by_class() -> None:
    good, late = outcome([1.5, 1.55]), outcome([9.0, 9.1])
    batch = outcome([2.0, 8.0, 8.5], online=False)
    found = run(good, late, batch, offline_tokens=53).summary()
    assert (found.online, found.attainment, found.goodput_s) == (2, 0.5, 0.1)
    assert (found.offline_finished, found.offline_tokens_s) == (1, 0.3)
    assert found.offline_total_tokens_s == 5.3
    assert found.longest_offline_wait_s == 6.0
    assert found.online_tokens_s == 0.4


def test_an_offline_request_that_is_still_waiting_counts_until_the_end() -> None:
    assert run(outcome([], online=False, wanted=5)).summary().longest_offline_wait_s == 9.0


def test_without_online_requests_there_is_no_attainment() -> None:
    found = run(outcome([2.0], online=False)).summary()
    assert math.isnan(found.attainment)
    assert "attainment" not in as_text({"run": found})


def test_ratios_are_of_the_second_over_the_first() -> None:
    first = run(outcome([1.5, 1.55]), outcome([9.0, 9.1])).summary()
    second = run(outcome([1.5, 1.55]), outcome([1.6, 1.65])).summary()
    assert ratios(first, second) == {
        "attainment": 2.0,
        "goodput": 2.0,
        "online tokens": 1.0,
    }

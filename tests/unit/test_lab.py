"""The pure parts of the benchmarks' load generator."""

import itertools
import subprocess
import sys

import pytest

from benchmarks.lab import machine
from benchmarks.lab.results import (
    Percentiles,
    Record,
    RequestClass,
    Run,
    Slo,
    bootstrap_share,
    output_tokens_in,
    percentiles,
    prompt_tokens_in,
    summarize,
)
from benchmarks.lab.workload import (
    Bursts,
    OfflineLoad,
    OnlineLoad,
    offline_backlog,
    online_asks,
)
from benchmarks.speculation import claims

SLO = Slo(ttft_ms=1000, tpot_ms=100)


def online(*moments: float, arrival_s: float = 0.0, **changes: object) -> Record:
    return record(RequestClass.ONLINE, *moments, arrival_s=arrival_s, **changes)


def offline(*moments: float, arrival_s: float = 0.0, **changes: object) -> Record:
    return record(RequestClass.OFFLINE, *moments, arrival_s=arrival_s, **changes)


def record(
    request_class: RequestClass, *moments: float, arrival_s: float, **changes: object
) -> Record:
    """A request that received one token at each moment."""
    tokens = tuple(zip(moments, itertools.count(1), strict=False))
    end_s = moments[-1] if moments else arrival_s
    return Record(request_class, arrival_s, **{"end_s": end_s, "tokens": tokens, **changes})  # type: ignore[arg-type]


def test_ttft_runs_from_arrival_and_tpot_from_the_first_token() -> None:
    one = online(1.5, 1.6, 1.9, arrival_s=1.0)
    assert one.ttft_ms == pytest.approx(500)
    assert one.tpot_ms == pytest.approx(200)


def test_tpot_counts_tokens_that_came_together() -> None:
    one = Record(RequestClass.ONLINE, 0.0, 1.0, tokens=((0.5, 1), (0.8, 3), (1.0, 6)))
    assert one.tpot_ms == pytest.approx(100)


@pytest.mark.parametrize(
    ("request_", "meets"),
    [
        (online(1.0, 1.05), True),
        (online(1.001, 1.05), False),
        (online(0.5, 0.7), False),
        (online(0.5), True),
        (online(), False),
        (online(0.5, 0.55, finished=False), False),
        (online(0.5, 0.55, error="reset"), False),
    ],
    ids=["in time", "late", "slow", "one token", "no token", "cut off", "failed"],
)
def test_a_request_meets_its_slo_only_whole_in_time_and_at_pace(
    request_: Record, meets: bool
) -> None:
    assert request_.meets(SLO) is meets


def test_attainment_counts_failures_as_missed_and_ignores_arrivals_after_the_window() -> None:
    records = (
        online(0.5, 0.55),
        online(0.5, 0.55, error="status 500"),
        online(9.9, arrival_s=9.0),
        online(11.1, arrival_s=11.0),
    )
    summary = summarize([Run(records, window_s=10)], SLO)
    assert (summary.online_n, summary.online_failed) == (3, 1)
    assert summary.attainment == pytest.approx(2 / 3)


def test_runs_are_pooled_over_the_sum_of_their_windows() -> None:
    runs = [
        Run((offline(1, 2), online(0.1)), window_s=4),
        Run((offline(1, 2, 3), online(2.0)), window_s=6),
    ]
    summary = summarize(runs, SLO)
    assert summary.window_s == 10
    assert summary.offline_output_tok_s == pytest.approx(0.5)
    assert summary.attainment == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("moments", "inside"),
    [((), 0), ((-2, -1), 0), ((-1, 0, 1), 2), ((8, 9, 10, 11), 2), ((-1, 5, 12), 1)],
)
def test_only_tokens_received_inside_the_window_count(
    moments: tuple[float, ...], inside: int
) -> None:
    assert output_tokens_in(offline(*moments), end_s=10) == inside


@pytest.mark.parametrize(("first_s", "counted"), [(-0.1, 0), (0.0, 70), (9.9, 70), (10.0, 0)])
def test_uncached_prompt_tokens_count_where_the_first_token_came(
    first_s: float, counted: int
) -> None:
    one = offline(first_s, 20, prompt_tokens=100, cached_tokens=30)
    assert prompt_tokens_in(one, end_s=10) == counted


@pytest.mark.parametrize(
    ("one", "longest_s"),
    [
        (offline(2, 5, 6, arrival_s=1), 3),
        (offline(-3, 4, 6, arrival_s=-9), 4),
        (offline(end_s=30, finished=False, arrival_s=4), 6),
        (offline(14, arrival_s=12), 0),
    ],
    ids=["between tokens", "only its part inside", "until the window ends", "after the window"],
)
def test_longest_wait_is_the_longest_time_without_a_token_in_the_window(
    one: Record, longest_s: float
) -> None:
    assert one.longest_wait_s(window_s=10) == pytest.approx(longest_s)


def test_percentiles_leave_out_what_is_missing() -> None:
    assert percentiles([None, *range(101)]) == Percentiles(50, 90, 99)
    assert percentiles([None]) == Percentiles(None, None, None)


def test_bootstrap_interval_matches_the_normal_approximation_and_closes_on_certainty() -> None:
    low, high = bootstrap_share([True] * 300 + [False] * 100)
    assert low == pytest.approx(0.75 - 1.96 * (0.75 * 0.25 / 400) ** 0.5, abs=0.005)
    assert high == pytest.approx(0.75 + 1.96 * (0.75 * 0.25 / 400) ** 0.5, abs=0.005)
    assert bootstrap_share([True] * 5) == (1.0, 1.0)


def test_a_seed_fixes_the_requests_and_no_two_prompts_start_alike() -> None:
    load = OnlineLoad(requests=50, rate=0.5)
    assert online_asks(load, seed=1) == online_asks(load, seed=1)
    assert online_asks(load, seed=1) != online_asks(load, seed=2)
    batch = [ask.prompt for ask in itertools.islice(offline_backlog(OfflineLoad(1), 1), 50)]
    prompts = batch + [ask.prompt for _, ask in online_asks(load, seed=1)]
    assert len({tuple(prompt.split()[:8]) for prompt in prompts}) == 100


def test_prompts_and_answers_are_as_long_as_the_load_says() -> None:
    asks = [ask for _, ask in online_asks(OnlineLoad(requests=200, rate=1.0), seed=0)]
    assert {40 <= len(ask.prompt.split()) <= 160 for ask in asks} == {True}
    assert {16 <= ask.max_tokens <= 64 for ask in asks} == {True}


def test_tasks_are_asked_for_by_a_seed() -> None:
    load = OnlineLoad(requests=60, rate=1.0, tasks=True)
    prompts = [ask.prompt for _, ask in online_asks(load, seed=0)]
    assert prompts == [ask.prompt for _, ask in online_asks(load, seed=0)]
    assert {prompt.split()[0] for prompt in prompts} == {
        "Rename",
        "Summarise",
        "Tell",
        "Answer",
        "$",
    }


def test_speculation_is_held_against_the_best_of_the_others_in_every_cell() -> None:
    cells = [("chat", 1), ("chat", 4)]
    speeds = {"none": (10, 20), "ngram": (5, 40), "suffix": (20, 10), "ours": (20, 80)}
    rates = {
        system: {cell: [float(speed)] for cell, speed in zip(cells, both, strict=True)}
        for system, both in speeds.items()
    }
    assert claims(rates) == {
        "ours is 2.828 of ngram, the best of the others on the geometric mean, at least 1.1": True,
        "ours is at least 0.97 of the better of ngram and suffix in every cell: 1.414 (geometric "
        "mean), at worst 1.000 (chat, batch 1), less in 0 of 2": True,
        "ours is at least 0.98 of none in every cell: 2.828 (geometric mean), at worst 2.000 "
        "(chat, batch 1), less in 0 of 2": True,
    }
    assert claims({"none": rates["none"]}) == {}


@pytest.mark.parametrize(
    ("ours", "met"), [((5, 40), [False, False, False]), ((12, 39), [True] * 3)]
)
def test_speculation_that_falls_behind_is_told(ours: tuple[int, int], met: list[bool]) -> None:
    cells = [("chat", 1), ("chat", 4)]
    speeds = {"none": (10, 20), "ngram": (10, 35), "ours": ours}
    rates = {
        system: {cell: [float(speed)] for cell, speed in zip(cells, both, strict=True)}
        for system, both in speeds.items()
    }
    assert list(claims(rates).values()) == met


def test_a_drafting_model_is_held_against_its_fixed_lengths_alone() -> None:
    rates = {name: {("chat", 1): [speed]} for name, speed in DRAFTING.items()}
    (claim,) = claims(rates)
    assert claim.startswith("ours is 0.800 of draft 2, the best of the others")
    assert not claims(rates)[claim]


DRAFTING = {"none": 20.0, "draft 1": 5.0, "draft 2": 10.0, "ours": 8.0}


def test_arrivals_keep_the_rate_inside_and_outside_bursts() -> None:
    load = OnlineLoad(requests=8000, rate=0.5, bursts=Bursts(rate=2.0, length_s=10, period_s=40))
    times = [at_s for at_s, _ in online_asks(load, seed=3)]
    bursting = sum(at_s % 40 < 10 for at_s in times)
    assert bursting / (times[-1] / 4) == pytest.approx(2.0, rel=0.05)
    assert (len(times) - bursting) / (times[-1] * 3 / 4) == pytest.approx(0.5, rel=0.05)


def test_a_child_that_has_ended_is_not_taken_for_others() -> None:
    before_s = machine._cpu_seconds()[2]
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert machine._cpu_seconds()[2] - before_s > 0.4

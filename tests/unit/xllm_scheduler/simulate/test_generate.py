"""Generated requests have the rate, burstiness and lengths that are asked for."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest

from xllm_plugins.errors import ConfigError
from xllm_scheduler.simulate.generate import Arrivals, Lengths, conversations, drawn, requests
from xllm_scheduler.simulate.workload import Ask

HOURS_S = 40_000.0


def gaps(arrivals: Arrivals) -> list[float]:
    times = arrivals.times(random.Random(1), HOURS_S)
    return [later - earlier for earlier, later in pairwise(times)]


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_coefficient_of_variation(burstiness: float) -> None:
    found = gaps(Arrivals(2.0, burstiness))
    assert statistics.fmean(found) == pytest.approx(0.5, rel=0.05)
    variation = statistics.stdev(found) / statistics.fmean(found)
    assert variation == pytest.approx(burstiness, rel=0.05)


def test_a_diurnal_rate_swings_around_its_mean() -> None:
    arrivals = Arrivals(2.0, 1.0, diurnal=0.8, period_s=4000.0)
    times = arrivals.times(random.Random(1), HOURS_S)
    assert len(times) == pytest.approx(2.0 * HOURS_S, rel=0.03)
    day = [t % 4000.0 for t in times]
    first, second = sum(t < 2000.0 for t in day), sum(t >= 2000.0 for t in day)
    # The mean of the sine over its half is 2 / pi, so the halves are 1 + 0.51 to 1 - 0.51.
    assert first / second == pytest.approx(1.509 / 0.491, rel=0.05)
    assert times == sorted(times)


def test_lengths_have_the_mean_and_the_bound() -> None:
    rng = random.Random(1)
    found = [Lengths(500.0, 1.0).draw(rng) for _ in range(20_000)]
    assert statistics.fmean(found) == pytest.approx(500.0, rel=0.05)
    assert {Lengths(500.0, 1.0, most=400).draw(rng) > 400 for _ in range(1000)} == {False}
    assert {Lengths(7.0).draw(rng) for _ in range(10)} == {7}


def test_the_seed_decides_everything() -> None:
    def made(seed: int) -> list[Ask]:
        arrivals = Arrivals(1.0, 2.0)
        return requests(arrivals, Lengths(100, 1), Lengths(10, 1), seconds=100.0, seed=seed)

    assert made(3) == made(3)
    assert made(3) != made(4)


def test_lengths_of_a_trace_can_have_other_times() -> None:
    trace = [Ask(0.0, 10, 1, (5,)), Ask(9.0, 20, 2)]
    found = drawn(trace, Arrivals(1.0), seconds=100.0, seed=0)
    assert [a.prompt_tokens for a in found[:4]] == [10, 20, 10, 20]
    assert found[0].hash_ids == (5,)
    assert found[-1].at_s < 100.0


def test_conversations_have_turns_and_time_to_think() -> None:
    sessions = conversations(
        Arrivals(1.0), Lengths(4.0), Lengths(50.0), Lengths(20.0), 5.0, seconds=2000.0, seed=0
    )
    assert {len(session.turns) for session in sessions} == {4}
    thinks = [turn.think_s for session in sessions for turn in session.turns]
    assert statistics.fmean(thinks) == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rate": 0.0}, "arrivals.rate is 0.0; allowed are numbers above 0"),
        ({"rate": 1.0, "burstiness": float("inf")}, "arrivals.burstiness is inf"),
        ({"rate": 1.0, "diurnal": 1.5}, "arrivals.diurnal is 1.5; allowed are numbers from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Arrivals(**values)

"""A fetch is made only where it beats computing, and a tier that turns slow is left alone."""

from __future__ import annotations

import pytest

from xllm_kv.prices import PROBE_S, Prices, Run

MIB = 1 << 20


def prices(**guesses: tuple[float, float]) -> Prices:
    return Prices(guesses or {"host": (1.0, 1.0), "disk": (5.0, 0.1)})


def test_a_fetch_takes_its_latency_and_its_bytes_over_the_speed() -> None:
    known = prices()
    assert known.fetch_ms("host", 10 * MIB) == pytest.approx(11.0)
    assert known.fetch_ms("disk", 10 * MIB) == pytest.approx(105.0)


def test_what_is_under_way_is_waited_for() -> None:
    known = prices()
    known.began("host", 5 * MIB)
    assert known.fetch_ms("host", 10 * MIB) == pytest.approx(16.0)
    known.ended("host", 5 * MIB, 0.006)
    assert known.fetch_ms("host", 10 * MIB) == pytest.approx(11.0)


@pytest.mark.parametrize(("ms", "tokens"), [(2.0, 128), (0.05, 0)])
def test_it_is_fetched_where_that_beats_computing(ms: float, tokens: int) -> None:
    fetch = prices().choose([Run("host", 128, 10 * MIB)], lambda count: ms * count, 0.0)
    assert fetch.tokens == tokens


def test_the_part_that_pays_is_fetched() -> None:
    runs = [Run("host", 128, 10 * MIB), Run("host", 128, 10 * MIB), Run("disk", 128, 10 * MIB)]
    fetch = prices().choose(runs, lambda count: 0.5 * count, 0.0)
    assert fetch.tokens == 256
    assert fetch.predicted_ms == pytest.approx(21.0)
    assert fetch.deadline_ms == pytest.approx(42.0)


def test_what_is_behind_a_slow_part_can_pay_for_it() -> None:
    runs = [Run("disk", 128, 10 * MIB), Run("host", 1280, 100 * MIB)]
    assert prices().choose(runs, lambda count: 0.5 * count, 0.0).tokens == 1408


def test_a_tier_that_turns_slow_is_left_alone_but_looked_at_and_comes_back() -> None:
    known, runs = prices(), [Run("host", 128, 10 * MIB)]

    def chosen(now_s: float) -> tuple[int, str | None]:
        fetch = known.choose(runs, lambda count: 0.5 * count, now_s)
        return fetch.tokens, fetch.probe

    assert chosen(0.0) == (128, None)
    known.late("host")
    assert chosen(1.0) == (0, None)
    assert chosen(1.0 + PROBE_S) == (0, "host")
    assert chosen(2.0 + PROBE_S) == (0, None)
    known.ended("host", 10 * MIB, 0.0, ok=False)
    assert chosen(2.0 + PROBE_S) == (0, None)
    known.ended("host", MIB, 0.002)
    assert chosen(3.0 + PROBE_S) == (128, None)
    counts = known.counts["host"]
    assert (counts.won_tokens, counts.refused_tokens, counts.late) == (256, 512, 1)


def test_one_slow_fetch_is_enough_and_one_fast_block_brings_it_back() -> None:
    known, runs = prices(), [Run("host", 1280, 100 * MIB)]

    def chosen() -> int:
        return known.choose(runs, lambda count: 0.5 * count, 0.0).tokens

    for _ in range(20):
        known.ended("host", 100 * MIB, 0.1)
    assert chosen() == 1280
    known.ended("host", 100 * MIB, 1.0)
    assert known.fetch_ms("host", 100 * MIB) == pytest.approx(1000.0, rel=0.1)
    assert chosen() == 0
    known.ended("host", 5 * MIB, 0.005)
    assert known.fetch_ms("host", 100 * MIB) == pytest.approx(100.0, rel=0.2)
    assert chosen() == 1280


def test_what_a_tier_has_yet_to_say_is_not_counted() -> None:
    known = prices()
    known.choose([Run("host", 128, MIB)], lambda count: 1.0 * count, 0.0, counted=False)
    assert known.counts["host"].won_tokens == 0


def test_a_tier_misses_what_neither_it_nor_one_before_it_holds() -> None:
    known = prices()
    assert list(known.counts) == ["host", "disk"]
    known.missed([Run("disk", 128, MIB), Run("host", 256, 2 * MIB)], 1024)
    known.missed([], 16)
    assert [known.counts[tier].missed_tokens for tier in known.counts] == [784, 656]


def test_a_fetch_that_failed_teaches_no_speed() -> None:
    known = prices()
    before = known.fetch_ms("host", MIB)
    known.ended("host", MIB, 100.0, ok=False)
    assert known.fetch_ms("host", MIB) == before
    assert known.counts["host"].errors == 1


def test_neither_latency_nor_speed_is_ever_negative() -> None:
    known = prices()
    for mib, ms in ((64, 1.0), (1, 60.0), (64, 1.0), (1, 50.0)):
        known.ended("host", mib * MIB, ms / 1e3)
    assert 0.0 <= known.fetch_ms("host", 0) <= known.fetch_ms("host", 640 * MIB)

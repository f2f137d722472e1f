"""The search for the highest rate."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from xllm_scheduler.simulate.outcomes import Spread, Summary
from xllm_scheduler.simulate.sweep import highest_rate

NOTHING = Spread.of([])


def cluster(capacity: float, tried: list[float]) -> Callable[[float], Summary]:
    """Serves all up to its capacity, and half beyond it."""

    def run(factor: float) -> Summary:
        tried.append(factor)
        met = 1.0 if factor <= capacity else 0.5
        return Summary(10, met, 1.0, NOTHING, NOTHING, 0.0, 0, 0.0, 0.0, 0.0, 0.0, 10.0)

    return run


@pytest.mark.parametrize("capacity", [0.013, 0.7, 1.0, 1.9, 37.0])
def test_it_comes_close_from_below(capacity: float) -> None:
    tried: list[float] = []
    best, points = highest_rate(cluster(capacity, tried), precision=0.02)
    assert capacity / 1.02 <= best <= capacity
    assert [p.factor for p in points] == sorted(tried)
    assert len(tried) < 20


def test_a_cluster_that_serves_nothing_has_rate_0() -> None:
    best, points = highest_rate(cluster(0.0, []))
    assert best == 0.0
    assert points

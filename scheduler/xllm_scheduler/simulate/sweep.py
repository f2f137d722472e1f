"""Finds the highest rate that a cluster serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xllm_scheduler.simulate.outcomes import Summary

_GROWTH = 2.0
_MOST_DOUBLINGS = 12


@dataclass(frozen=True)
class Point:
    """One rate that was tried.

    Attributes:
        factor: times the scenario's rate.
        summary: what came of it.
    """

    factor: float
    summary: Summary


def highest_rate(
    run: Callable[[float], Summary],
    *,
    attainment: float = 0.9,
    precision: float = 0.02,
) -> tuple[float, list[Point]]:
    """By doubling or halving first, then by bisection.

    Args:
        run: simulates the scenario at so many times its rate.
        attainment: what has to be reached.
        precision: the relative width at which the search ends.

    Returns:
        The highest factor that reached it, 0 if none did, and all that was tried, by factor.
    """
    tried: dict[float, Summary] = {}

    def reaches(factor: float) -> bool:
        tried[factor] = run(factor)
        return tried[factor].attainment >= attainment

    low, high = 0.0, 1.0
    if reaches(high):
        for _ in range(_MOST_DOUBLINGS):
            low, high = high, high * _GROWTH
            if not reaches(high):
                break
    else:
        for _ in range(_MOST_DOUBLINGS):
            candidate = high / _GROWTH
            if reaches(candidate):
                low = candidate
                break
            high = candidate
    while low and high - low > precision * low:
        middle = (low + high) / 2.0
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return low, [Point(factor, tried[factor]) for factor in sorted(tried)]

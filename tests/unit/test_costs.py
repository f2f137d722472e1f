"""Step costs: medians that a stall does not move and an alternation does not split."""

import pytest

from benchmarks.lab.costs import BLOCK_STEPS, Comparison, StepCost, median_of_blocks


def test_a_cost_that_alternates_counts_by_its_mean() -> None:
    assert median_of_blocks([1.0, 3.0] * BLOCK_STEPS) == 2.0


def test_a_stall_does_not_count() -> None:
    values = [1.0] * (5 * BLOCK_STEPS)
    values[7] = 1000.0
    assert median_of_blocks(values) == 1.0


def test_a_rest_is_dropped() -> None:
    assert median_of_blocks([1.0] * BLOCK_STEPS + [9.0] * (BLOCK_STEPS - 1)) == 1.0


def test_less_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="9 steps"):
        median_of_blocks([1.0] * 9)


def test_a_ratio_counts_for_the_same_work_only() -> None:
    plain = StepCost(schedule_us=200.0, update_us=100.0, requests=64.0)
    ours = StepCost(schedule_us=220.0, update_us=150.0, requests=62.0, planner_us=15.0)
    one = Comparison(plain, ours)
    assert one.ratio == pytest.approx(1.1)
    assert one.update_ratio == pytest.approx(1.5)
    assert one.alike(0.05)
    assert not one.alike(0.03)

"""What a scheduler's steps cost, beside what vLLM's cost that schedule the same."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_STEPS = 10  # a planner may do its work in every second step only


def median_of_blocks(values: Sequence[float]) -> float:
    """The median over blocks of ``BLOCK_STEPS`` steps of the mean in each; a rest is dropped.

    Raises:
        ValueError: there is not one whole block.
    """
    blocks = len(values) // BLOCK_STEPS
    if not blocks:
        raise ValueError(f"{len(values)} steps; at least {BLOCK_STEPS} are needed.")
    return statistics.median(
        statistics.fmean(values[i * BLOCK_STEPS : (i + 1) * BLOCK_STEPS]) for i in range(blocks)
    )


@dataclass(frozen=True)
class StepCost:
    """One scheduler's typical step.

    Attributes:
        schedule_us: of ``schedule()``.
        update_us: of ``update_from_output()``.
        requests: how many requests a step computes.
        planner_us: how much of ``schedule_us`` is planning; 0 for vLLM's own.
    """

    schedule_us: float
    update_us: float
    requests: float
    planner_us: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """One scheduler beside vLLM's, whose steps took turns with its own."""

    plain: StepCost
    ours: StepCost

    @property
    def ratio(self) -> float:
        """How many times vLLM's ``schedule()`` ours costs."""
        return self.ours.schedule_us / self.plain.schedule_us

    @property
    def update_ratio(self) -> float:
        """How many times vLLM's ``update_from_output()`` ours costs."""
        return self.ours.update_us / self.plain.update_us

    def alike(self, tolerance: float) -> bool:
        """Whether both computed as many requests, but for a share: else a ratio says nothing."""
        return abs(self.ours.requests / self.plain.requests - 1.0) <= tolerance

"""What was drafted and what came of it, counted by drafter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xllm_spec_decode.books import COUNTERS
from xllm_spec_decode.compiled import compiled
from xllm_spec_decode.drafters import Ints


class Tally:
    """Counts by drafter.

    Attributes:
        failed: why drafters were switched off.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._steps = np.zeros(2, np.int64)  # that said something; that verified drafts
        self._counts = np.zeros((len(COUNTERS), len(names)), np.int64)
        self.failed: dict[str, str] = {}

    def add(self, drafted: Ints, said: Ints, drafter: Ints) -> None:
        """Count a step: for each request the tokens drafted and said, and whose draft it had."""
        _add(drafted, said, drafter, self._steps, self._counts)

    def facts(self) -> dict[str, Any]:
        """The counts in plain types."""
        steps, drafting_steps = self._steps.tolist()
        counts = {
            name: dict(zip(self._names, many, strict=True))
            for name, many in zip(COUNTERS, self._counts.tolist(), strict=True)
        }
        return {
            "steps": steps,
            "drafting_steps": drafting_steps,
            **counts,
            "failed": dict(self.failed),
        }


@compiled
def _add(drafted: Ints, said: Ints, drafter: Ints, steps: Ints, counts: Ints) -> None:
    speaking = drafting = False
    for i in range(len(drafted)):
        speaking = speaking or said[i] > 0
        if drafted[i]:
            drafting = True
            counts[0, drafter[i]] += 1
            counts[1, drafter[i]] += drafted[i]
            counts[2, drafter[i]] += max(said[i] - 1, 0)
    steps[0] += speaking
    steps[1] += drafting

"""What was drafted and what came of it: metrics, and facts for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xllm_plugins.metrics import Metric, Sample
from xllm_plugins.status import Report

if TYPE_CHECKING:
    from xllm_spec_decode.drafters import Ints

_COUNTERS = {
    "drafts": "Drafts that were verified.",
    "drafted": "Their tokens.",
    "accepted": "Of those the ones that the model said too.",
}
METRICS = (
    Metric("spec_decode_steps", "counter", "Engine steps that said something."),
    Metric("spec_decode_drafting_steps", "counter", "Of those the ones that verified drafts."),
    *(
        Metric(f"spec_decode_{name}", "counter", doc, ("drafter",))
        for name, doc in _COUNTERS.items()
    ),
    Metric(
        "spec_decode_acceptance",
        "gauge",
        "Chance of a draft's first token, used or not.",
        ("drafter",),
    ),
    Metric("spec_decode_token_ms", "gauge", "What one more drafted token adds to a step, ms."),
)


class Books:
    """Counts by drafter.

    Attributes:
        failed: why drafters were switched off.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._counts = {name: np.zeros(len(names), np.int64) for name in _COUNTERS}
        self._steps = self._drafting_steps = 0
        self.failed: dict[str, str] = {}

    def add(self, drafted: Ints, said: Ints, drafter: Ints) -> None:
        """Count a step: for each request the tokens drafted and said, and whose draft it had."""
        self._steps += bool(said.any())
        with_draft = np.flatnonzero(drafted)
        if not len(with_draft):
            return
        self._drafting_steps += 1
        accepted = np.maximum(said[with_draft] - 1, 0)
        for name, many in (
            ("drafts", np.ones_like(accepted)),
            ("drafted", drafted[with_draft]),
            ("accepted", accepted),
        ):
            np.add.at(self._counts[name], drafter[with_draft], many)

    def facts(self) -> dict[str, Any]:
        """The counts in plain types."""
        counts = {
            name: dict(zip(self._names, many.tolist(), strict=True))
            for name, many in self._counts.items()
        }
        return {
            "steps": self._steps,
            "drafting_steps": self._drafting_steps,
            **counts,
            "failed": dict(self.failed),
        }


def report_of(facts: Mapping[str, Any]) -> Report:
    """A worker's facts as samples and facts."""
    samples = [
        Sample("spec_decode_steps", facts["steps"]),
        Sample("spec_decode_drafting_steps", facts["drafting_steps"]),
        Sample("spec_decode_token_ms", facts["step_ms"]["drafted_token"]),
    ]
    samples += [
        Sample(f"spec_decode_{name}", value, (drafter,))
        for name in (*_COUNTERS, "acceptance")
        for drafter, value in facts[name].items()
    ]
    return Report(samples, facts)

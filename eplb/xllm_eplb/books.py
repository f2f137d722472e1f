"""What a process has decided and seen, as metrics and as facts for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xllm_eplb.phases import PHASES
from xllm_eplb.policy import Decision, Outcome
from xllm_eplb.search import Floats
from xllm_plugins.metrics import Metric, Sample
from xllm_plugins.status import Report

METRICS = (
    Metric("eplb_plans", "counter", "Rearrangements that were decided on."),
    Metric("eplb_refused", "counter", "Those whose statistics could not be used."),
    Metric("eplb_moves", "counter", "Experts whose weights some device received."),
    Metric("eplb_moved_bytes", "counter", "Their weights."),
    Metric("eplb_layers", "counter", "Layers decided on, by what was decided.", ("outcome",)),
    Metric("eplb_plan_s", "counter", "Seconds that planning took."),
    Metric("eplb_stall_s", "counter", "Seconds that the engine stood still to rearrange."),
    Metric("eplb_longest_stall_s", "gauge", "The longest of these."),
    Metric("eplb_layer_moves", "counter", "Experts of a layer that moved.", ("layer",)),
    Metric("eplb_measured", "gauge", "Max/mean device load in the last window.", ("layer",)),
    Metric("eplb_imbalance", "gauge", "Expected max/mean device load of a layer.", ("layer",)),
    Metric("eplb_phase_steps", "counter", "Steps of the windows, by phase.", ("phase",)),
    Metric(
        "eplb_phase_measured",
        "gauge",
        "Max/mean device load in the last window's steps of a phase.",
        ("phase", "layer"),
    ),
    Metric(
        "eplb_phase_imbalance",
        "gauge",
        "Expected max/mean device load of a layer in the steps of a phase.",
        ("phase", "layer"),
    ),
)


@dataclass
class PhaseBooks:
    """What is kept of the steps of one phase, as in :class:`Books`."""

    steps: int = 0
    measured: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)


@dataclass
class Books:
    """What a process has decided so far, in plain types, to travel between processes.

    Attributes:
        outcomes: layers by what was decided, over all plans.
        layer_outcomes: of the last plan, by layer.
        layer_moves: experts moved so far, by layer.
        last_moves: of these, by the last plan.
        measured: max/mean device load of the last window, by layer.
        imbalance: what is expected of the next.
        longest_stall_s: of the seconds in ``stall_s``.
        phases: by phase, as far as it is known which steps were of which.
        reason: why the last statistics were refused; empty if they were not.
    """

    plans: int = 0
    refused: int = 0
    moves: int = 0
    moved_bytes: float = 0.0
    plan_s: float = 0.0
    stall_s: float = 0.0
    longest_stall_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    layer_outcomes: list[str] = field(default_factory=list)
    layer_moves: list[int] = field(default_factory=list)
    last_moves: list[int] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    phases: dict[str, PhaseBooks] = field(
        default_factory=lambda: {phase.value: PhaseBooks() for phase in PHASES}
    )
    reason: str = ""

    def add(self, decision: Decision, expert_bytes: float) -> None:
        """Count one decision."""
        self.plans += 1
        self.reason = decision.reason
        self.layer_outcomes = [outcome.value for outcome in decision.outcomes]
        self.outcomes.update(self.layer_outcomes)
        self.last_moves = moved = decision.moves.tolist()
        if decision.reason:
            self.refused += 1
            return
        self.moves += sum(moved)
        self.moved_bytes += sum(moved) * expert_bytes
        before = self.layer_moves if len(self.layer_moves) == len(moved) else [0] * len(moved)
        self.layer_moves = [one + more for one, more in zip(before, moved, strict=True)]
        self.imbalance = rounded(decision.after)

    def stalled(self, seconds: float) -> None:
        """Count one rearrangement."""
        self.stall_s += seconds
        self.longest_stall_s = max(self.longest_stall_s, seconds)


_BY_LAYER = {
    "eplb_layer_moves": "layer_moves",
    "eplb_measured": "measured",
    "eplb_imbalance": "imbalance",
}


def report_of(books: Mapping[str, Any]) -> Report:
    """A process' books as samples and facts."""
    samples = [
        Sample(metric.name, books[metric.name.removeprefix("eplb_")])
        for metric in METRICS
        if not metric.labels
    ]
    for phase, one in books["phases"].items():
        samples.append(Sample("eplb_phase_steps", one["steps"], (phase,)))
        samples += [
            Sample(f"eplb_phase_{kept}", value, (phase, str(layer)))
            for kept in ("measured", "imbalance")
            for layer, value in enumerate(one[kept])
        ]
    samples += [
        Sample("eplb_layers", books["outcomes"].get(one.value, 0), (one.value,)) for one in Outcome
    ]
    samples += [
        Sample(name, value, (str(layer),))
        for name, kept in _BY_LAYER.items()
        for layer, value in enumerate(books[kept])
    ]
    return Report(samples, books)


def rounded(values: Floats) -> list[float]:
    """One value for each layer, in plain types."""
    return [round(float(value), 4) for value in values]

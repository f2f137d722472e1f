"""Between vLLM's call and the policy: one state per model, what cannot be planned, the books.

A call names the shape of the cluster anew each time, which elastic expert parallelism changes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from xllm_eplb.errors import PlacementError
from xllm_eplb.placement import Topology, imbalance
from xllm_eplb.policy import BalancePolicy, Decision, Outcome, Rules
from xllm_eplb.search import EMPTY, Floats, Ints
from xllm_eplb.trace import Machine, Window
from xllm_plugins.metrics import Metric, Sample
from xllm_plugins.status import Report

logger = logging.getLogger("vllm.xllm_eplb")

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
)
_WINDOWS = 16  # kept for who records them


@dataclass
class Books:
    """What a process has decided so far, in plain types, to travel between processes.

    Attributes:
        outcomes: layers by what was decided, over all plans.
        layer_outcomes: of the last plan, by layer.
        layer_moves: experts moved so far, by layer.
        measured: max/mean device load of the last window, by layer.
        imbalance: what is expected of the next.
        longest_stall_s: of the seconds in ``stall_s``.
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
    measured: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    reason: str = ""

    def add(self, decision: Decision, expert_bytes: float) -> None:
        """Count one decision."""
        self.plans += 1
        self.reason = decision.reason
        self.layer_outcomes = [outcome.value for outcome in decision.outcomes]
        self.outcomes.update(self.layer_outcomes)
        if decision.reason:
            self.refused += 1
            return
        moved = decision.moves.tolist()
        self.moves += sum(moved)
        self.moved_bytes += sum(moved) * expert_bytes
        before = self.layer_moves if len(self.layer_moves) == len(moved) else [0] * len(moved)
        self.layer_moves = [one + more for one, more in zip(before, moved, strict=True)]
        self.imbalance = _rounded(decision.after)

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
    samples += [
        Sample("eplb_layers", books["outcomes"].get(one.value, 0), (one.value,)) for one in Outcome
    ]
    samples += [
        Sample(name, value, (str(layer),))
        for name, kept in _BY_LAYER.items()
        for layer, value in enumerate(books[kept])
    ]
    return Report(samples, books)


class Balancer:
    """Plans the models of one process; called with what vLLM hands its own policy.

    All ranks find the same; ``speaks`` is for the one that logs it.
    """

    def __init__(
        self,
        rules: Rules,
        machine: Machine,
        speaks: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._rules, self._machine, self._speaks, self._clock = rules, machine, speaks, clock
        self._policies: dict[tuple[int, ...], BalancePolicy] = {}
        self._books = Books()
        self._windows: deque[Window] = deque(maxlen=_WINDOWS)
        self.stalled = self._books.stalled

    def windows(self, after: int) -> list[dict[str, Any]]:
        """The last windows, of plans after that number, in plain types."""
        return [window.plain() for window in self._windows if window.plan > after]

    def books(self) -> dict[str, Any]:
        """What was decided, in plain types."""
        return {**asdict(self._books), "outcomes": dict(self._books.outcomes)}

    def rebalance(
        self, load: Floats, slots: int, groups: int, nodes: int, devices: int, current: Ints
    ) -> Ints | None:
        """The placement from now on, ``[layers, slots]``; None where it cannot be planned here.

        Args:
            load: tokens of each expert in the window, ``[layers, experts]``.
            slots: of all devices together, after this change.
            groups: of experts.
            nodes: that the devices are on.
            devices: expert-parallel ranks, after this change.
            current: ``[layers, slots before]``; where their number changes, those at the end are
                the ones that come or go.
        """
        try:
            topology = Topology(devices, slots // devices, nodes, groups)
            if slots % devices or not topology.slots <= load.shape[1] <= slots:
                raise PlacementError(
                    f"{devices} devices have {slots} slots for {load.shape[1]} experts."
                )
        except PlacementError as error:
            logger.warning("Not planned by xllm.eplb: %s", error)
            return None
        resized = _resized(current, slots)
        if not load.any() and resized is current and (current != EMPTY).all():
            return current  # vLLM's profile run, or no traffic yet
        key = (*load.shape, topology.slots)
        policy = self._policies.get(key)
        if policy is None:
            policy = BalancePolicy(self._rules, self._machine.costs(topology.slots))
            self._policies[key] = policy
        started = self._clock()
        made = policy.decide(load, self._machine.steps, resized, topology)
        self._books.plan_s += self._clock() - started
        self._books.add(made, self._machine.expert_bytes)
        if made.reason:
            logger.warning("The experts stay where they are: %s", made.reason)
            return None if (made.placement == EMPTY).any() else made.placement
        self._books.measured = _rounded(imbalance(load, resized, devices))
        self._windows.append(Window(self._books.plans, self._machine, topology, load, resized))
        self._tell(made)
        return made.placement

    def _tell(self, made: Decision) -> None:
        if not self._speaks:
            return
        counts = Counter(outcome.value for outcome in made.outcomes)
        logger.info(
            "EPLB: max/mean %.3f -> %.3f, %d experts move, layers: %s",
            made.before.mean(),
            made.after.mean(),
            made.moves.sum(),
            ", ".join(f"{name} {count}" for name, count in counts.most_common()),
        )


def _rounded(values: Floats) -> list[float]:
    return [round(float(value), 4) for value in values]


def _resized(current: Ints, slots: int) -> Ints:
    """The placement with slots of devices that go left out, and those that come empty."""
    had = current.shape[1]
    if had == slots:
        return current
    if had > slots:
        return current[:, :slots]
    return np.pad(current, ((0, 0), (0, slots - had)), constant_values=EMPTY)

"""Between vLLM's call and the policy: one state per model, what cannot be planned, the books.

A call names the shape of the cluster anew each time, which elastic expert parallelism changes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from xllm_eplb.errors import PlacementError
from xllm_eplb.forecast import Forecast
from xllm_eplb.phases import PHASES, Phase, Prefill
from xllm_eplb.placement import Topology, imbalance
from xllm_eplb.policy import BalancePolicy, Decision, Outcome, Rules
from xllm_eplb.replay import device_shares
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
_WINDOWS = 16  # kept for who records them


@dataclass
class PhaseBooks:
    """Of the steps of one phase, likewise."""

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


@dataclass
class _Model:
    """What is expected of one model's experts."""

    policy: BalancePolicy
    forecasts: Mapping[Phase, Forecast]


class Balancer:
    """Plans the models of one process; called with what vLLM hands its own policy.

    All ranks find the same; ``speaks`` is for the one that logs it. It plans for the steps of
    ``phase``, for all where it is not known which are of it.
    """

    def __init__(
        self,
        rules: Rules,
        machine: Machine,
        phase: Phase = Phase.ALL,
        speaks: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._rules, self._machine, self._speaks, self._clock = rules, machine, speaks, clock
        self._phase = phase
        self._prefills: deque[Prefill | None] = deque()
        self._models: dict[tuple[int, ...], _Model] = {}
        self._books = Books()
        self._windows: deque[Window] = deque(maxlen=_WINDOWS)
        self.stalled = self._books.stalled

    def windows(self, after: int) -> list[dict[str, Any]]:
        """The last windows, of plans after that number, in plain types."""
        return [window.plain() for window in self._windows if window.plan > after]

    def books(self) -> dict[str, Any]:
        """What was decided, in plain types."""
        return {**asdict(self._books), "outcomes": dict(self._books.outcomes)}

    def loads(self) -> dict[str, Any]:
        """The books, and under ``devices`` the last window's load of devices.

        That is ``[layers, devices]`` in percent of the layer's mean; empty before the first plan.
        """
        shares = [np.rint(100.0 * device_shares(one)) for one in [*self._windows][-1:]]
        return {**self.books(), "devices": shares[0].astype(int).tolist() if shares else []}

    def counted(self, prefills: Sequence[Prefill | None]) -> None:
        """What prefill steps had in the windows that are planned from next, model by model."""
        self._prefills = deque(prefills)

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
        prefill = self._prefills.popleft() if self._prefills else None
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
        model = self._models.get(key)
        if model is None:
            model = self._models[key] = self._model(topology.slots)
        prefill = prefill if prefill is not None and _fits(prefill, load) else None
        number = self._books.plans + 1
        window = Window(number, self._machine, topology, load, resized, prefill)
        part = window.of(self._phase)
        started = self._clock()
        made = model.policy.decide(part.load, part.steps, resized, topology, part.share)
        self._books.plan_s += self._clock() - started
        self._books.add(made, self._machine.expert_bytes)
        if made.reason:
            logger.warning("The experts stay where they are: %s", made.reason)
            return None if (made.placement == EMPTY).any() else made.placement
        self._books.measured = _rounded(imbalance(load, resized, devices))
        self._windows.append(window)
        if prefill is not None:
            self._learn(model.forecasts, window, made.placement)
        self._tell(made, prefill)
        return made.placement

    def _model(self, slots: int) -> _Model:
        rules = self._rules
        forecasts = {phase: Forecast(rules.decay, rules.change_errors) for phase in PHASES}
        return _Model(BalancePolicy(rules, self._machine.costs(slots)), forecasts)

    def _learn(self, forecasts: Mapping[Phase, Forecast], window: Window, placement: Ints) -> None:
        devices = window.topology.devices
        for phase, forecast in forecasts.items():
            part, books = window.of(phase), self._books.phases[phase.value]
            forecast.observe(part.load)
            books.steps += round(window.machine.steps * part.share)
            books.measured = _rounded(imbalance(part.load, window.placement, devices))
            books.imbalance = _rounded(imbalance(forecast.share, placement, devices))

    def _tell(self, made: Decision, prefill: Prefill | None) -> None:
        if not self._speaks:
            return
        if prefill is None and self._phase is not Phase.ALL:
            logger.warning(
                "It is not known which steps are %s: planned for all.", self._phase.value
            )
        counts = Counter(outcome.value for outcome in made.outcomes)
        logger.info(
            "EPLB: max/mean %.3f -> %.3f, %d experts move, layers: %s",
            made.before.mean(),
            made.after.mean(),
            made.moves.sum(),
            ", ".join(f"{name} {count}" for name, count in counts.most_common()),
        )


def _fits(prefill: Prefill, load: Floats) -> bool:
    """Whether it can be a part of this load."""
    part = prefill.load
    return part.shape == load.shape and bool(((part >= 0) & (part <= load)).all())


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

"""Between vLLM's call and the policy: one state per model, what cannot be planned, the books.

A call names the shape of the cluster anew each time, which elastic expert parallelism changes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xllm_eplb.books import Books, rounded
from xllm_eplb.errors import PlacementError
from xllm_eplb.forecast import Forecast
from xllm_eplb.phases import PHASES, Phase, Prefill
from xllm_eplb.placement import Topology, imbalance
from xllm_eplb.policy import BalancePolicy, Decision, Rules
from xllm_eplb.replay import device_shares
from xllm_eplb.search import EMPTY, Floats, Ints
from xllm_eplb.trace import Machine, Window

logger = logging.getLogger("vllm.xllm_eplb")

_WINDOWS = 16  # kept for who records them


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
        self._books.measured = rounded(imbalance(load, resized, devices))
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
            books.measured = rounded(imbalance(part.load, window.placement, devices))
            books.imbalance = rounded(imbalance(forecast.share, placement, devices))

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


def _resized(current: Ints, slots: int) -> Ints:
    """The placement with slots of devices that go left out, and those that come empty."""
    had = current.shape[1]
    if had == slots:
        return current
    if had > slots:
        return current[:, :slots]
    return np.pad(current, ((0, 0), (0, slots - had)), constant_values=EMPTY)

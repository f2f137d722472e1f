"""Between vLLM's call and the policy: one state per model, what cannot be planned, the books.

A call names the shape of the cluster anew each time, which elastic expert parallelism changes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from xllm_eplb.errors import PlacementError
from xllm_eplb.placement import Topology
from xllm_eplb.policy import BalancePolicy, Costs, Decision, Outcome, Rules
from xllm_eplb.search import EMPTY, Floats, Ints
from xllm_plugins.metrics import Metric, Sample
from xllm_plugins.status import Report

logger = logging.getLogger("vllm.xllm_eplb")

METRICS = (
    Metric("eplb_plans", "counter", "Rearrangements that were decided on."),
    Metric("eplb_refused", "counter", "Those whose statistics could not be used."),
    Metric("eplb_moves", "counter", "Experts whose weights some device received."),
    Metric("eplb_moved_bytes", "counter", "Their weights."),
    Metric("eplb_layers", "counter", "Layers decided on, by what was decided.", ("outcome",)),
    Metric("eplb_imbalance", "gauge", "Expected max/mean device load of a layer.", ("layer",)),
)


@dataclass(frozen=True)
class Machine:
    """What moving and computing experts depends on.

    Attributes:
        steps: engine steps that a call's statistics cover.
        expert_bytes: of one expert's weights.
        expert_weights: their number.
        flops: that a device reaches, per second.
        memory_bytes: that it reads, per second.
        link_bytes: that it receives, per second.
        exposed: share of a transfer by which steps become longer.
    """

    steps: int
    expert_bytes: float
    expert_weights: float
    flops: float
    memory_bytes: float
    link_bytes: float
    exposed: float

    def costs(self, slots: int) -> Costs:
        """With so many experts on a device."""
        return Costs(
            token_s=2.0 * self.expert_weights / self.flops,
            floor_s=slots * self.expert_bytes / self.memory_bytes,
            move_s=self.expert_bytes / self.link_bytes,
            exposed=self.exposed,
        )


@dataclass
class Books:
    """What a process has decided so far, in plain types, to travel between processes."""

    plans: int = 0
    refused: int = 0
    moves: int = 0
    moved_bytes: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    imbalance: list[float] = field(default_factory=list)
    reason: str = ""

    def add(self, decision: Decision, expert_bytes: float) -> None:
        """Count one decision."""
        self.plans += 1
        self.reason = decision.reason
        self.outcomes.update(outcome.value for outcome in decision.outcomes)
        if decision.reason:
            self.refused += 1
            return
        moved = int(decision.moves.sum())
        self.moves += moved
        self.moved_bytes += moved * expert_bytes
        self.imbalance = [round(float(value), 4) for value in decision.after]


def report_of(books: Mapping[str, Any]) -> Report:
    """A process' books as samples and facts."""
    samples = [
        Sample("eplb_plans", books["plans"]),
        Sample("eplb_refused", books["refused"]),
        Sample("eplb_moves", books["moves"]),
        Sample("eplb_moved_bytes", books["moved_bytes"]),
    ]
    samples += [
        Sample("eplb_layers", books["outcomes"].get(one.value, 0), (one.value,)) for one in Outcome
    ]
    samples += [
        Sample("eplb_imbalance", value, (str(layer),))
        for layer, value in enumerate(books["imbalance"])
    ]
    return Report(samples, books)


class Balancer:
    """Plans the models of one process; called with what vLLM hands its own policy.

    All ranks find the same; ``speaks`` is for the one that logs it.
    """

    def __init__(self, rules: Rules, machine: Machine, speaks: bool = True) -> None:
        self._rules, self._machine, self._speaks = rules, machine, speaks
        self._policies: dict[tuple[int, ...], BalancePolicy] = {}
        self._books = Books()

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
            logger.warning("vLLM's own policy plans: %s", error)
            return None
        resized = _resized(current, slots)
        if resized is current and not load.any():
            return current  # vLLM's profile run, or no traffic yet
        key = (*load.shape, topology.slots)
        policy = self._policies.get(key)
        if policy is None:
            policy = BalancePolicy(self._rules, self._machine.costs(topology.slots))
            self._policies[key] = policy
        made = policy.decide(load, self._machine.steps, resized, topology)
        self._books.add(made, self._machine.expert_bytes)
        if made.reason:
            logger.warning("The experts stay where they are: %s", made.reason)
            return None if (made.placement == EMPTY).any() else made.placement
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


def _resized(current: Ints, slots: int) -> Ints:
    """The placement with slots of devices that go left out, and those that come empty."""
    had = current.shape[1]
    if had == slots:
        return current
    if had > slots:
        return current[:, :slots]
    return np.pad(current, ((0, 0), (0, slots - had)), constant_values=EMPTY)

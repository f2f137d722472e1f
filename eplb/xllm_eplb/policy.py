"""When experts move: what is to be expected of the load, and whether another placement pays.

Pure: arrays in, a decision out, time counted in engine steps. Deterministic, because every rank
decides on its own and all have to decide the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from xllm_eplb.errors import PlacementError
from xllm_eplb.forecast import Forecast
from xllm_eplb.placement import (
    Topology,
    check_placement,
    device_load,
    imbalance,
    place,
    received,
    replica_counts,
)
from xllm_eplb.search import Floats, Ints

Bools = NDArray[np.bool_]


class Outcome(str, Enum):
    """What was decided for a layer, and why."""

    MOVED = "moved"
    REPAIRED = "repaired"  # experts were missing: whatever it costs
    BALANCED = "balanced"  # no gain above the smallest that is wanted
    NOISE = "noise"  # the gain is within what the load's noise feigns
    UNCHANGED = "unchanged"  # the load is as it was when the layer was planned last
    LOW_BATCH = "low_batch"  # so few tokens that the heaviest device is not slower
    COST = "cost"  # moving takes longer than it saves within the horizon
    BUDGET = "budget"  # others gain more by the moves that are left
    NO_LOAD = "no_load"
    REFUSED = "refused"


@dataclass(frozen=True)
class Rules:
    """What is worth a move.

    Attributes:
        wanted: max/mean device load that a plan aims at.
        least_gain: of max/mean, below which a layer is left alone: the hysteresis.
        noise_errors: standard errors of the forecast by which a gain is discounted.
        noise_share: of that discount, by which a plan aims higher: what noise will undo is not
            paid for.
        decay: weight of the earlier windows when one more has been seen, 0 to below 1.
        change_errors: times the usual error at which a window is a change of traffic and the
            earlier ones are forgotten.
        cosine: a layer whose load is at least so similar to the one it was planned for is left
            alone, 0 to 1, as in xLLM; None to leave that out.
        horizon_steps: engine steps over which a move has to pay.
        cost_factor: what a move has to save, times its cost.
        most_moves: experts that may move in one decision; None without bound.
    """

    wanted: float = 1.005
    least_gain: float = 0.01
    noise_errors: float = 2.5
    noise_share: float = 0.15
    decay: float = 0.8
    change_errors: float = 2.0
    cosine: float | None = None
    horizon_steps: int = 3000
    cost_factor: float = 1.5
    most_moves: int | None = None


@dataclass(frozen=True)
class Costs:
    """What the machine makes of loads and moves, in seconds.

    Attributes:
        token_s: of a device for one token at one expert.
        floor_s: of a layer's experts however few tokens there are: their weights have to be read.
        move_s: for one expert's weights to arrive at a device.
        stall_s: that the engine stands still for each layer that changes.
        exposed: share of ``move_s`` by which steps become longer; 1 when moving blocks them.
    """

    token_s: float
    floor_s: float = 0.0
    move_s: float = 0.0
    stall_s: float = 0.0
    exposed: float = 1.0

    def layer_s(self, tokens: Floats) -> Floats:
        """How long the heaviest device of a layer takes for so many tokens."""
        return np.maximum(tokens * self.token_s, self.floor_s)


@dataclass(frozen=True)
class Decision:
    """The placement from now on, and how it came about; arrays have one value for each layer.

    Attributes:
        placement: ``[layers, devices * slots]``.
        outcomes: of each layer.
        before: max/mean device load to be expected without a change.
        after: and with this placement.
        moves: experts that some device receives.
        gain_s: what they save of a step, in the mean of all steps.
        cost_s: what they cost once.
        reason: why the whole input was refused; empty if it was not.
    """

    placement: Ints
    outcomes: tuple[Outcome, ...]
    before: Floats
    after: Floats
    moves: Ints
    gain_s: Floats
    cost_s: Floats
    reason: str = ""

    @property
    def changes(self) -> bool:
        """Whether any expert moves."""
        return bool(self.moves.any())


@dataclass
class _Draft:
    """A decision in the making."""

    before: Floats
    feigned: Floats = field(init=False)
    after: Floats = field(init=False)
    outcomes: list[Outcome] = field(init=False)
    moves: Ints = field(init=False)
    gain_s: Floats = field(init=False)
    cost_s: Floats = field(init=False)

    def __post_init__(self) -> None:
        layers = len(self.before)
        self.after = self.before.copy()
        self.outcomes = [Outcome.BALANCED] * layers
        self.moves = np.zeros(layers, np.int64)
        self.gain_s, self.cost_s = np.zeros(layers), np.zeros(layers)

    def set(self, layers: Ints, outcome: Outcome) -> None:
        for layer in layers:
            self.outcomes[layer] = outcome

    def decision(self, placement: Ints, reason: str = "") -> Decision:
        return Decision(
            placement, tuple(self.outcomes), self.before, self.after, self.moves, self.gain_s,
            self.cost_s, reason,
        )  # fmt: skip


class BalancePolicy:
    """Decides window by window for the layers of one model."""

    def __init__(self, rules: Rules, costs: Costs) -> None:
        self._rules, self._costs = rules, costs
        self._forecast = Forecast(rules.decay, rules.change_errors)
        self._planned: Floats | None = None  # the load for which each layer was planned last

    def decide(
        self, load: Floats, steps: int, current: Ints, topology: Topology, share: float = 1.0
    ) -> Decision:
        """The placement after one more window of statistics.

        What cannot be used is refused with a reason, and the current placement stays.

        Args:
            load: tokens that each expert got in the window, ``[layers, experts]``.
            steps: engine steps of the window, at least 1.
            current: the placement now, ``[layers, devices * slots]``; -1 in empty slots.
            topology: of the machine.
            share: of the engine's steps that are such as the window's, 0 to 1.
        """
        try:
            return self._decided(load, steps, current, topology, share)
        except PlacementError as error:
            draft = _Draft(np.ones(len(current)))
            draft.set(np.arange(len(current)), Outcome.REFUSED)
            return draft.decision(current, str(error))

    def _decided(
        self, load: Floats, steps: int, current: Ints, topology: Topology, step_share: float
    ) -> Decision:
        if steps < 1:
            raise PlacementError(f"steps is {steps}; allowed is at least 1.")
        self._forecast.observe(load)
        share = self._forecast.share
        tokens = load.sum(1) / (steps * topology.devices)  # a device's mean in a step
        if self._planned is None or self._planned.shape != share.shape:
            self._planned = np.zeros_like(share)
        draft = _Draft(imbalance(share, current, topology.devices))
        draft.feigned = self._feigned(current, topology)
        broken = (current < 0).any(1) | (replica_counts(current, share.shape[1]) == 0).any(1)
        chosen = np.flatnonzero(broken | self._worth_planning(draft, tokens))
        if not len(chosen):
            return draft.decision(current)
        aim = self._rules.wanted + self._rules.noise_share * draft.feigned
        plan = current.copy()
        plan[chosen] = place(share[chosen], current[chosen], topology, aim[chosen])
        check_placement(plan[chosen], share.shape[1], topology)
        taken = self._taken(draft, chosen, plan, current, topology, tokens, broken, step_share)
        placement = current.copy()
        placement[taken] = plan[taken]
        self._planned[taken] = share[taken]
        return draft.decision(placement)

    def _worth_planning(self, draft: _Draft, tokens: Floats) -> Bools:
        """Layers whose best possible gain is large enough; sets why the others are not."""
        rules, best = self._rules, draft.before - 1.0
        idle = np.flatnonzero(tokens == 0)
        wanted = best >= rules.least_gain
        noise = wanted & (best - draft.feigned < rules.least_gain)
        low = wanted & ~noise & (self._saved(draft.before, np.ones(len(best)), tokens) <= 0)
        draft.set(np.flatnonzero(noise), Outcome.NOISE)
        draft.set(np.flatnonzero(low), Outcome.LOW_BATCH)
        draft.set(idle, Outcome.NO_LOAD)
        wanted &= ~noise & ~low & (tokens > 0)
        if rules.cosine is not None:
            assert self._planned is not None
            same = wanted & (_cosine(self._forecast.share, self._planned) >= rules.cosine)
            draft.set(np.flatnonzero(same), Outcome.UNCHANGED)
            wanted &= ~same
        return wanted

    def _feigned(self, current: Ints, topology: Topology) -> Floats:
        """``[layers]``: max/mean that the forecast's error alone may show, or hide."""
        squares = np.square(self._forecast.share)
        counts = np.maximum(replica_counts(current, squares.shape[1]), 1)
        # device_load() divides by the replicas once, a variance takes it twice.
        spread = np.sqrt(device_load(squares / counts, current, topology.devices)).max(1)
        mean = self._forecast.share.sum(1) / topology.devices
        error = self._forecast.error * np.divide(
            spread, mean, out=np.zeros_like(mean), where=mean > 0
        )
        feigned: Floats = self._rules.noise_errors * error
        return feigned

    def _saved(self, before: Floats, after: Floats, tokens: Floats) -> Floats:
        """Seconds of a step that a layer saves."""
        return self._costs.layer_s(before * tokens) - self._costs.layer_s(after * tokens)

    def _taken(
        self, draft: _Draft, chosen: Ints, plan: Ints, current: Ints, topology: Topology,
        tokens: Floats, broken: Bools, step_share: float,
    ) -> Ints:  # fmt: skip
        """The planned layers that pay, the best by what they save for each move first."""
        rules, costs = self._rules, self._costs
        share = self._forecast.share
        after = imbalance(share[chosen], plan[chosen], topology.devices)
        arrives = received(current[chosen], plan[chosen], topology.devices)
        moved = arrives.sum(1)
        real = np.maximum(draft.before - draft.feigned, 1.0)[chosen]
        gain = step_share * self._saved(np.maximum(real, after), after, tokens[chosen])
        cost = costs.stall_s + costs.exposed * costs.move_s * arrives.max(1)
        pays = gain * rules.horizon_steps > rules.cost_factor * cost
        enough = draft.before[chosen] - after >= rules.least_gain
        must = broken[chosen]
        draft.set(chosen[~pays], Outcome.COST)
        draft.set(chosen[~enough], Outcome.BALANCED)
        taken, left = [], rules.most_moves
        value = np.where(must, np.inf, gain / np.maximum(moved, 1))
        for index in np.argsort(-value, kind="stable"):
            if not (must[index] or (pays[index] and enough[index])):
                continue
            if left is not None and moved[index] > left and not must[index]:
                draft.set(chosen[index : index + 1], Outcome.BUDGET)
                continue
            left = left if left is None else max(0, left - moved[index])
            taken.append(index)
        index_taken = np.array(taken, np.int64)
        layers = chosen[index_taken]
        draft.set(layers, Outcome.MOVED)
        draft.set(layers[must[index_taken]], Outcome.REPAIRED)
        draft.after[layers], draft.moves[layers] = after[index_taken], moved[index_taken]
        draft.gain_s[layers], draft.cost_s[layers] = gain[index_taken], cost[index_taken]
        return layers


def _cosine(one: Floats, other: Floats) -> Floats:
    """``[layers]``: the cosine of two loads; 0 where one is none, as xLLM starts."""
    norms = np.sqrt(np.square(one).sum(1) * np.square(other).sum(1))
    cosine: Floats = np.divide((one * other).sum(1), norms, out=np.zeros(len(one)), where=norms > 0)
    return cosine

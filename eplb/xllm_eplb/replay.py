"""What rules would have made of recorded loads: each plan is scored on the window after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from xllm_eplb.phases import PHASES, Phase
from xllm_eplb.placement import device_load, imbalance, moves
from xllm_eplb.policy import BalancePolicy, Rules
from xllm_eplb.search import Floats, Ints
from xllm_eplb.trace import Window

Rule = Callable[[Window, Ints], Ints]
"""Given a window and the placement in force, ``[layers, devices * slots]``, the next one."""
WANTED = (1.0, 1.005, 1.01, 1.02, 1.03, 1.05, 1.075, 1.1, 1.15, 1.2, 1.3, 1.5)


@dataclass(frozen=True)
class Score:
    """What became of a trace.

    Attributes:
        balance: mean max/mean device load over layers and windows.
        phases: the same in the steps of a phase, by its name; as far as it is known which are.
        moves: experts moved, by the slots of the model and the number of plans.
        plan_ms: of a plan, in the mean.
    """

    balance: float
    phases: Mapping[str, float]
    moves: float
    plan_ms: float


def untouched(window: Window, current: Ints) -> Ints:
    """No balancer: the placement stays."""
    return current


def ours(rules: Rules, first: Window, phase: Phase = Phase.ALL) -> Rule:
    """Our policy with these rules, for the steps of a phase, without a past."""
    policy = BalancePolicy(rules, first.machine.costs(first.topology.slots))

    def plan(window: Window, current: Ints) -> Ints:
        load, steps, share = window.of(phase)
        return policy.decide(load, steps, current, window.topology, share).placement

    return plan


def replayed(windows: Sequence[Window], rule: Rule, clock: Callable[[], float]) -> Score:
    """Plan after each window but the last, from the placement of the first on."""
    placement, devices = windows[0].placement, windows[0].topology.devices
    scores, moved, took = [], 0, 0.0
    apart: dict[str, list[float]] = {}
    for window, after in pairwise(windows):
        began = clock()
        found = rule(window, placement)
        took += clock() - began
        moved += int(moves(placement, found, devices).sum())
        scores.append(imbalance(after.load, found, devices).mean())
        for phase in PHASES if after.prefill is not None else ():
            load = after.of(phase).load
            if load.any():
                apart.setdefault(phase.value, []).append(imbalance(load, found, devices).mean())
        placement = found
    plans = len(scores)
    return Score(
        float(np.mean(scores)),
        {name: float(np.mean(values)) for name, values in apart.items()},
        moved / (plans * placement.size),
        took / plans * 1e3,
    )


def device_shares(window: Window) -> Floats:
    """``[layers, devices]``: each device's load in a window by the layer's mean; 0 without load."""
    loads = device_load(window.load, window.placement, window.topology.devices)
    mean = loads.mean(1, keepdims=True)
    shares: Floats = np.divide(loads, mean, out=np.zeros_like(loads), where=mean > 0)
    return shares

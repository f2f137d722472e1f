"""Others' expert placement, to compare with; for benchmarks only.

vLLM's is called from vLLM. Those of vllm-ascend and xLLM are written anew from what they do, as
plain Python: their placements are comparable, the time they take is not.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Protocol

import numpy as np

from xllm_eplb.placement import Topology, imbalance, replica_counts
from xllm_eplb.policy import BalancePolicy
from xllm_eplb.search import Floats, Ints
from xllm_plugins.compat.eplb_policy import default_plan


class Rule(Protocol):
    """A planner: the placement after one more window of counts ``[layers, experts]``."""

    def __call__(self, load: Floats, current: Ints, topology: Topology) -> Ints:
        """The next placement, ``[layers, devices * slots]``."""


class Untouched:
    """No load balancer: vLLM's first placement stays."""

    def __call__(self, load: Floats, current: Ints, topology: Topology) -> Ints:
        """The current placement."""
        return current


class VllmDefault:
    """DeepSeek's algorithm as vLLM calls it, its preference for slots of before included."""

    def __call__(self, load: Floats, current: Ints, topology: Topology) -> Ints:
        """Everything planned anew from this window."""
        found: Ints = default_plan(load, current, asdict(topology))
        return found


class Xllm:
    """xLLM's: layers whose load differs from that of their last update are packed anew.

    ``eplb_manager`` and ``eplb_policy`` of jd-opensource/xllm at their defaults: a cosine below 0.8
    updates, counts are halved after each round, and nothing keeps replicas on different devices.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        self._threshold = threshold
        self._load: Floats | None = None
        self._planned: Floats | None = None

    def __call__(self, load: Floats, current: Ints, topology: Topology) -> Ints:
        """The layers that have changed, packed by the decayed counts."""
        self._load = load if self._load is None else self._load + load
        if self._planned is None:
            self._planned = np.zeros_like(load)
        found = current.copy()
        for layer, counts in enumerate(self._load):
            was = self._planned[layer]
            norm = np.linalg.norm(counts) * np.linalg.norm(was)
            if norm and counts @ was / norm >= self._threshold:
                continue
            self._planned[layer] = counts
            found[layer] = packed(counts, topology)
        self._load = np.floor(self._load / 2.0)
        return found


def packed(load: Floats, topology: Topology) -> Ints:
    """XLLM's ``compute_balanced_pack`` for one layer: ``[devices * slots]``."""
    weight, copies = load.astype(np.int64), np.ones(len(load), np.int64)
    for _ in range(topology.physical - len(load)):
        hot = weight.argmax()
        copies[hot] += 1
        weight[hot] = weight[hot] * (copies[hot] - 1) // copies[hot]
    held: list[list[int]] = [[] for _ in range(topology.devices)]
    total = np.zeros(topology.devices)
    redundant = np.repeat(np.arange(len(load)), copies - 1)
    for expert in [*redundant, *np.argsort(-weight, kind="stable")]:
        room = [len(slots) < topology.slots for slots in held]
        device = int(np.where(room, total, np.inf).argmin())
        held[device].append(int(expert))
        total[device] += weight[expert]
    return np.array([expert for slots in held for expert in slots])


class AscendSwift:
    """vllm-ascend's Swift balancer, its recommended policy: few transfers between two devices.

    For layers above 1.01: redundant slots (all but the first of each expert) are given anew to the
    heaviest experts, the lightest device first; then the heaviest device swaps experts with others
    while that helps. In one round one device receives at most one expert from another.
    """

    def __init__(self, threshold: float = 1.01, most_swaps: int = 100) -> None:
        self._threshold, self._most_swaps = threshold, most_swaps

    def __call__(self, load: Floats, current: Ints, topology: Topology) -> Ints:
        """The layers above the threshold, where that improves them."""
        found, before = current.copy(), imbalance(load, current, topology.devices)
        for layer in np.flatnonzero(before > self._threshold):
            found[layer] = self._layer(load[layer], current[layer], topology)
        worse = imbalance(load, found, topology.devices) >= before
        found[worse] = current[worse]
        return found

    def _layer(self, load: Floats, current: Ints, topology: Topology) -> Ints:
        held = current.reshape(topology.devices, topology.slots).copy()
        sends = np.zeros((topology.devices, topology.devices), np.int64)
        home, spare = np.full(len(load), -1), []
        for slot in range(topology.slots):
            for device in range(topology.devices):
                if home[held[device, slot]] < 0:
                    home[held[device, slot]] = device
                else:
                    spare.append((device, slot))
        old = {place: held[place] for place in spare}
        copies = np.ones(len(load), np.int64)
        for _ in spare:
            share = np.where(copies < topology.devices, load / copies, -1.0)
            copies[share.argmax()] += 1
        share = load / copies
        for place in spare:
            held[place] = -1
        total = np.where(held >= 0, share[held], 0.0).sum(1)
        for expert in sorted(np.repeat(np.arange(len(load)), copies - 1), key=lambda e: -share[e]):
            fits = [
                place
                for place in spare
                if expert not in held[place[0]] and not sends[home[expert], place[0]]
            ]
            if not fits:
                continue
            place = min(fits, key=lambda one: (total[one[0]], old[one] != expert))
            spare.remove(place)
            held[place] = expert
            total[place[0]] += share[expert]
            sends[home[expert], place[0]] += old[place] != expert
        for device, slot in spare:  # what found no device within the limit of transfers
            counts = np.bincount(held[held >= 0], minlength=len(load))
            fit = np.where(np.isin(np.arange(len(load)), held[device]), -1.0, load / counts)
            held[device, slot] = fit.argmax()
        self._swap(load, held, sends)
        return held.reshape(-1)

    def _swap(self, load: Floats, held: Ints, sends: Ints) -> None:
        share = load / replica_counts(held.reshape(1, -1), len(load))[0]
        weight = share[held]
        for _ in range(self._most_swaps):
            total = weight.sum(1)
            heavy = int(total.argmax())
            delta = weight[heavy][None, :, None] - weight[:, None, :]  # [devices, slots, slots]
            after = np.maximum(total[heavy] - delta, total[:, None, None] + delta)
            gives = (held[heavy][None, :, None] == held[:, None, :]).any(2)
            takes = np.isin(held, held[heavy])
            after[gives] = np.inf
            after.transpose(0, 2, 1)[takes] = np.inf
            after[(sends[heavy] > 0) | (sends[:, heavy] > 0)] = np.inf
            light, slot, place = np.unravel_index(int(after.argmin()), after.shape)
            if not after.min() < total[heavy] - 0.01 * total.mean():
                return
            held[heavy, slot], held[light, place] = held[light, place], held[heavy, slot]
            weight[heavy, slot], weight[light, place] = weight[light, place], weight[heavy, slot]
            sends[heavy, light] += 1
            sends[light, heavy] += 1


class Ours:
    """The policy under test, in windows of so many steps."""

    def __init__(self, policy: BalancePolicy, steps: int) -> None:
        self._policy, self._steps = policy, steps

    def __call__(self, load: Floats, current: Ints, topology: Topology) -> Ints:
        """What it decides."""
        decision = self._policy.decide(load, self._steps, current, topology)
        if decision.reason:
            raise AssertionError(decision.reason)
        return decision.placement

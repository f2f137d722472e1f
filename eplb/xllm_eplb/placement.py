"""Where experts lie: measures of a placement, its checks, and a better one at few moves.

Shapes: ``layers`` MoE layers at once, ``experts`` logical experts, and on each of ``devices``
the same number of ``slots``. A placement is ``[layers, devices * slots]``: the expert in each slot,
device after device, -1 in a slot that holds none. The load of an expert is what its tokens cost in
any unit, shared evenly by its replicas, which is how vLLM and vllm-ascend route.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xllm_eplb.errors import PlacementError
from xllm_eplb.search import EMPTY, Floats, Ints, improve

_GROUP_GAIN = 0.05  # of a node's mean load; two whole groups are many moves


@dataclass(frozen=True)
class Topology:
    """The machine's shape as the placement sees it.

    Attributes:
        devices: expert-parallel ranks.
        slots: experts that each device holds.
        nodes: groups of neighbouring devices with a faster network inside.
        groups: groups of neighbouring experts that routing selects as one.
    """

    devices: int
    slots: int
    nodes: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("devices", "slots", "nodes", "groups"):
            if getattr(self, name) < 1:
                raise PlacementError(f"{name} is {getattr(self, name)}; allowed is at least 1.")
        if self.devices % self.nodes:
            raise PlacementError(
                f"nodes is {self.nodes}; allowed is a divisor of the {self.devices} devices."
            )

    @property
    def physical(self) -> int:
        """Slots of all devices."""
        return self.devices * self.slots

    def hierarchical(self, experts: int) -> bool:
        """Whether every group of experts can have all its replicas on one node."""
        if self.nodes == 1 or self.groups % self.nodes or experts % self.groups:
            return False
        return self.slots <= experts // self.nodes <= self.physical // self.nodes


def place(load: Floats, current: Ints, topology: Topology, wanted: Floats | float = 1.0) -> Ints:
    """A placement that is balanced as wanted, at few moves from the current one.

    Experts whose replicas would be too heavy get more of them, in slots of those that need fewer,
    on other devices and, at about equal load, other nodes; then experts are swapped between heavy
    and light devices until none is above ``wanted``. An expert that stays on a device stays in its
    slot. Where groups of experts can be divided among the nodes, no replica leaves its group's.

    Replicas by water-filling as in DeepSeek's EPLB; the local search and its objective are ours.

    Args:
        load: of each expert, ``[layers, experts]``; a layer without any stays as it is, unless
            experts are missing in it.
        current: ``[layers, devices * slots]``. A second replica of an expert on one device counts
            as an empty slot.
        topology: of the machine.
        wanted: the max/mean device load to reach, of all layers or each: the knob of moves against
            balance.

    Raises:
        PlacementError: loads that are negative or not finite, shapes that do not fit, or more slots
            on a device than experts.
    """
    experts = _checked(load, current, topology, wanted)
    aim = np.broadcast_to(np.asarray(wanted, float), len(load))
    whole = (current >= 0).all(1) & (replica_counts(current, experts) > 0).all(1)
    rows = np.flatnonzero((load.sum(1) > 0) | ~whole)
    found = current.copy()
    if len(rows):
        found[rows] = _placed(load[rows], current[rows], topology, aim[rows])
    return found


def _placed(load: Floats, current: Ints, topology: Topology, wanted: Floats) -> Ints:
    current = np.where(_duplicates(current, topology), EMPTY, current)
    if topology.hierarchical(load.shape[1]):
        found = _within_nodes(load, current, topology, wanted)
    else:
        found = improve(load, current, topology.devices, topology.nodes, wanted)
    return _settled(current, found, topology)


def _settled(before: Ints, after: Ints, topology: Topology) -> Ints:
    """The same experts on each device, those that were there before in their slots of then.

    The search may send an expert away and fetch it back into another slot.
    """
    settled = before.reshape(-1, topology.slots).copy()
    new = after.reshape(settled.shape)
    changed = np.flatnonzero((settled != new).any(1))
    old, new = settled[changed], new[changed]
    same = old.astype(np.int32)[:, :, None] == new.astype(np.int32)[:, None, :]
    # A device gets as many experts that it had not as it has slots whose expert leaves.
    old[~same.any(2)] = new[~same.any(1)]
    settled[changed] = old
    return settled.reshape(before.shape)


def device_load(load: Floats, placement: Ints, devices: int) -> Floats:
    """``[layers, devices]``: the load of each device, replicas sharing their expert's evenly."""
    layers, experts = load.shape
    counts = replica_counts(placement, experts)
    share = np.zeros((layers, experts + 1))  # the last column is that of empty slots
    share[:, :experts] = load / np.maximum(counts, 1)
    loads: Floats = np.take_along_axis(share, placement, 1).reshape(layers, devices, -1).sum(-1)
    return loads


def imbalance(load: Floats, placement: Ints, devices: int) -> Floats:
    """``[layers]``: the load of the heaviest device by the mean; 1 is perfect, and no load."""
    loads = device_load(load, placement, devices)
    mean = loads.mean(1)
    ratio: Floats = np.divide(loads.max(1), mean, out=np.ones(len(load)), where=mean > 0)
    return ratio


def replica_counts(placement: Ints, experts: int) -> Ints:
    """``[layers, experts]``: the slots that hold each expert."""
    layers = len(placement)
    ids = np.where(placement < 0, experts, placement) + np.arange(layers)[:, None] * (experts + 1)
    counts = np.bincount(ids.ravel(), minlength=layers * (experts + 1))
    return counts.reshape(layers, experts + 1)[:, :experts]


def received(before: Ints, after: Ints, devices: int) -> Ints:
    """``[layers, devices]``: experts whose weights each device has to receive."""
    old, new = (p.reshape(len(before) * devices, -1) for p in (before, after))
    changed = np.flatnonzero((old != new).any(1))
    old, new = old[changed].astype(np.int32), new[changed].astype(np.int32)
    had = (new[:, :, None] == old[:, None, :]).any(2)
    again = (new[:, :, None] == new[:, None, :]) & np.tri(new.shape[1], k=-1, dtype=bool)
    counts = np.zeros(len(before) * devices, np.int64)
    counts[changed] = (~had & ~again.any(2) & (new >= 0)).sum(1)
    return counts.reshape(len(before), devices)


def moves(before: Ints, after: Ints, devices: int) -> Ints:
    """``[layers]``: experts whose weights some device has to receive, each device counted."""
    total: Ints = received(before, after, devices).sum(1)
    return total


def check_placement(placement: Ints, experts: int, topology: Topology) -> None:
    """Refuse a placement that would lose an expert or a slot.

    Raises:
        PlacementError: a wrong shape, an id that is no expert, or an expert without a replica.
    """
    if placement.ndim != 2 or placement.shape[1] != topology.physical:
        raise PlacementError(
            f"A placement has shape {placement.shape}; allowed is [layers, {topology.physical}]."
        )
    wrong = np.argwhere((placement < 0) | (placement >= experts))
    if len(wrong):
        layer, slot = wrong[0]
        raise PlacementError(
            f"Layer {layer} has expert {placement[layer, slot]} in slot {slot}; "
            f"allowed is 0 to {experts - 1}."
        )
    dropped = np.argwhere(replica_counts(placement, experts) == 0)
    if len(dropped):
        raise PlacementError(f"Layer {dropped[0][0]} has no replica of expert {dropped[0][1]}.")


def _checked(load: Floats, current: Ints, topology: Topology, wanted: Floats | float) -> int:
    if load.ndim != 2 or not load.size:
        raise PlacementError(f"The load has shape {load.shape}; allowed is [layers, experts].")
    layers, experts = load.shape
    if not np.isfinite(load).all() or (load < 0).any():
        layer, expert = np.argwhere(~np.isfinite(load) | (load < 0))[0]
        raise PlacementError(
            f"Layer {layer} has load {load[layer, expert]} at expert {expert}; "
            "allowed is a number at least 0."
        )
    if current.shape != (layers, topology.physical):
        raise PlacementError(
            f"The current placement has shape {current.shape}; "
            f"allowed is {(layers, topology.physical)}."
        )
    if (current >= experts).any() or (current < EMPTY).any():
        raise PlacementError(
            f"The current placement names expert {current.max()} or {current.min()}; "
            f"allowed is 0 to {experts - 1}, or -1 for none."
        )
    if not topology.slots <= experts <= topology.physical:
        raise PlacementError(
            f"{topology.devices} devices have {topology.slots} slots each for {experts} experts; "
            "allowed is at most as many slots on a device as experts, and no fewer in all."
        )
    if not np.all(np.asarray(wanted) >= 1.0):
        raise PlacementError(f"wanted is {wanted}; allowed is a number at least 1.")
    return int(experts)


def _duplicates(placement: Ints, topology: Topology) -> NDArray[np.bool_]:
    """Slots whose expert an earlier slot of the same device holds, too."""
    slots = placement.reshape(len(placement), topology.devices, topology.slots)
    ordered = np.sort(slots, 2)
    if not (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
        return np.zeros(placement.shape, bool)
    same = slots[:, :, :, None] == slots[:, :, None, :]
    again: NDArray[np.bool_] = (same & np.tri(topology.slots, k=-1, dtype=bool)).any(-1)
    return again.reshape(placement.shape)


def _within_nodes(load: Floats, current: Ints, topology: Topology, wanted: Floats) -> Ints:
    """Groups to nodes, then each node as a problem of its own."""
    layers, experts = load.shape
    nodes, size = topology.nodes, experts // topology.groups
    home = np.repeat(_homes(load, current, topology), size, 1)  # [layers, experts]: its node
    members = np.argsort(home, 1, kind="stable")  # a node's experts are neighbours in it
    each = experts // nodes
    position = np.empty_like(members)
    np.put_along_axis(position, members, np.broadcast_to(np.arange(experts), home.shape), 1)
    node_of_slot = np.arange(topology.physical) // (topology.physical // nodes)
    local = np.take_along_axis(position, np.maximum(current, 0), 1) - node_of_slot * each
    local[(current < 0) | (local < 0) | (local >= each)] = EMPTY
    found = improve(
        np.take_along_axis(load, members, 1).reshape(layers * nodes, each),
        local.reshape(layers * nodes, -1),
        topology.devices // nodes,
        1,
        np.repeat(wanted, nodes),
    ).reshape(layers, -1)
    return np.take_along_axis(members, found + node_of_slot * each, 1)


def _homes(load: Floats, current: Ints, topology: Topology) -> Ints:
    """``[layers, groups]``: the node of each group, that of most of its experts where it can."""
    layers, experts = load.shape
    nodes, groups = topology.nodes, topology.groups
    group = np.where(current < 0, groups, current // (experts // groups))
    node = np.arange(topology.physical) // (topology.physical // nodes)
    ids = (np.arange(layers)[:, None] * nodes + node) * (groups + 1) + group
    counts = np.bincount(ids.ravel(), minlength=layers * nodes * (groups + 1))
    held = counts.reshape(layers, nodes, groups + 1)[:, :, :groups].astype(float)
    home = np.full((layers, groups), -1)
    room = np.full((layers, nodes), groups // nodes)
    every = np.arange(layers)
    for _ in range(groups):
        best = held.reshape(layers, -1).argmax(1)
        to, which = best // groups, best % groups
        home[every, which] = to
        room[every, to] -= 1
        held[every, :, which] = -1.0
        held[room == 0] = -1.0
    return _swapped_groups(load.reshape(layers, groups, -1).sum(-1), home, nodes)


def _swapped_groups(load: Floats, home: Ints, nodes: int) -> Ints:
    """Groups of the heaviest and the lightest node change places while that gains enough."""
    layers, groups = load.shape
    enough = _GROUP_GAIN * load.sum(1) / nodes
    every = np.arange(layers)
    for _ in range(groups * nodes):
        on = home[:, :, None] == np.arange(nodes)
        total = (load[:, :, None] * on).sum(1)
        heavy, light = total.argmax(1), total.argmin(1)
        delta = load[:, :, None] - load[:, None, :]
        top, low = total[every, heavy], total[every, light]
        after = np.maximum(top[:, None, None] - delta, low[:, None, None] + delta)
        after[~(on[every, :, heavy][:, :, None] & on[every, :, light][:, None, :])] = np.inf
        best = after.reshape(layers, -1).argmin(1)
        better = np.flatnonzero(after.reshape(layers, -1)[every, best] < top - enough)
        if not len(better):
            break
        home[better, best[better] // groups] = light[better]
        home[better, best[better] % groups] = heavy[better]
    return home

"""The search behind ``place``: replicas first, then swaps, over all layers at once.

Cost grows with what has to change: layers that are balanced leave the loops at once. Everything is
deterministic, so that every rank that computes it from the same numbers finds the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EMPTY = -1

_SLACK = 0.1  # a replica may be this much heavier than the least possible before it is split
_REPLICA = 0.35  # of a device's mean load; lighter replicas pack well enough to be left alone
_REPLICA_PER_WANTED = 0.75  # more of it where less balance is wanted
_OTHER_NODE = 0.05  # of the mean load: what another node for a replica may cost
_PAIR_ROUNDS = 8
_LAST_ROUNDS = 40
_GAIN = 5e-4  # of the mean load: what a swap has to bring
_REACHED = np.float32(1.0 + 1e-6)


def improve(load: Floats, current: Ints, devices: int, nodes: int, wanted: Floats) -> Ints:
    """See ``place``; no device holds an expert twice in ``current``, nor in what is returned."""
    return _Books(load, current, devices, nodes, wanted).solve()


class _Books:
    """One problem and all that is kept of it.

    Attributes:
        load: ``[layers, experts + 1]``; empty slots are replicas of a last expert without load.
        held: the expert in each slot, ``[layers, devices, slots]``.
        on: whether a device holds an expert, ``[layers, devices, experts + 1]``.
        counts: replicas of each expert, ``[layers, experts + 1]``.
        need: how many it shall have, likewise.
        share: the load of each replica, likewise.
        mean: load of a device, ``[layers]``; ``weight`` of each slot, ``total`` of each device and
            ``cap``, the wanted load of the heaviest, are in units of it.
    """

    def __init__(
        self, load: Floats, current: Ints, devices: int, nodes: int, wanted: Floats
    ) -> None:
        self.layers, self.experts = load.shape
        self.devices, self.nodes, self.wanted = devices, nodes, wanted
        self.slots = current.shape[1] // devices
        load = np.where(load.sum(1, keepdims=True) > 0, load, 1.0)  # without load: as if even
        self.load = np.concatenate([load, np.zeros((self.layers, 1))], 1)
        held = np.where(current == EMPTY, self.experts, current)
        self.held = held.reshape(self.layers, devices, self.slots).astype(np.int64)
        self.row = (np.arange(self.layers) * (self.experts + 1))[:, None]
        self.on = np.zeros((self.layers, devices, self.experts + 1), bool)
        np.put_along_axis(self.on, self.held, True, 2)
        self.counts = np.bincount((held + self.row).ravel(), minlength=self.load.size)
        self.counts = self.counts.reshape(self.load.shape)
        self.share = self.load / np.maximum(self.counts, 1)
        self.mean = load.sum(1) / devices
        self.cap = wanted.astype(np.float32)
        self.need = self._needed()

    def solve(self) -> Ints:
        """The better placement, ``[layers, devices * slots]``."""
        self._replicate()
        self._fill()
        held = self.held.reshape(self.layers, -1)
        # Halves of the memory traffic of the swaps; they need no more digits.
        share = (self.share / self.mean[:, None]).astype(np.float32)
        self.weight = np.take(share.ravel(), held + self.row).reshape(self.held.shape)
        self.total = self.weight.sum(-1)
        self._swap_pairs()
        self._swap_heaviest()
        return self.held.reshape(self.layers, -1)

    def _needed(self) -> Ints:
        """Replicas of each expert: as many as keep them light, and as fill all slots."""
        load, slots = self.load[:, :-1], self.devices * self.slots
        low, high = load.sum(1) / slots, load.max(1)
        for _ in range(16):  # bisection of the least weight of the heaviest replica
            middle = (low + high) / 2
            fits = np.maximum(np.ceil(load / middle[:, None]), 1).sum(1) <= slots
            high, low = np.where(fits, middle, high), np.where(fits, low, middle)
        light = (_REPLICA + _REPLICA_PER_WANTED * (self.wanted - 1.0)) * self.mean
        most = np.maximum(high * (1.0 + _SLACK), light)
        need = np.zeros(self.load.shape, np.int64)
        need[:, :-1] = np.clip(np.ceil(load / most[:, None]), 1, self.devices)
        for layer in np.flatnonzero(self.counts[:, -1]):
            self._fill_up(need[layer, :-1], layer)
        return need

    def _fill_up(self, need: Ints, layer: int) -> None:
        """Have replicas for all slots of a layer that has empty ones; the heaviest get more."""
        have = np.maximum(need, self.counts[layer, :-1])
        for _ in range(self.devices * self.slots - have.sum()):
            weight = np.where(have < self.devices, self.load[layer, :-1] / have, -1.0)
            expert = weight.argmax()
            have[expert] += 1
            need[expert] = have[expert]

    def _replicate(self) -> None:
        """Give experts the replicas they need, the heaviest first, each on the lightest device."""
        while True:
            waits = np.where(self.counts < self.need, self.share, -1.0)
            expert = waits.argmax(1)
            rows = np.flatnonzero(waits[np.arange(self.layers), expert] >= 0)
            if not len(rows):
                return
            expert = expert[rows]
            ids = self.held[rows] + self.row[rows][:, :, None]
            weight = np.take(self.share.ravel(), ids)
            total = np.einsum("lds->ld", weight)
            if self.nodes > 1:
                total += self._same_node(rows, expert) * (_OTHER_NODE * self.mean[rows])[:, None]
            total[self.on[rows, :, expert]] = np.inf
            gives = np.where(self.counts > self.need, self.share, -np.inf)
            after = (total[:, :, None] - np.take(gives.ravel(), ids)).reshape(len(rows), -1)
            slot = after.argmin(1)
            found = np.isfinite(after[np.arange(len(rows)), slot])
            # Every slot to spare is on a device that has the expert: it makes do with fewer.
            self.need[rows[~found], expert[~found]] = self.counts[rows[~found], expert[~found]]
            self._put(rows[found], slot[found], expert[found])

    def _same_node(self, rows: Ints, expert: Ints) -> NDArray[np.bool_]:
        on = self.on[rows, :, expert].reshape(len(rows), self.nodes, -1).any(-1)
        return np.repeat(on, self.devices // self.nodes, 1)

    def _put(self, rows: Ints, slot: Ints, expert: Ints) -> None:
        device, place = slot // self.slots, slot % self.slots
        old = self.held[rows, device, place]
        self.held[rows, device, place] = expert
        self.counts[rows, old] -= 1
        self.counts[rows, expert] += 1
        self.on[rows, device, old] = False
        self.on[rows, device, expert] = True
        for changed in (old, expert):
            counts = np.maximum(self.counts[rows, changed], 1)
            self.share[rows, changed] = self.load[rows, changed] / counts

    def _fill(self) -> None:
        """What is still empty takes the heaviest expert that its device does not hold."""
        for layer, device, place in np.argwhere(self.held == self.experts):
            weight = np.where(self.on[layer, device, :-1], -1.0, self.share[layer, :-1])
            slot = np.array([device * self.slots + place])
            self._put(np.array([layer]), slot, np.array([weight.argmax()]))

    def _swap_pairs(self) -> None:
        """Rounds in which every device above the cap swaps with another light one of its layer.

        The swap of a pair is the one that leaves the least load above the cap on both.
        """
        half = self.devices // 2
        for turn in range(_PAIR_ROUNDS if half else 0):
            rows = np.flatnonzero(self.total.max(1) > self.cap * _REACHED)
            if not len(rows):
                return
            order = np.argsort(self.total[rows], 1)
            # Every second round pairs anew, so that a pair with nothing to swap does not stay one.
            light = np.roll(order[:, :half], (turn // 2 + 1) * (turn % 2), 1)
            heavy = order[:, ::-1][:, :half]
            above = np.take_along_axis(self.total[rows], heavy, 1) > self.cap[rows][:, None]
            which, pair = np.nonzero(above)
            self._swap_each(rows[which], heavy[which, pair], light[which, pair])

    def _swap_each(self, rows: Ints, heavy: Ints, light: Ints) -> None:
        """The best swap of each pair of devices; a device is in one pair at most."""
        cap = self.cap[rows]
        over = self.total[rows, heavy] - cap
        room = self.total[rows, light] - cap
        gives, takes = self.held[rows, heavy], self.held[rows, light]
        delta = self.weight[rows, heavy][:, :, None] - self.weight[rows, light][:, None, :]
        left, right = over[:, None, None] - delta, room[:, None, None] + delta
        cost = np.maximum(left, right)
        cost *= np.float32(1e-3)  # among equals, the more even pair
        cost += np.maximum(left, 0.0, out=left)
        cost += np.maximum(right, 0.0, out=right)
        cost[self.on[rows[:, None], light[:, None], gives]] = np.inf
        cost.transpose(0, 2, 1)[self.on[rows[:, None], heavy[:, None], takes]] = np.inf
        best = cost.reshape(len(rows), -1).argmin(1)
        gain = np.maximum(over, room) - cost.reshape(len(rows), -1)[np.arange(len(rows)), best]
        good = gain > 4.0 * _GAIN * cap
        best, rows, heavy, light = best[good], rows[good], heavy[good], light[good]
        self._exchange(rows, heavy, best // self.slots, light, best % self.slots)

    def _swap_heaviest(self) -> None:
        """The heaviest device of each layer swaps with whichever other one helps most."""
        live = np.ones(self.layers, bool)
        for _ in range(_LAST_ROUNDS if self.devices > 1 else 0):
            rows = np.flatnonzero((self.total.max(1) > self.cap * _REACHED) & live)
            if not len(rows):
                return
            order = np.argsort(self.total[rows], 1)
            heavy, light = order[:, -1], order[:, : (self.devices + 1) // 2]
            chosen, best, after = self._best_swaps(rows, heavy, light)
            good = after < self.total[rows, heavy] - np.float32(_GAIN) * self.cap[rows]
            live[rows[~good]] = False
            slot, place = np.divmod(best, self.slots)
            self._exchange(rows[good], heavy[good], slot[good], chosen[good], place[good])

    def _best_swaps(self, rows: Ints, heavy: Ints, light: Ints) -> tuple[Ints, Ints, Floats]:
        """The swap of each heavy device with one of its light ones that leaves the lower maximum.

        Returns:
            The light device, the two slots as one number, and that maximum.
        """
        one, several = rows[:, None], heavy[:, None]
        delta = self.weight[rows, heavy][:, None, :, None] - self.weight[one, light][:, :, None]
        after = self.total[one, light][:, :, None, None] + delta  # [rows, light, slots, slots]
        np.maximum(after, self.total[rows, heavy][:, None, None, None] - delta, out=after)
        gives, takes = self.held[rows, heavy], self.held[one, light]
        has = self.on[one[:, :, None], light[:, :, None], gives[:, None]]
        np.putmask(after, np.broadcast_to(has[:, :, :, None], after.shape), np.inf)
        has = self.on[one[:, :, None], several[:, :, None], takes]
        np.putmask(after, np.broadcast_to(has[:, :, None, :], after.shape), np.inf)
        flat = after.reshape(len(rows), -1)
        n, best = np.arange(len(rows)), flat.argmin(1)
        which, swap = np.divmod(best, self.slots * self.slots)
        return light[n, which], swap, flat[n, best]

    def _exchange(self, rows: Ints, one: Ints, slot: Ints, other: Ints, place: Ints) -> None:
        """Swap ``slot`` of the devices ``one`` with ``place`` of the devices ``other``."""
        mine, theirs = self.held[rows, one, slot], self.held[rows, other, place]
        self.held[rows, one, slot], self.held[rows, other, place] = theirs, mine
        self.on[rows, one, mine] = self.on[rows, other, theirs] = False
        self.on[rows, one, theirs] = self.on[rows, other, mine] = True
        gone, come = self.weight[rows, one, slot], self.weight[rows, other, place]
        self.weight[rows, one, slot], self.weight[rows, other, place] = come, gone
        self.total[rows, one] += come - gone
        self.total[rows, other] += gone - come

"""Which KV to give up: what is least likely to be used again soon, the end of a prefix first.

Each block's uses are counted, also for a while after it has gone, and so is the turn of the
session that used it last. For each class of blocks (uses, turn) the hazard of being used again is
learned by age: uses per exposure (person-time), pooled over the classes where a class has seen
little. What is evicted is the leaf whose place brings the least: the lowest Gittins index of its
hazard from its age on. Ranking by what a place brings is the idea of LHD (Beckmann et al., NSDI
2018); the estimator, the session's turn and leaves first are ours. Time is counted in uses of
blocks. A tenant that takes more than its share gives up its own before anybody else's. What is
pinned is not given up while it is.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from xllm_kv.hazard import BUCKETS, STARTS, bucket, indices

Key = Hashable
Leaf = tuple[int, int, int, Key]
"""When it was used last, how deep it lies (less is deeper), a number, and its key."""

_USES = (2, 3)  # classes: used once, twice, more often
_POPULAR = 8  # a block used more often is a shared prefix and says nothing about a session
_CLASSES = 2 * 2 * (len(_USES) + 1)
_SAMPLE = 256  # blocks whose age is looked at in each round of learning
_ROUNDS = 16  # of learning while the cache's capacity in blocks is used
_LEAST_ROUND = 64
_DECAY = 0.97  # what a round counts for after the next
_PRIOR = 30.0  # uses that the pooled hazard counts for
GHOSTS = 4  # times the capacity


@dataclass(slots=True)
class _Block:
    uses: int
    used_at: int
    parent: Key | None
    depth: int
    turn: int
    online: bool
    tenant: str
    held: bool = False
    children: int = 0


class Reuse:
    """Ranks the blocks of one cache by predicted reuse.

    Args:
        capacity: how many blocks the cache holds.

    Attributes:
        tenant_share: of the capacity, above which a tenant's own blocks are given up first.
        pin_share: of the capacity, which may be pinned.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = max(1, capacity)
        self.tenant_share, self.pin_share = 1.0, 0.0
        self._pins: dict[Key, float] = {}  # until when, s
        self._pin_ends: list[tuple[float, int, Key]] = []
        self._blocks: dict[Key, _Block] = {}
        self._gone: OrderedDict[Key, None] = OrderedDict()
        self._names: list[Key] = []  # all blocks, for sampling
        self._places: dict[Key, int] = {}
        self._leaves = _heaps()
        self._counts: Counter[str] = Counter()  # blocks held, by tenant
        # The leaves once more of tenants that have been above their share: few can be.
        self._apart: dict[str, list[list[Leaf]]] = {}
        self._pushed = self._count = 0
        self._reused = [[0.0] * BUCKETS for _ in range(_CLASSES)]
        self._exposed = [[0.0] * BUCKETS for _ in range(_CLASSES)]
        self._now = 0
        self._since_round = 0
        self._random = random.Random(0)  # noqa: S311 - a sample, the same in every run
        self._learn()

    def uses(self, key: Key) -> int:
        """How often a block has been used, as far as is known."""
        block = self._blocks.get(key)
        return block.uses if block is not None else 0

    def used(self, keys: Sequence[Key], *, online: bool = True, tenant: str = "") -> None:
        """Note that a request uses these blocks.

        Args:
            keys: from the first block of its prompt on.
            online: whether it is online; the blocks of offline requests are given up first.
            tenant: whose they are, as no other tenant's request can use them.
        """
        self._now += len(keys)
        self._since_round += len(keys)
        turn = self._turn(keys)
        parent: Key | None = None
        for depth, key in enumerate(keys):
            block = self._blocks.get(key)
            if block is None:
                block = _Block(0, self._now, parent, depth, turn, online, tenant)
                self._blocks[key] = block
                self._places[key] = len(self._names)
                self._names.append(key)
                self._gone[key] = None
            else:
                self._reused[_class(block)][bucket(self._now - block.used_at)] += 1.0
                if not block.held:
                    self._gone.move_to_end(key)
            block.uses += 1
            block.used_at, block.turn = self._now, turn
            block.online = online or (block.online and block.uses > 1)
            if block.held and not block.children:
                self._push(key, block)
            parent = key
        if self._since_round >= max(_LEAST_ROUND, self._capacity // _ROUNDS):
            self._learn()
        while len(self._gone) > GHOSTS * self._capacity:
            self._forget(self._gone.popitem(last=False)[0])

    def pin(self, keys: Iterable[Key], until_s: float) -> None:
        """Give none of these up until then; the first of them, as far as the share for pins goes.

        Args:
            keys: from the first block of a prompt on.
            until_s: by the clock that :meth:`unpin` is told.
        """
        for key in keys:
            if key not in self._pins and len(self._pins) >= int(self.pin_share * self._capacity):
                return
            if until_s > self._pins.get(key, float("-inf")):
                self._pins[key] = until_s
                self._pushed += 1
                heapq.heappush(self._pin_ends, (until_s, self._pushed, key))

    def unpin(self, now_s: float) -> None:
        """Let go of what was pinned until now."""
        while self._pin_ends and self._pin_ends[0][0] <= now_s:
            until_s, _, key = heapq.heappop(self._pin_ends)
            if self._pins.get(key) != until_s:
                continue  # it was pinned again, for longer
            del self._pins[key]
            block = self._blocks.get(key)
            if block is not None and block.held and not block.children:
                self._push(key, block)

    def held(self, key: Key) -> None:
        """Note that the cache holds a block from now on; if no request used it, this does."""
        if key not in self._blocks:
            self.used([key])
        block = self._blocks[key]
        if block.held:
            return
        block.held = True
        self._count += 1
        self._counts[block.tenant] += 1
        if self._above(block.tenant) and block.tenant not in self._apart:
            self._set_apart(block.tenant)
        self._gone.pop(key, None)
        parent = self._blocks.get(block.parent) if block.parent is not None else None
        if parent is not None:
            parent.children += 1
        if not block.children:
            self._push(key, block)

    def lost(self, key: Key) -> None:
        """Note that the cache holds a block no more."""
        block = self._blocks[key]
        block.held = False
        self._count -= 1
        self._counts[block.tenant] -= 1
        self._gone[key] = None
        parent = self._blocks.get(block.parent) if block.parent is not None else None
        if parent is not None:
            parent.children -= 1
            if parent.held and not parent.children:
                self._push(block.parent, parent)

    def victims(self, count: int, free: Callable[[Key], bool]) -> list[Key]:
        """The blocks to give up, in this order; fewer than asked for where not so many are free.

        They count as held until :meth:`lost` is called. A parent goes after its children.

        Args:
            count: how many.
            free: whether a block may be given up now.
        """
        chosen: list[Key] = []
        kept: list[tuple[list[Leaf], Leaf]] = []
        while len(chosen) < count:
            leaves = self._worst()
            if leaves is None:
                break
            entry = heapq.heappop(leaves)
            key = entry[-1]
            if not free(key):
                kept.append((leaves, entry))
                continue
            chosen.append(key)
            self.lost(key)
        for leaves, entry in kept:
            heapq.heappush(leaves, entry)
        for key in reversed(chosen):
            self.held(key)
        return chosen

    def worth(self, key: Key) -> bool:
        """Whether a block is more likely to be used soon than what it would push out, or pinned."""
        if key in self._pins:
            return True
        leaves, block = self._worst(), self._blocks.get(key)
        if leaves is None or block is None or self._count < self._capacity:
            return True
        worst = self._blocks[leaves[0][-1]]
        mine, theirs = (
            (not self._above(one.tenant), *self._rank(_class(one), one.used_at))
            for one in (block, worst)
        )
        return mine >= theirs

    def clear(self) -> None:
        """Hold nothing any more; what was learned stays."""
        for key in [key for key, block in self._blocks.items() if block.held]:
            self._blocks[key].held = False
            self._gone[key] = None
        for block in self._blocks.values():
            block.children = 0
        self._count = 0
        self._counts.clear()
        self._apart.clear()

    def _turn(self, keys: Sequence[Key]) -> int:
        """Which turn of a session this is: one more than that of the deepest block known."""
        turn = 1
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            turn = block.turn + 1 if block.uses <= _POPULAR else 1
        return turn

    def _worst(self) -> list[Leaf] | None:
        """The heap that begins with the leaf to give up first; None without any."""
        above = [heaps for tenant, heaps in self._apart.items() if self._above(tenant)]
        own = self._worst_of(leaves for heaps in above for leaves in heaps)
        return own if own is not None else self._worst_of(self._leaves)

    def _worst_of(self, heaps: Iterable[list[Leaf]]) -> list[Leaf] | None:
        best: tuple[bool, float] | None = None
        found = None
        for number, leaves in enumerate(heaps):
            of = number % _CLASSES
            while leaves and not self._is_leaf(leaves[0], of):
                heapq.heappop(leaves)
            if not leaves:
                continue
            rank = self._rank(of, leaves[0][0])
            if best is None or rank < best:
                best, found = rank, leaves
        return found

    def _rank(self, of: int, used_at: int) -> tuple[bool, float]:
        """Lower is given up before: offline blocks, then what is unlikely to be used soon."""
        return of >= _CLASSES // 2, self._index[of][bucket(self._now - used_at)]

    def _above(self, tenant: str) -> bool:
        share = self.tenant_share
        return share < 1.0 and self._counts[tenant] > share * self._capacity

    def _set_apart(self, tenant: str) -> None:
        self._apart[tenant] = heaps = _heaps()
        for leaves, own in zip(self._leaves, heaps, strict=True):
            known = ((entry, self._blocks.get(entry[-1])) for entry in leaves)
            own += [entry for entry, block in known if block and block.tenant == tenant]
            heapq.heapify(own)

    def _tidy(self) -> None:
        """Drop what is no leaf any more, and the heaps of tenants far below their share."""
        self._counts += Counter()
        least = self.tenant_share * self._capacity / 2
        self._apart = {t: heaps for t, heaps in self._apart.items() if self._counts[t] > least}
        for heaps in (self._leaves, *self._apart.values()):
            if sum(map(len, heaps)) > 2 * self._count + _LEAST_ROUND:
                for of, leaves in enumerate(heaps):
                    leaves[:] = {e[-1]: e for e in leaves if self._is_leaf(e, of)}.values()
                    heapq.heapify(leaves)

    def _is_leaf(self, entry: Leaf, of: int) -> bool:
        block = self._blocks.get(entry[-1])
        return (
            block is not None
            and block.held
            and not block.children
            and entry[-1] not in self._pins
            and block.used_at == entry[0]
            and _class(block) == of
        )

    def _push(self, key: Key | None, block: _Block) -> None:
        self._pushed += 1
        entry = (block.used_at, -block.depth, self._pushed, key)
        heapq.heappush(self._leaves[_class(block)], entry)
        if block.tenant in self._apart:
            heapq.heappush(self._apart[block.tenant][_class(block)], entry)

    def _forget(self, key: Key) -> None:
        del self._blocks[key]
        place, last = self._places.pop(key), self._names.pop()
        if last != key:
            self._names[place] = last
            self._places[last] = place

    def _learn(self) -> None:
        if self._names:
            weight = len(self._names) / _SAMPLE * self._since_round
            for _ in range(_SAMPLE):
                block = self._blocks[self._names[self._random.randrange(len(self._names))]]
                self._exposed[_class(block)][bucket(self._now - block.used_at)] += weight
        self._since_round = 0
        self._tidy()
        pooled = [
            (sum(row[k] for row in self._reused) + 0.1)
            / (sum(row[k] for row in self._exposed) + 0.4 * (STARTS[k] + 1.0))
            for k in range(BUCKETS)
        ]
        self._index = [
            indices(
                [(reused[k] + _PRIOR) / (exposed[k] + _PRIOR / pooled[k]) for k in range(BUCKETS)]
            )
            for reused, exposed in zip(self._reused, self._exposed, strict=True)
        ]
        for rows in (self._reused, self._exposed):
            for row in rows:
                row[:] = [value * _DECAY for value in row]


def _heaps() -> list[list[Leaf]]:
    """Leaves by class, in each the one that was used longest ago first."""
    return [[] for _ in range(_CLASSES)]


def _class(block: _Block) -> int:
    """By whether the request is online, uses, and whether the session has had a turn before."""
    uses = sum(block.uses >= least for least in _USES)
    return ((2 if block.online else 0) * (len(_USES) + 1)) + 2 * uses + (block.turn > 1)

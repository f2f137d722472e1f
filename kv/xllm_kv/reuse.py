"""Which KV to give up: what is least likely to be used again soon, the end of a prefix first.

Each block's uses are counted, also for a while after it has gone, and so is the turn of the
session that used it last. For each class of blocks (uses, turn) the hazard of being used again is
learned by age: uses per exposure (person-time), pooled over the classes where a class has seen
little. What is evicted is the leaf whose place brings the least: the lowest Gittins index of its
hazard from its age on. Ranking by what a place brings is the idea of LHD (Beckmann et al., NSDI
2018); the estimator, the session's turn and leaves first are ours. Time is counted in uses of
blocks.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

Key = Hashable

_BUCKETS = 24  # ages 0, 1 to 2, 3 to 6 and so on, each twice as wide as the last
_STARTS = [2.0**k - 1.0 for k in range(_BUCKETS + 1)]
_USES = (2, 3)  # classes: used once, twice, more often
_POPULAR = 8  # a block used more often is a shared prefix and says nothing about a session
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
    held: bool = False
    children: int = 0


class Reuse:
    """Ranks the blocks of one cache by predicted reuse.

    Args:
        capacity: how many blocks the cache holds.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = max(1, capacity)
        self._blocks: dict[Key, _Block] = {}
        self._gone: OrderedDict[Key, None] = OrderedDict()
        self._names: list[Key] = []  # all blocks, for sampling
        self._places: dict[Key, int] = {}
        classes = 2 * 2 * (len(_USES) + 1)
        self._leaves: list[list[tuple[int, int, int, Key]]] = [[] for _ in range(classes)]
        self._pushed = self._count = 0
        self._reused = [[0.0] * _BUCKETS for _ in range(classes)]
        self._exposed = [[0.0] * _BUCKETS for _ in range(classes)]
        self._now = 0
        self._since_round = 0
        self._random = random.Random(0)  # noqa: S311 - a sample, the same in every run
        self._learn()

    def uses(self, key: Key) -> int:
        """How often a block has been used, as far as is known."""
        block = self._blocks.get(key)
        return block.uses if block is not None else 0

    def used(self, keys: Sequence[Key], *, online: bool = True) -> None:
        """Note that a request uses these blocks.

        Args:
            keys: from the first block of its prompt on.
            online: whether it is online; the blocks of offline requests are given up first.
        """
        self._now += len(keys)
        self._since_round += len(keys)
        turn = self._turn(keys)
        parent: Key | None = None
        for depth, key in enumerate(keys):
            block = self._blocks.get(key)
            if block is None:
                block = _Block(0, self._now, parent, depth, turn, online)
                self._blocks[key] = block
                self._places[key] = len(self._names)
                self._names.append(key)
                self._gone[key] = None
            else:
                self._reused[_class(block)][_bucket(self._now - block.used_at)] += 1.0
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

    def held(self, key: Key) -> None:
        """Note that the cache holds a block from now on; if no request used it, this does."""
        if key not in self._blocks:
            self.used([key])
        block = self._blocks[key]
        if block.held:
            return
        block.held = True
        self._count += 1
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
        kept: list[tuple[int, tuple[int, int, int, Key]]] = []
        while len(chosen) < count:
            found = self._worst()
            if found is None:
                break
            of, entry = found
            heapq.heappop(self._leaves[of])
            key = entry[-1]
            if not free(key):
                kept.append((of, entry))
                continue
            chosen.append(key)
            self.lost(key)
        for key in reversed(chosen):
            self.held(key)
        for of, entry in kept:
            heapq.heappush(self._leaves[of], entry)
        return chosen

    def worth(self, key: Key) -> bool:
        """Whether a block is more likely to be used soon than what it would push out."""
        found, block = self._worst(), self._blocks.get(key)
        if found is None or block is None or self._count < self._capacity:
            return True
        of, entry = found
        age = self._now - entry[0]
        mine = _class(block)
        rank = (block.online, self._index[mine][_bucket(self._now - block.used_at)])
        return rank >= (of >= len(self._leaves) // 2, self._index[of][_bucket(age)])

    def clear(self) -> None:
        """Hold nothing any more; what was learned stays."""
        for key in [key for key, block in self._blocks.items() if block.held]:
            self._blocks[key].held = False
            self._gone[key] = None
        for block in self._blocks.values():
            block.children = 0
        self._count = 0

    def _turn(self, keys: Sequence[Key]) -> int:
        """Which turn of a session this is: one more than that of the deepest block known."""
        turn = 1
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            turn = block.turn + 1 if block.uses <= _POPULAR else 1
        return turn

    def _worst(self) -> tuple[int, tuple[int, int, int, Key]] | None:
        """The leaf that is least likely to be used, with its class; offline ones before others."""
        best: tuple[bool, float] | None = None
        found = None
        for of, leaves in enumerate(self._leaves):
            while leaves and not self._is_leaf(leaves[0], of):
                heapq.heappop(leaves)
            if not leaves:
                continue
            age = self._now - leaves[0][0]
            rank = (of >= len(self._leaves) // 2, self._index[of][_bucket(age)])
            if best is None or rank < best:
                best, found = rank, (of, leaves[0])
        return found

    def _is_leaf(self, entry: tuple[int, int, int, Key], of: int) -> bool:
        block = self._blocks.get(entry[-1])
        return (
            block is not None
            and block.held
            and not block.children
            and block.used_at == entry[0]
            and _class(block) == of
        )

    def _push(self, key: Key | None, block: _Block) -> None:
        self._pushed += 1
        entry = (block.used_at, -block.depth, self._pushed, key)
        heapq.heappush(self._leaves[_class(block)], entry)

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
                self._exposed[_class(block)][_bucket(self._now - block.used_at)] += weight
        self._since_round = 0
        pooled = [
            (sum(row[k] for row in self._reused) + 0.1)
            / (sum(row[k] for row in self._exposed) + 0.4 * (_STARTS[k] + 1.0))
            for k in range(_BUCKETS)
        ]
        self._index = [
            _indices(
                [(reused[k] + _PRIOR) / (exposed[k] + _PRIOR / pooled[k]) for k in range(_BUCKETS)]
            )
            for reused, exposed in zip(self._reused, self._exposed, strict=True)
        ]
        for rows in (self._reused, self._exposed):
            for row in rows:
                row[:] = [value * _DECAY for value in row]


def _bucket(age: int) -> int:
    return min(_BUCKETS - 1, (age + 1).bit_length() - 1)


def _class(block: _Block) -> int:
    """By whether the request is online, uses, and whether the session has had a turn before."""
    uses = sum(block.uses >= least for least in _USES)
    return ((2 if block.online else 0) * (len(_USES) + 1)) + 2 * uses + (block.turn > 1)


def _indices(hazards: Sequence[float]) -> list[float]:
    """What keeping a block brings for the place that it takes, by the bucket of its age now.

    The largest ratio, over how long it is kept unless used before, of the probability of a use to
    the expected time until then: Gittins' index.
    """
    found = []
    for start in range(_BUCKETS):
        width = (_STARTS[start + 1] - _STARTS[start]) / 2.0  # in the middle of its bucket
        survives, lasted, best = 1.0, 0.0, 0.0
        for bucket in range(start, _BUCKETS):
            hazard = hazards[bucket]
            left = survives * math.exp(-hazard * width)
            lasted += (survives - left) / hazard if hazard > 0.0 else survives * width
            survives = left
            best = max(best, (1.0 - survives) / lasted)
            width = _STARTS[bucket + 2] - _STARTS[bucket + 1] if bucket + 2 <= _BUCKETS else 0.0
        found.append(best)
    return found

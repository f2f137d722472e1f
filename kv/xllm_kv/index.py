"""Which instance holds which KV blocks, in which tier: what routing reads.

Fed with vLLM's KV events; pure, so that the router and the simulator share it. A block is held
where all full-attention groups of an instance hold it: sliding-window and state-space groups say
nothing about a prefix. An event whose parent is not known here is not guessed at: its blocks are
left out and the instance's events are asked for again.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from xllm_kv.keys import KEY_BYTES, Key, chain, extras_of, normalised, root
from xllm_kv.snapshot import Held


class Tier(IntEnum):
    """Where KV lies, fastest first."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    REMOTE = 3


MEDIA: Mapping[str | None, Tier] = {
    None: Tier.DEVICE,
    "GPU": Tier.DEVICE,
    "CPU": Tier.HOST,
    "STORAGE": Tier.DISK,
}
"""Tiers by what vLLM's events call a medium; others are remote."""

MOST_BLOCKS = 8_000_000


class Match(NamedTuple):
    """How much of a prompt an instance holds, from its first token on.

    Attributes:
        tokens: of the prefix in each tier, shape ``[4]``: on the device, then what follows it in
            host memory, on disk, and in a remote store. What lies on the device behind a hole is
            of no use, since vLLM looks there first and no further than to the hole.
    """

    tokens: tuple[int, int, int, int]

    @property
    def total(self) -> int:
        """Tokens of the prefix in whatever tier."""
        return sum(self.tokens)


NOTHING = Match((0, 0, 0, 0))


@dataclass
class Counts:
    """What happened, for metrics.

    Attributes:
        stored: blocks that were added.
        removed: blocks that were taken away.
        unknown_parents: blocks that were left out because their parent is not known.
        unknown_removals: removals of blocks that are not known.
        dropped: blocks that were forgotten because the index was full.
    """

    stored: int = 0
    removed: int = 0
    unknown_parents: int = 0
    unknown_removals: int = 0
    dropped: int = 0


class Prompt:
    """A prompt whose keys are computed at most once for each block size.

    Args:
        model: its model's name.
        tokens: token ids.
        lora: its adapter's name.
        salt: its ``cache_salt``.
        approximate: whether the tokens only stand for the text, see :meth:`of_text`.
    """

    def __init__(
        self,
        model: str,
        tokens: Sequence[int],
        lora: str = "",
        salt: str = "",
        *,
        approximate: bool = False,
    ) -> None:
        self.model, self.tokens, self.approximate = model, tokens, approximate
        self._lora, self._salt = lora, salt
        self._keys: dict[int, list[Key]] = {}

    @classmethod
    def of_text(cls, model: str, text: bytes, salt: str = "", lora: str = "") -> Prompt:
        """A prompt of which only the text is known: four bytes stand for a token."""
        whole = text[: len(text) // 4 * 4]
        return cls(model, array("I", whole), lora, salt, approximate=True)

    def keys(self, block_tokens: int) -> list[Key]:
        """The keys of its full blocks."""
        if block_tokens not in self._keys:
            extras = extras_of(len(self.tokens) // block_tokens, self._lora, self._salt)
            begin = root(self.model, block_tokens)
            self._keys[block_tokens] = chain(begin, self.tokens, block_tokens, extras)
        return self._keys[block_tokens]


@dataclass
class _Holder:
    """One instance. Engines' hashes by group and tier lead to keys."""

    model: str
    block_tokens: int
    groups: Collection[int]
    bit: int
    keys: dict[tuple[int, Tier], dict[Any, Key]] = field(default_factory=dict)


class KvIndex:
    """The index. Methods that change it belong to one thread.

    Args:
        most_blocks: how many blocks are remembered over all instances; beyond them the oldest of
            the instance that stores are forgotten.
    """

    def __init__(self, most_blocks: int = MOST_BLOCKS) -> None:
        self.counts = Counts()
        self._most = most_blocks
        self._blocks = 0
        self._holders: dict[str, _Holder] = {}
        # For each tier, who holds a key: a bit for each instance.
        self._held: tuple[dict[Key, int], ...] = tuple({} for _ in Tier)
        # The same for what will be on devices soon, and when that is no longer believed.
        self._promised: dict[Key, int] = {}
        self._promises: deque[tuple[float, int, Sequence[Key]]] = deque()

    def __len__(self) -> int:
        """Blocks over all instances and tiers."""
        return self._blocks

    def add(
        self, instance: str, model: str, block_tokens: int, groups: Collection[int] = (0,)
    ) -> None:
        """Begin to follow an instance; what was known of it is forgotten.

        Args:
            instance: its id; one for each data-parallel rank.
            model: what its KV is of; only requests of the same name match.
            block_tokens: tokens of its KV blocks.
            groups: its KV cache groups with full attention.
        """
        self.remove(instance)
        used = {holder.bit for holder in self._holders.values()}
        bit = next(1 << n for n in range(len(used) + 1) if 1 << n not in used)
        self._holders[instance] = _Holder(model, block_tokens, tuple(groups), bit)

    def remove(self, instance: str) -> None:
        """Forget an instance."""
        if instance in self._holders:
            self.clear(instance)
            del self._holders[instance]

    def clear(self, instance: str, tier: Tier | None = None) -> None:
        """Forget what an instance holds, in one tier or in all."""
        holder = self._holders[instance]
        for (group, lies_in), keys in holder.keys.items():
            if tier is None or lies_in is tier:
                self._blocks -= len(keys)
                for key in keys.values():
                    self._unset(lies_in, key, holder.bit)
                holder.keys[group, lies_in] = {}
        if tier is None:
            for _, bit, promised in self._promises:
                if bit == holder.bit:
                    self._break(bit, promised)

    def apply(self, instance: str, events: Sequence[Any]) -> bool:
        """Take in events of an instance, in their order.

        Args:
            instance: who sent them.
            events: vLLM's ``BlockStored``, ``BlockRemoved`` and ``AllBlocksCleared``, or objects
                of these names with the same attributes.

        Returns:
            Whether all parents were known; if not, the events before these are needed.

        Raises:
            KeyError: the instance was never added.
        """
        holder = self._holders[instance]
        whole = True
        for event in events:
            kind = type(event).__name__
            if kind == "BlockStored":
                whole &= self._stored(holder, event)
            elif kind == "BlockRemoved":
                self._removed(holder, event)
            elif kind == "AllBlocksCleared":
                self.clear(instance, Tier.DEVICE)
        return whole

    def held(self, instance: str) -> list[Held]:
        """All that an instance holds, for :meth:`load` elsewhere."""
        return [
            Held(group, int(tier), list(keys), b"".join(keys.values()))
            for (group, tier), keys in self._holders[instance].keys.items()
        ]

    def load(self, instance: str, held: Held) -> None:
        """Add blocks that an instance holds by its own account."""
        holder, tier = self._holders[instance], Tier(held.tier)
        if held.group not in holder.groups:
            return
        keys = holder.keys.setdefault((held.group, tier), {})
        for place, name in enumerate(held.names):
            key = held.keys[place * KEY_BYTES : (place + 1) * KEY_BYTES]
            self._hold(holder, held.group, tier, name, key)
        self._shrink(holder, tier, keys)

    def note(self, instance: str, prompt: Prompt) -> None:
        """Take a prompt to be on an instance's device, whose events do not tell.

        The keys of its blocks stand for the engine's names of them.
        """
        holder = self._holders[instance]
        keys = holder.keys.setdefault((0, Tier.DEVICE), {})
        for key in prompt.keys(holder.block_tokens):
            self._hold(holder, 0, Tier.DEVICE, key, key)
        self._shrink(holder, Tier.DEVICE, keys)

    def promise(self, instance: str, prompt: Prompt, until_s: float) -> None:
        """A prompt is on its way to an instance, whose events will tell of it later.

        Args:
            instance: its id; one that is not followed is left alone.
            prompt: all of its full blocks are taken to be there.
            until_s: believe it until then; not before the last one's.
        """
        holder = self._holders.get(instance)
        if holder is None or holder.model != prompt.model:
            return
        keys = prompt.keys(holder.block_tokens)
        for key in keys:
            self._promised[key] = self._promised.get(key, 0) | holder.bit
        self._promises.append((until_s, holder.bit, keys))

    def expire(self, now_s: float) -> None:
        """Believe old promises no longer."""
        while self._promises and self._promises[0][0] <= now_s:
            _, bit, keys = self._promises.popleft()
            self._break(bit, keys)

    def _break(self, bit: int, keys: Sequence[Key]) -> None:
        for key in keys:
            left = self._promised.get(key, 0) & ~bit
            if left:
                self._promised[key] = left
            else:
                self._promised.pop(key, None)

    def match(self, prompt: Prompt) -> dict[str, Match]:
        """How much of a prompt each instance holds; those that hold nothing are left out.

        Takes time in proportion to the blocks of the longest match.
        """
        found: dict[str, Match] = {}
        for size in {h.block_tokens for h in self._holders.values() if h.model == prompt.model}:
            holders = {
                name: holder.bit
                for name, holder in self._holders.items()
                if holder.model == prompt.model and holder.block_tokens == size
            }
            lengths = self._lengths(prompt.keys(size), sum(holders.values()))
            for name, bit in holders.items():
                upto = lengths.get(bit, (0, 0, 0, 0))
                if upto[-1]:
                    steps = (b - a for a, b in zip((0, *upto), upto, strict=False))
                    found[name] = Match(tuple(step * size for step in steps))  # type: ignore[arg-type]
        return found

    def facts(self) -> dict[str, Any]:
        """Sizes and counts, as plain JSON types."""
        return {
            "blocks": self._blocks,
            "instances": {
                name: {
                    tier.name.lower(): sum(
                        len(keys) for (_, t), keys in holder.keys.items() if t is tier
                    )
                    for tier in Tier
                }
                for name, holder in self._holders.items()
            },
            **dataclasses.asdict(self.counts),
        }

    def _lengths(self, keys: Sequence[Key], everyone: int) -> dict[int, tuple[int, ...]]:
        """By an instance's bit: leading blocks on the device, then with those in slower tiers."""
        ends: dict[int, list[int]] = {}
        (on_device, *slower), promised = self._held, self._promised
        device = everyone  # who has held all blocks so far on the device
        alive = [everyone] * len(
            slower
        )  # and, from there on, in the first tiers of the slower ones
        block = 0
        for block, key in enumerate(keys):
            gone = device & ~(on_device.get(key, 0) | promised.get(key, 0))
            if gone:
                device ^= gone
                _ended(ends, Tier.DEVICE, gone, block)
            holds = device
            for index, held in enumerate(slower):
                holds |= held.get(key, 0)
                gone = alive[index] & ~holds
                if gone:
                    alive[index] ^= gone
                    _ended(ends, index + 1, gone, block)
            if not alive[-1]:
                break
        else:
            block = len(keys)
        for tier, still in enumerate((device, *alive)):
            _ended(ends, tier, still, block)
        return {bit: tuple(lengths) for bit, lengths in ends.items()}

    def _stored(self, holder: _Holder, event: Any) -> bool:
        group = getattr(event, "group_idx", None) or 0
        hashes = event.block_hashes
        if group not in holder.groups or event.block_size != holder.block_tokens:
            return True
        tier = _tier_of(event)
        if event.parent_block_hash is None:
            parent: Key | None = root(holder.model, holder.block_tokens)
        else:
            parent = self._key_of(holder, group, event.parent_block_hash)
        if parent is None:
            self.counts.unknown_parents += len(hashes)
            return False
        extras = normalised(getattr(event, "extra_keys", None))
        keys = holder.keys.setdefault((group, tier), {})
        names = zip(
            hashes, chain(parent, event.token_ids, holder.block_tokens, extras), strict=False
        )
        for name, key in names:
            self._hold(holder, group, tier, name, key)
        self._shrink(holder, tier, keys)
        return True

    def _hold(self, holder: _Holder, group: int, tier: Tier, name: Any, key: Key) -> None:
        keys = holder.keys[group, tier]
        if name in keys:
            return
        keys[name] = key
        self._blocks += 1
        self.counts.stored += 1
        others = (other for other in holder.groups if other != group)
        if all(name in holder.keys.get((other, tier), ()) for other in others):
            held = self._held[tier]
            held[key] = held.get(key, 0) | holder.bit

    def _shrink(self, holder: _Holder, tier: Tier, keys: dict[Any, Key]) -> None:
        while self._blocks > self._most and keys:
            self.counts.dropped += 1
            self._forget(holder, tier, keys, next(iter(keys)))

    def _removed(self, holder: _Holder, event: Any) -> None:
        group = getattr(event, "group_idx", None) or 0
        tier = _tier_of(event)
        if group not in holder.groups:
            return
        keys = holder.keys.get((group, tier), {})
        for name in event.block_hashes:
            if name in keys:
                self.counts.removed += 1
                self._forget(holder, tier, keys, name)
            else:
                self.counts.unknown_removals += 1

    def _forget(self, holder: _Holder, tier: Tier, keys: dict[Any, Key], name: Any) -> None:
        self._blocks -= 1
        self._unset(tier, keys.pop(name), holder.bit)

    def _unset(self, tier: Tier, key: Key, bit: int) -> None:
        held = self._held[tier]
        left = held.get(key, 0) & ~bit
        if left:
            held[key] = left
        else:
            held.pop(key, None)

    def _key_of(self, holder: _Holder, group: int, name: Any) -> Key | None:
        """The key of an engine's block, in whatever tier it lies."""
        for tier in Tier:
            key = holder.keys.get((group, tier), {}).get(name)
            if key is not None:
                return key
        return None


def _tier_of(event: Any) -> Tier:
    if getattr(event, "locality", None) == "REMOTE":
        return Tier.REMOTE
    return MEDIA.get(event.medium, Tier.REMOTE)


def _ended(ends: dict[int, list[int]], tier: int, bits: int, block: int) -> None:
    while bits:
        bit = bits & -bits
        ends.setdefault(bit, [0] * len(Tier))[tier] = block
        bits ^= bit

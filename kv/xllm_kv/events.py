"""vLLM's KV events as they come over the wire, put back into their order.

A publisher numbers its batches. What a subscriber has missed it asks for again, from the buffer
that the publisher keeps of its last batches; numbers that begin anew mean that the engine did, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

END_OF_REPLAY = -1


class BlockStored(msgspec.Struct, tag=True):
    """As in vLLM; fields that are not used here are left out."""

    block_hashes: list[Any]
    parent_block_hash: Any
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    locality: str | None = None


class BlockRemoved(msgspec.Struct, tag=True):
    """As in vLLM."""

    block_hashes: list[Any]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """As in vLLM."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, array_like=True):
    """What an engine's step published.

    Attributes:
        ts: when, in seconds since the epoch.
        events: what happened, in order.
        data_parallel_rank: whose scheduler it was.
    """

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class _OlderStored(msgspec.Struct, tag="BlockStored", array_like=True):
    """As vLLM up to 0.23 writes it: values without names."""

    block_hashes: list[Any]
    parent_block_hash: Any
    token_ids: list[int]
    block_size: int
    lora_id: Any = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None


class _OlderRemoved(msgspec.Struct, tag="BlockRemoved", array_like=True):
    """Likewise."""

    block_hashes: list[Any]
    medium: str | None = None
    group_idx: int | None = None


class _OlderCleared(msgspec.Struct, tag="AllBlocksCleared", array_like=True):
    """Likewise."""


class _OlderBatch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_OlderStored | _OlderRemoved | _OlderCleared]
    data_parallel_rank: int | None = None


_DECODER = msgspec.msgpack.Decoder(Batch)
_OLDER = msgspec.msgpack.Decoder(_OlderBatch)


def decoded(payload: bytes) -> Batch:
    """Read a batch of any vLLM since 0.23.

    Raises:
        ValueError: it is none of vLLM's.
    """
    try:
        return _DECODER.decode(payload)
    except msgspec.MsgspecError as error:
        try:
            older = _OLDER.decode(payload)
        except msgspec.MsgspecError:
            raise ValueError(f"a KV event batch cannot be read: {error}") from error
    return Batch(older.ts, [_newer(event) for event in older.events], older.data_parallel_rank)


def _newer(event: _OlderStored | _OlderRemoved | _OlderCleared) -> Event:
    if isinstance(event, _OlderStored):
        return BlockStored(
            event.block_hashes,
            event.parent_block_hash,
            event.token_ids,
            event.block_size,
            event.medium,
            event.extra_keys,
            event.group_idx,
        )
    if isinstance(event, _OlderRemoved):
        return BlockRemoved(event.block_hashes, event.medium, event.group_idx)
    return AllBlocksCleared()


class Ready(NamedTuple):
    """What a batch led to.

    Attributes:
        batches: what is to be applied now, in order.
        restart: whether what the publisher held is to be forgotten before.
        replay_from: the number from which batches are to be asked for again; None for no need.
    """

    batches: Sequence[Batch] = ()
    restart: bool = False
    replay_from: int | None = None


class Sequencer:
    """Puts one publisher's batches in order.

    Attributes:
        gaps: how often some were missing.
        lost: batches that could not be had again.
        restarts: how often the publisher began anew.
    """

    def __init__(self) -> None:
        self.gaps = self.lost = self.restarts = 0
        self._next, self._last_live = 0, -1
        self._kept: dict[int, Batch] = {}
        self._asked = False

    def received(self, number: int, batch: Batch, *, live: bool = True) -> Ready:
        """A batch has come.

        Args:
            number: its sequence number, from 0.
            batch: what it holds.
            live: whether it was published now, and not sent again.
        """
        restarted = live and number <= self._last_live
        if restarted:  # what is published is published in order
            self.restarts += 1
            self._next, self._kept, self._asked = 0, {}, False
        if live:
            self._last_live = number
        if number < self._next:
            return Ready()
        self._kept[number] = batch
        ready = self._in_order()
        replay_from = None
        if self._kept and not self._asked:
            self._asked = True
            self.gaps += 1
            replay_from = self._next
        return Ready(ready, restarted, replay_from)

    def replayed(self) -> Ready:
        """All has been sent again that the publisher still had.

        Some may be lost for good; then what the publisher held is to be forgotten.
        """
        self._asked = False
        lost = min(self._kept, default=self._next) - self._next
        self.lost += lost
        self._next += lost
        return Ready(self._in_order(), restart=lost > 0)

    def resumed(self, number: int) -> Ready:
        """All that was published before a batch is known from elsewhere.

        Args:
            number: of that batch; one that has been received already says that the publisher began
                anew. Live batches before it may still come, and are left alone.
        """
        self._next, self._asked = number, False
        self._last_live = min(self._last_live, number - 1)
        self._kept = {n: batch for n, batch in self._kept.items() if n >= number}
        return Ready(self._in_order())

    def _in_order(self) -> tuple[Batch, ...]:
        batches = []
        while self._next in self._kept:
            batches.append(self._kept.pop(self._next))
            self._next += 1
        return tuple(batches)

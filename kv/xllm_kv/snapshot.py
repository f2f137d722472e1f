"""All blocks that an engine holds, on the wire: what a router begins with that was not there."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from xllm_kv.keys import KEY_BYTES


class Held(msgspec.Struct, array_like=True):
    """Blocks of one KV cache group in one tier.

    Attributes:
        group: the number of the group.
        tier: of :class:`xllm_kv.index.Tier`.
        names: what the engine calls them, shape ``[n]``.
        keys: their keys one after the other, ``n * KEY_BYTES`` bytes.
    """

    group: int
    tier: int
    names: list[int | bytes]
    keys: bytes


class Snapshot(msgspec.Struct, array_like=True):
    """What an engine holds after a batch of its events.

    Attributes:
        model: what its keys begin with, and
        block_tokens: how many tokens stand for a block.
        number: of the first batch whose events are not in it.
        held: the blocks, by group and tier.
    """

    model: str
    block_tokens: int
    number: int
    held: list[Held]

    @classmethod
    def read(cls, payload: bytes) -> Snapshot:
        """From the wire.

        Raises:
            ValueError: it is none.
        """
        try:
            return _DECODER.decode(payload)
        except msgspec.MsgspecError as error:
            raise ValueError(f"this is no snapshot of KV blocks: {error}") from error

    def wire(self) -> bytes:
        """As bytes."""
        return msgspec.msgpack.encode(self)

    def parts(self, blocks: int) -> Iterator[Held]:
        """The same blocks, at most so many in one piece."""
        for one in self.held:
            for begin in range(0, len(one.names), blocks):
                end = begin + blocks
                keys = one.keys[begin * KEY_BYTES : end * KEY_BYTES]
                yield Held(one.group, one.tier, one.names[begin:end], keys)


_DECODER = msgspec.msgpack.Decoder(Snapshot)

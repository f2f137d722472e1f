"""Names of KV blocks that depend on tokens alone, so that every engine's blocks can be compared.

Engines name a block by a hash of their own (vLLM's depends on its algorithm and its seed). Here a
block of tokens is named by a 128-bit BLAKE2b of its tokens, of what else its KV depends on (LoRA
adapter, cache salt, images), and of the name of the block before it; the chain begins with the
model and the block size.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

KEY_BYTES = 16
Key = bytes
Extra = object
"""What one block's KV depends on beside its tokens, as vLLM's events give it; None for nothing."""


def root(model: str, block_tokens: int) -> Key:
    """What the chain of a prompt's keys begins with."""
    return blake2b(f"{block_tokens}:{model}".encode(), digest_size=KEY_BYTES).digest()


def chain(
    parent: Key, tokens: Sequence[int], block_tokens: int, extras: Sequence[Extra] | None = None
) -> list[Key]:
    """The keys of all full blocks of ``tokens``, in order.

    Args:
        parent: the key of the block before, or :func:`root`.
        tokens: token ids, shape ``[n]``; those after the last full block are left out.
        block_tokens: tokens of a block.
        extras: what each block depends on beside, shape ``[n // block_tokens]``; None for nothing.

    Raises:
        ValueError: a token is negative or above 2**32 - 1.
    """
    try:
        data = array("I", tokens).tobytes()
    except (OverflowError, TypeError) as error:
        raise ValueError(f"tokens hold what is no token id: {error}") from error
    size = block_tokens * array("I").itemsize
    keys = []
    for index in range(len(tokens) // block_tokens):
        made = blake2b(parent, digest_size=KEY_BYTES)
        made.update(data[index * size : (index + 1) * size])
        if extras is not None and extras[index]:
            made.update(repr(extras[index]).encode())
        parent = made.digest()
        keys.append(parent)
    return keys


def extras_of(blocks: int, lora: str = "", salt: str = "") -> list[Extra] | None:
    """What each block of a text prompt depends on, as vLLM's events say it.

    Args:
        blocks: how many there are.
        lora: the adapter's name.
        salt: the request's ``cache_salt``; it enters the first block alone.
    """
    if not blocks or not (lora or salt):
        return None
    every = (lora,) if lora else None
    first = tuple(part for part in (lora, salt) if part)
    return [first, *[every] * (blocks - 1)]


def normalised(extras: Iterable[object] | None) -> list[Extra] | None:
    """An event's extra keys with lists, which the wire makes of tuples, as tuples again."""
    return None if extras is None else [_frozen(extra) for extra in extras]


def _frozen(value: object) -> object:
    return tuple(_frozen(part) for part in value) if isinstance(value, (list, tuple)) else value

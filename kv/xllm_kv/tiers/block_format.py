"""One block of KV as bytes at rest, believed only if it is undamaged and the block asked for.

``magic (8) | length (8) | CRC-32 of name and content (4) | name's length (4) | name | content``,
all numbers little-endian.
"""

from __future__ import annotations

import struct
import zlib

_MAGIC = b"xllm-kv1"
_HEAD = struct.Struct("<8sQII")


class BlockError(Exception):
    """What was found is not the block."""


def head_of(name: bytes, content: memoryview) -> bytes:
    """What is written before a block's content.

    Args:
        name: what the block is, to be found again with it.
        content: its bytes.
    """
    checksum = zlib.crc32(content, zlib.crc32(name))
    return _HEAD.pack(_MAGIC, content.nbytes, checksum, len(name)) + name


def head_size(name: bytes) -> int:
    """The length of that, in bytes."""
    return _HEAD.size + len(name)


def checksum_in(head: bytes, name: bytes, length: int) -> int:
    """The checksum that a head tells.

    Args:
        head: of :func:`head_size` bytes, or less where there is no more.
        name: what the block must be.
        length: what its content must measure, in bytes.

    Raises:
        BlockError: it is short, damaged, or another block's.
    """
    if len(head) < head_size(name):
        raise BlockError("the block ends within its head")
    magic, found_length, checksum, name_length = _HEAD.unpack_from(head)
    if magic != _MAGIC or found_length != length or name_length != len(name):
        raise BlockError("the block is of another format or size")
    if head[_HEAD.size :] != name:
        raise BlockError("the block is another one")
    return int(checksum)


def verify(content: memoryview, name: bytes, checksum: int) -> None:
    """Compare a block's content with its checksum.

    Raises:
        BlockError: it is damaged.
    """
    if zlib.crc32(content, zlib.crc32(name)) != checksum:
        raise BlockError("the block is damaged")


def unpack(data: bytes, name: bytes, into: memoryview) -> None:
    """Take a block out of its bytes.

    Args:
        data: head and content.
        name: what the block must be.
        into: where its content goes; nothing is changed there by an error.

    Raises:
        BlockError: it is damaged, short, long, or another block.
    """
    begin = head_size(name)
    checksum = checksum_in(data[:begin], name, into.nbytes)
    content = memoryview(data)[begin:]
    if content.nbytes != into.nbytes:
        raise BlockError(f"the block has {content.nbytes} bytes of {into.nbytes}")
    verify(content, name, checksum)
    into[:] = content

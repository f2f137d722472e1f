"""One block of KV in one file: written whole or not at all, and believed only if it is undamaged.

``magic (8) | length (8) | CRC-32 of name and content (4) | name's length (4) | name | content``,
all numbers little-endian.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

_MAGIC = b"xllm-kv1"
_HEAD = struct.Struct("<8sQII")


class BlockFileError(Exception):
    """The file does not hold what its name says."""


def write_block(path: Path, name: bytes, content: memoryview) -> None:
    """Write a block; nobody ever finds a part of it.

    Args:
        path: of the file; its folder is made.
        name: what the block is, to be found again in the file.
        content: its bytes.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    head = _HEAD.pack(_MAGIC, content.nbytes, zlib.crc32(content, zlib.crc32(name)), len(name))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write_all(file, head + name)
            _write_all(file, content)
        finally:
            os.close(file)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _write_all(file: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def read_block(path: Path, name: bytes, into: memoryview) -> None:
    """Read a block.

    Args:
        path: of the file.
        name: what the block must be.
        into: where its bytes go; what is there is undefined after an error.

    Raises:
        OSError: there is none, or it cannot be read.
        BlockFileError: it is damaged, short, long, or another block.
    """
    with path.open("rb", buffering=0) as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise BlockFileError(f"{path} ends within its head")
        magic, length, checksum, name_length = _HEAD.unpack(head)
        if magic != _MAGIC or length != into.nbytes or name_length != len(name):
            raise BlockFileError(f"{path} is of another format or size")
        if file.read(name_length) != name:
            raise BlockFileError(f"{path} holds another block")
        rest = into
        while rest:
            count = file.readinto(rest)
            if not count:
                raise BlockFileError(f"{path} is {len(rest)} bytes short")
            rest = rest[count:]
        if file.read(1):
            raise BlockFileError(f"{path} is too long")
    if zlib.crc32(into, zlib.crc32(name)) != checksum:
        raise BlockFileError(f"{path} is damaged")

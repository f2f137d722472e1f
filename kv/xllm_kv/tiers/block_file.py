"""One block of KV in one file: written whole or not at all, and believed only if undamaged."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from xllm_kv.tiers.block_format import BlockError, checksum_in, head_of, head_size, verify


def write_block(path: Path, name: bytes, content: memoryview) -> None:
    """Write a block; nobody ever finds a part of it.

    Args:
        path: of the file; its folders are made.
        name: what the block is, to be found again in the file.
        content: its bytes.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write_all(file, head_of(name, content))
            _write_all(file, content)
        finally:
            os.close(file)
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
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
        BlockError: it is damaged, short, long, or another block.
    """
    with path.open("rb", buffering=0) as file:
        checksum = checksum_in(file.read(head_size(name)), name, into.nbytes)
        rest = into
        while rest:
            count = file.readinto(rest)
            if not count:
                raise BlockError(f"the block is {len(rest)} bytes short")
            rest = rest[count:]
        if file.read(1):
            raise BlockError("the block is too long")
    verify(into, name, checksum)

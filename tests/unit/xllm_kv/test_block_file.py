"""A file of KV is believed only if it is whole, undamaged, and the block that was asked for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from xllm_kv.tiers.block_file import read_block, write_block
from xllm_kv.tiers.block_format import BlockError, head_of, unpack

NAME, CONTENT = b"identity" + b"k" * 36, os.urandom(5000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "ab" / "abcd"
    write_block(written, NAME, memoryview(CONTENT))
    return written


def read(path: Path, name: bytes = NAME, size: int = len(CONTENT)) -> bytes:
    into = bytearray(size)
    read_block(path, name, memoryview(into))
    return bytes(into)


def test_what_was_written_is_read_and_nobody_else_may(path: Path) -> None:
    assert read(path) == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [found.name for found in path.parent.iterdir()] == ["abcd"]


def test_any_flipped_bit_is_noticed(path: Path) -> None:
    good = path.read_bytes()
    for place in (0, 9, 17, 21, 24, 60, 70, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(BlockError):
            read(path)


def test_any_length_but_the_right_one_is_noticed(path: Path) -> None:
    good = path.read_bytes()
    for length in (0, 10, 24, 50, 68, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(BlockError):
            read(path)
    path.write_bytes(good + b"x")
    with pytest.raises(BlockError, match="too long"):
        read(path)


def test_another_block_is_not_taken_for_it(path: Path) -> None:
    with pytest.raises(BlockError, match="another one"):
        read(path, NAME[:-1] + b"x")
    with pytest.raises(BlockError, match="another format or size"):
        read(path, size=len(CONTENT) - 1)


def test_a_missing_one_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_the_same_bytes_come_out_of_memory_or_are_refused() -> None:
    data = head_of(NAME, memoryview(CONTENT)) + CONTENT
    into = bytearray(len(CONTENT))
    unpack(data, NAME, memoryview(into))
    assert into == CONTENT
    for wrong in (data[:-1], data + b"x", data[:-1] + b"x", data[:20], b""):
        untouched = bytearray(len(CONTENT))
        with pytest.raises(BlockError):
            unpack(wrong, NAME, memoryview(untouched))
        assert not any(untouched)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.mkdir()
    (blocked / "inside").touch()
    with pytest.raises(OSError, match="file"):
        write_block(blocked, NAME, memoryview(CONTENT))
    assert [found.name for found in tmp_path.iterdir()] == ["file"]

"""A disk as a tier: one file for each chunk, believed only if its checksum is right."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext

from xllm_kv.report import Room
from xllm_kv.tiers.block_file import read_block, write_block
from xllm_kv.tiers.store import StoreTier


class DiskTier(StoreTier):
    """Keeps chunks in files under a folder of its model, dtype, layout and hash seed.

    Args:
        folder: of all models' chunks; made where it is missing, for this user alone.
        capacity: bytes that the files of this model may take.
    """

    name = "on disk"
    failures = (OSError,)

    def __init__(self, *args: Any, folder: str, capacity: int, **others: Any) -> None:
        super().__init__(*args, **others)
        self._root, self._folder = Path(folder), Path(folder)
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._most = max(1, capacity // self.block_size_bytes)
        self._kept: OrderedDict[bytes, None] = OrderedDict()

    @property
    def room(self) -> Room:
        """See the class above."""
        size = self.block_size_bytes
        return Room(len(self._kept) * size, self._most * size)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """See vLLM's class."""
        known = bytes(key) in self._kept and self._accepts(promotions=True)
        return LookupResult.HIT if known else LookupResult.MISS

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """See vLLM's class; the first of a prompt is given up last."""
        for key in reversed(list(keys)):
            if bytes(key) in self._kept:
                self._kept.move_to_end(bytes(key))

    def _lacking(self, keys: Collection[OffloadKey]) -> set[OffloadKey]:
        return {key for key in keys if bytes(key) not in self._kept}

    def _put(self, key: OffloadKey, content: memoryview) -> None:
        write_block(self._path(key), self._identity + key, content)

    def _get(self, key: OffloadKey, into: memoryview) -> None:
        read_block(self._path(key), self._identity + key, into)

    def _stored(self, keys: Collection[OffloadKey]) -> None:
        self._kept |= dict.fromkeys(bytes(key) for key in keys)
        self._tell(keys, removed=False)
        self._give_up_the_rest()

    def _unread(self, keys: Collection[OffloadKey], error: Exception | None) -> None:
        for key in list(keys)[:1]:
            self._give_up(bytes(key))

    def _give_up_the_rest(self) -> None:
        while len(self._kept) > self._most:
            self._prices.counts[self.tier_type].evicted += 1
            self._give_up(next(iter(self._kept)))

    def _give_up(self, key: bytes) -> None:
        self._kept.pop(key, None)
        with suppress(OSError):
            self._path(key).unlink()
        self._tell([OffloadKey(key)], removed=True)

    def _open(self) -> None:
        """Find what is there."""
        self._folder = self._root / self._identity.hex()[:32]
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._kept = OrderedDict.fromkeys(_found(self._folder))
        except OSError as error:
            self._failed(error)
        self._tell([OffloadKey(key) for key in self._kept], removed=False)
        self._give_up_the_rest()

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / name


def _found(folder: Path) -> list[bytes]:
    """The chunks that an earlier process left, the oldest first; what it had not finished goes."""
    found = []
    for directory in [path for path in folder.iterdir() if path.is_dir()]:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    found.append((entry.stat().st_mtime_ns, bytes.fromhex(entry.name)))
                except ValueError:
                    Path(entry.path).unlink(missing_ok=True)
                except FileNotFoundError:  # another instance has given it up
                    continue
    return [key for _, key in sorted(found)]

"""Damage to what KV tiers hold: files of the disk tier, values of the remote one."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from benchmarks.lab.redis_server import RedisServer

_BLOCKS = 0.86  # of all faults are of single blocks


@dataclass
class File:
    """A block on disk."""

    path: Path
    where: str = "disk"

    def read(self) -> bytes:
        """Its bytes; none where it has just gone."""
        with suppress(FileNotFoundError):
            return self.path.read_bytes()
        return b""

    def write(self, data: bytes) -> None:
        """Put others there; as many as fit."""
        with suppress(OSError):
            self.path.write_bytes(data)

    def remove(self) -> None:
        """Delete it."""
        self.path.unlink(missing_ok=True)


@dataclass
class Value:
    """A block in the store."""

    client: Any
    name: bytes | str
    where: str = "store"

    def read(self) -> bytes:
        """Its bytes."""
        return self.client.get(self.name) or b""

    def write(self, data: bytes) -> None:
        """Put others there; as many as fit."""
        with suppress(redis.RedisError):
            self.client.set(self.name, data)

    def remove(self) -> None:
        """Delete it."""
        self.client.delete(self.name)


Block = File | Value


class Faults:
    """Damages what tiers hold.

    Args:
        folder: of the disk tier.
        full: whether the folder's file system is small, and may be filled.
        store: the remote one.
        rng: what decides.
    """

    def __init__(self, folder: Path, full: bool, store: RedisServer, rng: random.Random) -> None:
        self._folder, self._store, self._rng = folder, store, rng
        self._filler = folder / "filler"
        self._stopped = False
        self._others: list[Callable[[], str | None]] = [
            *([self.fill] if full else []),
            self.kill_store,
            self.stop_store,
            self.drop_folder,
        ]

    def inject(self) -> str:
        """Do something, and name it."""
        while True:
            one = self._block if self._rng.random() < _BLOCKS else self._rng.choice(self._others)
            name = one()
            if name is not None:
                return name

    def _block(self) -> str | None:
        """Damage one block."""
        found = self._rng.choice((self._file, self._value))
        block, other = found(), found()
        if block is None or other is None:
            return None
        data = bytearray(block.read())
        name = self._rng.choice(("a bit flipped", "truncated", "deleted", "swapped"))
        if name == "deleted":
            block.remove()
        elif name == "swapped":
            block.write(other.read())
        elif name == "truncated":
            block.write(bytes(data[: self._rng.randrange(len(data) + 1)]))
        elif data:
            data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
            block.write(bytes(data))
        return f"{block.where}: {name}"

    def fill(self) -> str:
        """The disk is full, or is no longer."""
        if self._filler.exists():
            self._filler.unlink()
            return "disk: free again"
        with suppress(OSError), self._filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
        return "disk: full"

    def drop_folder(self) -> str | None:
        """A whole folder of the disk is gone."""
        folders = [path for path in self._folder.glob("*/*") if path.is_dir()]
        if not folders:
            return None
        folder = self._rng.choice(folders)
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
        return "disk: a folder deleted"

    def kill_store(self) -> str:
        """The store dies with all that it holds, or comes again."""
        self._go_on()
        if self._store.running:
            self._store.stop()
            return "store: killed"
        self._store.start()
        return "store: started"

    def stop_store(self) -> str | None:
        """The store takes connections and says nothing, or goes on."""
        if not self._store.running:
            return None
        if self._stopped:
            self._go_on()
            return "store: goes on"
        self._store.signal(signal.SIGSTOP)
        self._stopped = True
        return "store: silent"

    def _go_on(self) -> None:
        if self._stopped:
            self._store.signal(signal.SIGCONT)
            self._stopped = False

    def mend(self) -> None:
        """Undo what lasts."""
        self._filler.unlink(missing_ok=True)
        self._go_on()
        if not self._store.running:
            self._store.start()

    def _file(self) -> Block | None:
        files = sorted(path for path in self._folder.glob("*/*/*") if path.name[0] != ".")
        return File(self._rng.choice(files)) if files else None

    def _value(self) -> Block | None:
        if self._stopped or not self._store.running:
            return None
        client = redis.Redis(port=self._store.port)
        names = sorted(client.keys())
        return Value(client, self._rng.choice(names)) if names else None

"""Mooncake's store: memory of many machines behind one ``mooncake_master``.

With ``segment_gib`` its client gives memory of this instance to the store, and what lies there goes
with the instance.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from xllm_kv.tiers.remote_store import RemoteStore, StoreError

_PORT = 50051
_REACH_S = 1.0  # its own client tries for more than a minute
_BUFFER_BYTES = 64 << 20  # of one process, through which values come and go
_GIB = 1 << 30
_AWAY = -900  # what it answers where nobody answered, or less
OPTIONS = {"segment_gib": "0", "protocol": "tcp", "devices": "", "metadata": "P2PHANDSHAKE"}
"""What may follow the address, and what it is otherwise: memory that this instance gives; tcp or
rdma; RDMA's devices; Mooncake's metadata server, or none."""


class MooncakeStore(RemoteStore):
    """``mooncake://MASTER[:PORT][?segment_gib=GIB&protocol=rdma&devices=NAMES&metadata=URL]``.

    Raises:
        ValueError: the address has another option, or no number where one has to be.
    """

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._master = (address.hostname or "", address.port or _PORT)
        self._options = OPTIONS | dict(parse_qsl(address.query, strict_parsing=bool(address.query)))
        if self._options.keys() != OPTIONS.keys():
            raise ValueError(f"options of a mooncake:// address are {', '.join(OPTIONS)}")
        self._given_bytes = int(float(self._options["segment_gib"]) * _GIB)
        self._opening = threading.Lock()
        self._client: Any = None

    def held(self, names: Sequence[str]) -> list[bool]:
        """See the class above; what it has it gives up for nothing else for some seconds."""
        found = self._opened().batch_is_exist(list(names))
        _check(min(found, default=0))
        return [one == 1 for one in found]

    def put(self, name: str, value: bytes) -> None:
        """See the class above; what is there stays as it is."""
        _check(self._opened().put(name, value))

    def get(self, name: str) -> bytes | None:
        """See the class above."""
        value = self._opened().get(name)
        if value:
            return bytes(value)
        if self.held([name]) == [True]:
            raise ConnectionError("who holds the value does not answer")
        return None

    def delete(self, name: str) -> None:
        """See the class above."""
        self._opened().remove(name, True)

    def close(self) -> None:
        """See the class above."""
        if self._client is not None:
            self._client.close()

    def _opened(self) -> Any:
        with self._opening:
            if self._client is None:
                self._client = self._open()
        return self._client

    def _open(self) -> Any:
        from mooncake.store import MooncakeDistributedStore

        with socket.create_connection(self._master, _REACH_S) as tried:
            here = tried.getsockname()[0]  # by which others reach this machine, too
        client, options = MooncakeDistributedStore(), self._options
        master = "{}:{}".format(*self._master)
        failed = client.setup(
            here, options["metadata"], self._given_bytes, _BUFFER_BYTES,
            options["protocol"], options["devices"], master,
        )  # fmt: skip
        if failed:
            raise ConnectionError(f"Mooncake's client could not be set up ({failed})")
        return client


def _check(code: int) -> None:
    if code <= _AWAY:
        raise ConnectionError(f"Mooncake's master does not answer ({code})")
    if code < 0:
        raise StoreError(f"Mooncake's store says {code}")

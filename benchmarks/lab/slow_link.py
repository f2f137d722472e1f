"""A TCP proxy whose bandwidth can be changed while it runs."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from math import inf

_PIECE = 1 << 16


class SlowLink:
    """Relays connections to a port of this machine.

    Args:
        target: that port.

    Attributes:
        port: where it listens.
        bytes_per_s: how fast each connection is, in each direction.
    """

    def __init__(self, target: int) -> None:
        self.bytes_per_s = inf
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # it was closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=pair, daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with source, sink, suppress(OSError):
            while data := source.recv(_PIECE):
                time.sleep(len(data) / self.bytes_per_s)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

"""One real Redis, in memory alone, empty again when it is started again."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator

from benchmarks.lab.server import ServerError, free_port

_START_S = 60.0


class RedisServer:
    """See the module. Needs ``redis-server`` (Debian's package has that name).

    Args:
        options: more of its options; ``--maxmemory`` and ``100mb`` for example.

    Attributes:
        port: where it answers, while it runs.
    """

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Run it until it answers.

        Raises:
            ServerError: it does not.
        """
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--save", "",
                   "--dir", "/tmp", *self._options]  # fmt: skip
        devnull = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=devnull, stderr=devnull)
        until_s = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > until_s or self._process.poll() is not None:
                raise ServerError("redis-server did not start")
            time.sleep(0.05)

    @property
    def running(self) -> bool:
        """Whether it has been started and not stopped since."""
        return self._process is not None and self._process.returncode is None

    def signal(self, number: int) -> None:
        """Send it one; SIGSTOP makes it silent."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """End it at once; it can be started again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


@contextlib.contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """One that runs until the block ends."""
    server = RedisServer(*options)
    try:
        server.start()
        yield server
    finally:
        server.stop()

"""One real ``mooncake_master``, which knows of nothing when it is started again."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lab.server import ServerError, free_port

_START_S = 20.0


def find_master() -> Path | None:
    """The program, which comes with Mooncake's package; None where that is not installed."""
    package = importlib.util.find_spec("mooncake")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0], "mooncake_master")


class MooncakeMaster:
    """See the module.

    Attributes:
        port: where it answers, while it runs.
    """

    def __init__(self) -> None:
        self.port, self._metrics_port = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, segment_gib: float = 0.0) -> str:
        """Its address for an instance that gives it so much memory."""
        return f"mooncake://127.0.0.1:{self.port}?segment_gib={segment_gib}"

    def start(self) -> None:
        """Run it until it answers.

        Raises:
            ServerError: it does not.
        """
        command = [str(find_master()), f"--rpc_port={self.port}", "--rpc_address=127.0.0.1",
                   f"--metrics_port={self._metrics_port}"]  # fmt: skip
        devnull = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=devnull, stderr=devnull)
        until_s = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > until_s or self._process.poll() is not None:
                raise ServerError("mooncake_master did not start")
            time.sleep(0.05)

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
def mooncake_master() -> Iterator[MooncakeMaster]:
    """One that runs until the block ends."""
    master = MooncakeMaster()
    try:
        master.start()
        yield master
    finally:
        master.stop()

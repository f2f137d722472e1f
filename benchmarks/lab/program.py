"""One real program that servers need, such as a store: started and ended as often as wanted."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.lab.server import ServerError

_START_S = 60.0


class Program:
    """See the module.

    Args:
        command: what runs it.
        port: of the loopback interface, where it answers while it runs.
    """

    def __init__(self, command: Sequence[str], port: int) -> None:
        self.port = port
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it has been started and not stopped since."""
        return self._process is not None and self._process.returncode is None

    def start(self) -> None:
        """Run it until it answers.

        Raises:
            ServerError: it does not.
        """
        devnull = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=devnull, stderr=devnull)
        until_s = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > until_s or self._process.poll() is not None:
                raise ServerError(f"{Path(self._command[0]).name} did not start")
            time.sleep(0.05)

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


AnyProgram = TypeVar("AnyProgram", bound=Program)


@contextlib.contextmanager
def kept_running(program: AnyProgram) -> Iterator[AnyProgram]:
    """A program that runs until the block ends."""
    try:
        program.start()
        yield program
    finally:
        program.stop()

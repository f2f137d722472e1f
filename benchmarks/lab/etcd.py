"""One real etcd, with its data kept while it is stopped."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from benchmarks.lab.server import ServerError, free_port

_START_S = 60.0


class EtcdServer:
    """See the module. Needs ``etcd`` (Debian: etcd-server).

    Attributes:
        url: where it answers, while it runs.
    """

    def __init__(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._peer = f"http://127.0.0.1:{free_port()}"
        self._data = tempfile.mkdtemp(prefix="etcd-")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run it until it answers.

        Raises:
            ServerError: it does not.
        """
        command = ["etcd", "--data-dir", self._data, "--listen-client-urls", self.url,
                   "--advertise-client-urls", self.url, "--listen-peer-urls", self._peer,
                   "--initial-advertise-peer-urls", self._peer,
                   "--initial-cluster", f"default={self._peer}"]  # fmt: skip
        devnull = subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdout=devnull, stderr=devnull)
        until_s = time.monotonic() + _START_S
        while not self._answers():
            if time.monotonic() > until_s:
                raise ServerError("etcd did not start")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it at once; it can be started again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def clean(self) -> None:
        """End it and drop its data."""
        self.stop()
        shutil.rmtree(self._data)

    def _answers(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(self.url + "/health", timeout=1).close()
            return True
        return False


@contextlib.contextmanager
def etcd_server() -> Iterator[EtcdServer]:
    """One that runs until the block ends."""
    server = EtcdServer()
    try:
        server.start()
        yield server
    finally:
        server.clean()

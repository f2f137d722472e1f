"""One real etcd, with its data kept while it is stopped."""

from __future__ import annotations

import contextlib
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator

from benchmarks.lab.program import Program, kept_running
from benchmarks.lab.server import free_port


class EtcdServer(Program):
    """See the module. Needs ``etcd`` (Debian: etcd-server).

    Args:
        data: the folder of its data.

    Attributes:
        url: where it answers, while it runs.
    """

    def __init__(self, data: str) -> None:
        port = free_port()
        self.url, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
        command = ["etcd", "--data-dir", data, "--listen-client-urls", self.url,
                   "--advertise-client-urls", self.url, "--listen-peer-urls", peer,
                   "--initial-advertise-peer-urls", peer,
                   "--initial-cluster", f"default={peer}"]  # fmt: skip
        super().__init__(command, port)

    def _answers(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(self.url + "/health", timeout=1).close()
            return True
        return False


@contextlib.contextmanager
def etcd_server() -> Iterator[EtcdServer]:
    """One that runs until the block ends."""
    with (
        tempfile.TemporaryDirectory(prefix="etcd-") as data,
        kept_running(EtcdServer(data)) as server,
    ):
        yield server

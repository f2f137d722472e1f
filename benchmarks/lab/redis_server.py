"""One real Redis, in memory alone, empty again when it is started again."""

from __future__ import annotations

from contextlib import AbstractContextManager

from benchmarks.lab.program import Program, kept_running
from benchmarks.lab.server import free_port


class RedisServer(Program):
    """See the module. Needs ``redis-server`` (Debian's package has that name).

    Args:
        options: more of its options; ``--maxmemory`` and ``100mb`` for example.
    """

    def __init__(self, *options: str) -> None:
        port = free_port()
        place = ("--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", "/tmp")
        super().__init__(["redis-server", *place, *options], port)

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}"


def redis_server(*options: str) -> AbstractContextManager[RedisServer]:
    """One that runs until the block ends."""
    return kept_running(RedisServer(*options))

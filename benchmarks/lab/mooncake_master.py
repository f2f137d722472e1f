"""One real ``mooncake_master``, which knows of nothing when it is started again."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.lab.program import Program, kept_running
from benchmarks.lab.server import free_port


def find_master() -> Path | None:
    """The program, which comes with Mooncake's package; None where that is not installed."""
    package = importlib.util.find_spec("mooncake")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0], "mooncake_master")


class MooncakeMaster(Program):
    """See the module."""

    def __init__(self) -> None:
        port = free_port()
        place = (f"--rpc_port={port}", "--rpc_address=127.0.0.1", f"--metrics_port={free_port()}")
        super().__init__([str(find_master()), *place], port)

    def url(self, segment_gib: float = 0.0) -> str:
        """Its address for an instance that gives it so much memory."""
        return f"mooncake://127.0.0.1:{self.port}?segment_gib={segment_gib}"


def mooncake_master() -> AbstractContextManager[MooncakeMaster]:
    """One that runs until the block ends."""
    return kept_running(MooncakeMaster())

"""The example of a whole cluster runs to its end: etcd, a router, servers, moved KV, roles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.lab.model import ROOT

pytestmark = pytest.mark.serve
_LIMIT_S = 1700.0


def test_the_cluster_example_shows_all_that_it_promises(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.cluster.run", "--instances", "2", "--once"]
    shown = tmp_path / "shown"
    with shown.open("wb") as out:
        example = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            status = example.wait(_LIMIT_S)
        finally:
            _end(example)
    text = shown.read_text()
    assert status == 0, text
    for line in (
        "2 servers have registered themselves",
        "The capital of France is Paris.",
        "the same, streamed in",
        "tools: weather(",
        "batch: 8 of 8 requests answered",
        ": the same answer",
        "roles changed twice while an answer of",
        "stopped",
    ):
        assert line in text, text


def _end(example: subprocess.Popen[bytes]) -> None:
    """Ends it with all its servers, which would take the cores from every test after this one."""
    if example.poll() is not None:
        return
    servers = psutil.Process(example.pid).children(recursive=True)
    example.kill()
    example.wait()
    for server in servers:
        server.kill()

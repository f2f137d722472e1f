"""NIXL's progress thread leaves the cores to those who compute, on vLLM's CPU platform."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xllm_kv.connector import _calm_nixl
from xllm_plugins.compat import inspect_seam, nixl_progress

pytestmark = pytest.mark.vllm

# Of a real agent, the CPU time that it takes while nothing is transferred.
IDLES = """
import os, time
from nixl._api import nixl_agent, nixl_agent_config
from xllm_plugins.compat import nixl_progress
if {waits}:
    nixl_progress.wait_for_events()
    nixl_progress.wait_for_events()  # which changes nothing
agent = nixl_agent("idle", nixl_agent_config(capture_telemetry=True))
before = time.process_time()
time.sleep(1.0)
print(time.process_time() - before, flush=True)
os._exit(0)  # the end of an agent at a process's end is not NIXL's best side
"""


def cpu_seconds(*, waits: bool) -> float:
    script = IDLES.format(waits=waits)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(ran.stdout.splitlines()[-1])


def test_the_seam_holds() -> None:
    report = inspect_seam("nixl_progress")
    assert report.holds, report.reason


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (["NixlConnector"], 1),
        (["TiersConnector"], 0),
        (["TiersConnector", "NixlConnector"], 1),
    ],
)
def test_our_connector_asks_for_it_where_it_has_nixl(
    names: list[str], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(nixl_progress, "wait_for_events", lambda: calls.append(None))
    _calm_nixl([{"kv_connector": name} for name in names])
    assert len(calls) == asked


def test_an_idle_agent_takes_no_core() -> None:
    assert cpu_seconds(waits=True) < 0.5 * cpu_seconds(waits=False)

"""The framework and the policies import neither torch nor vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest

REPORT = """
import importlib, sys
importlib.import_module(sys.argv[1])
found = {name.partition(".")[0] for name in sys.modules}
print(*sorted(found & {"torch", "vllm"}))
"""


@pytest.mark.parametrize(
    "module",
    [
        "xllm_eplb.placement",
        "xllm_eplb.plugin",
        "xllm_eplb.policy",
        "xllm_kv.events",
        "xllm_kv.index",
        "xllm_kv.ledger",
        "xllm_kv.plugin",
        "xllm_kv.prices",
        "xllm_kv.report",
        "xllm_kv.reuse",
        "xllm_kv.tiers.block_file",
        "xllm_plugins.activation",
        "xllm_plugins.cli",
        "xllm_plugins.compat.eplb_phase",
        "xllm_plugins.compat.scheduler_levers",
        "xllm_plugins.hookspecs",
        "xllm_plugins.latency",
        "xllm_plugins.metrics",
        "xllm_plugins.vllm_entry",
        "xllm_scheduler.classes",
        "xllm_scheduler.config",
        "xllm_scheduler.engine.policy",
        "xllm_plugins.steps",
        "xllm_scheduler.plugin",
        "xllm_scheduler.service.app",
        "xllm_scheduler.service.fleet",
        "xllm_scheduler.service.member",
        "xllm_scheduler.simulate.command",
        "xllm_scheduler.simulate.measure",
        "xllm_scheduler.simulate.profiles",
        "xllm_scheduler.simulate.traces",
        "xllm_spec_decode.length",
        "xllm_spec_decode.plugin",
        "xllm_spec_decode.speculator",
    ],
)
def test_it_imports_without_torch_and_vllm(module: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", REPORT, module], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []


def test_loading_every_plugin_imports_neither() -> None:
    script = REPORT + "\nfrom xllm_plugins.manager import registry; registry().sections()"
    # vLLM's CPU worker does not start in a process that has imported numba.
    script += "\nassert not {'torch', 'vllm', 'numba'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script, "xllm_plugins.manager"], check=True)

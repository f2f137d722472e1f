"""Other people's vLLM plugins keep working in every process after ours was chosen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.contract.children import run_child
from tests.unit.doubles import write_distribution

pytestmark = pytest.mark.vllm

# Built like vllm-ascend: one distribution with a platform, a general and an endpoint plugin.
PLATFORM = """
from vllm.platforms.cpu import CpuPlatform

class ForeignPlatform(CpuPlatform):
    pass
"""
PLUGIN = """
import os

def platform():
    return "foreign_platform.ForeignPlatform"

def general():
    with open(os.environ["FOREIGN_MARKER"], "a") as marker:
        marker.write(f"{os.getpid()} ")

class Endpoints:
    name = "foreign_endpoints"
    required_tasks = None

    def attach_router(self, app):
        pass

    async def init_state(self, engine_client, state, args):
        pass
"""
ENTRY_POINTS = {
    "vllm.platform_plugins": {"foreign": "foreign_plugin:platform"},
    "vllm.general_plugins": {"foreign_general": "foreign_plugin:general"},
    "vllm.endpoint_plugins": {"foreign_endpoints": "foreign_plugin:Endpoints"},
}
# The command line in the first process; then what the engine core and every worker do first.
SERVE = """
import json, os, subprocess, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
parser.parse_args(["--plugins", "xllm"])
child = subprocess.run([sys.executable, "-c", sys.argv[1]], check=True, stdout=subprocess.PIPE)
print(json.dumps({"VLLM_PLUGINS": os.environ["VLLM_PLUGINS"], **json.loads(child.stdout)}))
"""
CHILD = """
import json, os, sys
import vllm.plugins
from vllm.platforms import current_platform

vllm.plugins.load_general_plugins()
with open(os.environ["FOREIGN_MARKER"]) as marker:
    marked = marker.read().split()
endpoints = getattr(vllm.plugins, "load_endpoint_plugins", lambda tasks: None)(("generate",))
print(json.dumps({
    "platform": type(current_platform).__name__,
    "general": str(os.getpid()) in marked,
    "xllm": "xllm_plugins.activation" in sys.modules,
    "endpoints": endpoints and [plugin.name for plugin in endpoints],
}))
"""


def _serve(folder: Path, **env: str) -> Any:
    write_distribution(
        folder,
        "vllm_foreign",
        ENTRY_POINTS,
        {"foreign_plugin": PLUGIN, "foreign_platform": PLATFORM},
    )
    marker = folder / "marker"
    marker.touch()
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)]))
    return run_child(SERVE, CHILD, env={"PYTHONPATH": path, "FOREIGN_MARKER": str(marker), **env})


def test_they_load_in_child_processes_and_their_endpoints_stay_off(tmp_path: Path) -> None:
    served = _serve(tmp_path)
    assert served["general"]
    assert served["platform"] == "ForeignPlatform"
    assert served["xllm"]
    assert "foreign_endpoints" not in served["VLLM_PLUGINS"].split(",")
    assert served["endpoints"] in (["xllm"], None)  # None: this vLLM has no endpoint plugins


def test_the_list_that_an_operator_set_keeps_its_word(tmp_path: Path) -> None:
    served = _serve(tmp_path, VLLM_PLUGINS="foreign_general,xllm,foreign_endpoints")
    assert served["VLLM_PLUGINS"] == "foreign_general,xllm,foreign_endpoints"
    assert served["general"]
    assert served["platform"] == "CpuPlatform"  # it was not on the list
    assert served["xllm"]
    assert served["endpoints"] is None or set(served["endpoints"]) == {"foreign_endpoints", "xllm"}

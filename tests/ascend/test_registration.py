"""What loading our plugin does to a process that vllm-ascend's plugins load in, before or after."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.children import run_child
from tests.unit.doubles import write_distribution

ASCEND = {
    "ascend",
    "ascend_kv_connector",
    "ascend_model",
    "ascend_model_loader",
    "ascend_service_profiling",
}
ORDERS = """
import json, os, sys
from importlib.metadata import entry_points
import vllm.engine.arg_utils, vllm.plugins
from vllm.platforms import current_platform
from tests.contract.children import forked

def schedulers():
    return {name for name in sys.modules if name.startswith(("vllm.v1.core", "vllm_ascend.core"))}

def alone():
    os.environ["VLLM_PLUGINS"] = "ascend,xllm"
    before = schedulers()
    vllm.plugins.load_general_plugins()
    return {
        "platform": type(current_platform).__name__,
        "imported": sorted(schedulers() - before),
        "ours": "xllm_scheduler.plugin" in sys.modules,
    }

def together(*path):
    sys.path[:0] = path
    order = [entry.name for entry in entry_points(group="vllm.general_plugins")]
    vllm.plugins.load_general_plugins()
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    return {
        "first": order.index("xllm") < order.index("ascend_kv_connector"),
        "bases": [cls.__name__ for cls in AsyncScheduler.__mro__][:3],
        "listed": os.environ["VLLM_PLUGINS"].split(","),
    }

def seams():
    vllm.plugins.load_general_plugins()
    from xllm_plugins.compat import inspect_seam
    return [inspect_seam(name).reason for name in ("ascend_eplb", "ascend_proposer")]

str(current_platform.device_name)
print(json.dumps({
    "alone": forked(alone),
    "first": forked(lambda: together(sys.argv[1])),
    "seams": forked(seams),
    "last": forked(together),  # vllm-ascend stands in PYTHONPATH, before what is installed
}))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("first")
    entry = {"xllm": "xllm_plugins.vllm_entry:register"}
    write_distribution(folder, "ours", {"vllm.general_plugins": entry}, {})
    return run_child(ORDERS, str(folder), env={"XLLM_PLUGINS": "xllm"})


def _result(outcomes: Any, name: str) -> Any:
    assert outcomes[name]["error"] is None
    return outcomes[name]["result"]


def test_registration_imports_no_scheduler(outcomes: Any) -> None:
    found = _result(outcomes, "alone")
    assert found == {"platform": "NPUPlatform", "imported": [], "ours": True}


def test_the_seams_can_be_looked_at_before_a_worker_has_prepared_their_imports(
    outcomes: Any,
) -> None:
    assert _result(outcomes, "seams") == ["vllm-ascend 0.23.0"] * 2


@pytest.mark.parametrize("place", ["first", "last"])
def test_vllm_ascends_patches_are_under_the_schedulers_in_either_order(
    place: str, outcomes: Any
) -> None:
    found = _result(outcomes, place)
    assert found["first"] is (place == "first")
    assert found["bases"] == ["AsyncScheduler", "BalanceScheduler", "Scheduler"]
    assert ASCEND | {"xllm"} <= set(found["listed"])

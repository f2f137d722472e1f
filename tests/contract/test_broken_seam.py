"""An upstream that lost something we rely on: one feature is off and says why, the others go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab.engine import write_model
from tests.contract.children import run_child
from xllm_plugins.compat import vllm_version

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(vllm_version() != "0.32.0", reason="only there all of them can be on"),
]

LOST = {
    "eplb": ("eplb_policy", "vllm.distributed.eplb.eplb_state:EplbState.rearrange"),
    "kv": (
        "kv_connector",
        "vllm.distributed.kv_transfer.kv_connector.factory:"
        "KVConnectorFactory.get_connector_class_by_name",
    ),
    "scheduler": ("scheduler_levers", "vllm.v1.core.sched.scheduler:Scheduler._preempt_request"),
    "service": ("engine_status", "vllm.v1.engine.core_client:AsyncMPClient.call_utility_async"),
    "spec_decode": ("spec_proposer", "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample"),
}
START = """
import json, sys
from importlib import import_module
import vllm.plugins
from tests.contract.children import forked
from vllm.engine.arg_utils import EngineArgs
from xllm_plugins.compat import resolve_target

model, lost = sys.argv[1], json.loads(sys.argv[2])
for path in lost.values():
    import_module(path.partition(":")[0])

def start(path=None):
    if path is not None:
        owner, _, name = path.rpartition(".")
        delattr(resolve_target(owner), name)
    vllm.plugins.load_general_plugins()
    config = EngineArgs(model=model, skip_tokenizer_init=True).create_engine_config()
    return {row["feature"]: row for row in config.additional_config["xllm_report"]["features"]}

print(json.dumps({"": forked(start), **{name: forked(lambda: start(lost[name])) for name in lost}}))
"""
SETTINGS = {
    "kv": {"host_gib": 0.01},
    "service": {"routers": "http://127.0.0.1:9"},
    "spec_decode": {"mode": "auto"},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("model")
    write_model(folder)
    lost = json.dumps({feature: path for feature, (_, path) in LOST.items()})
    env = {"XLLM_PLUGINS": "xllm", "XLLM_CONFIG": json.dumps(SETTINGS)}
    return run_child(START, str(folder), lost, env=env)


def _rows(outcomes: Any, name: str) -> Any:
    assert outcomes[name]["error"] is None
    return outcomes[name]["result"]


def test_whole_upstream_has_every_feature_on_that_it_can(outcomes: Any) -> None:
    rows = _rows(outcomes, "")
    # EPLB needs experts, and a GPU unless it is made to do without.
    assert {name for name, row in rows.items() if row["active"]} == LOST.keys() - {"eplb"}, rows


@pytest.mark.parametrize("feature", LOST)
def test_one_that_lost_a_method_has_one_feature_off_and_the_others_on(
    feature: str, outcomes: Any
) -> None:
    seam, path = LOST[feature]
    whole, rows = _rows(outcomes, ""), _rows(outcomes, feature)
    off = rows.pop(feature)
    assert not off["active"]
    assert off["reason"].startswith(f"seam {seam} does not hold: {path} is not there: ")
    assert rows == {name: row for name, row in whole.items() if name != feature}

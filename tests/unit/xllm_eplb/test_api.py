"""What an instance tells of its experts' loads over HTTP, as its first worker has counted them."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.unit.xllm_eplb.loads import initial, skewed
from xllm_eplb import plugin
from xllm_eplb.balancer import Balancer
from xllm_eplb.command import LOADS_PATH, WINDOWS_PATH
from xllm_eplb.placement import device_load
from xllm_eplb.policy import Rules
from xllm_eplb.trace import Machine, window_of

MACHINE = Machine(100, 40e6, 40e6, 400e12, 3e12, 40e9, 1.0)
LOAD, FIRST = np.round(skewed(58, 256) * 1e4), initial(58, 256, 288)
DEVICES = 32


class Engine:
    """vLLM's client of an engine whose worker is this process."""

    def __init__(self, *, active: bool = True) -> None:
        self.engine_core, self._active = self, active

    async def call_utility_async(self, method: str, feature: str, command: Any) -> Any:
        if not self._active:
            return {"error": "xllm.eplb is not active and takes no command."}

        def collective_rpc(ask: Callable[[Any], Any]) -> list[Any]:
            return [ask(SimpleNamespace())]

        core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=collective_rpc))
        return json.loads(json.dumps(plugin.tell(core, command)))


@pytest.fixture
def balancer(monkeypatch: pytest.MonkeyPatch) -> Balancer:
    made = Balancer(Rules(), MACHINE)
    monkeypatch.setattr(plugin, "_balancer", made)
    return made


def client(engine: Engine | None) -> TestClient:
    app = FastAPI()
    plugin.endpoints(app)
    app.state.engine_client = engine
    return TestClient(app)


def test_loads_of_devices_and_what_was_decided_are_told_in_few_bytes(balancer: Balancer) -> None:
    balancer.rebalance(LOAD, 288, 8, 4, DEVICES, FIRST)
    answer = client(Engine()).get(LOADS_PATH)
    found = answer.json()
    assert answer.status_code == 200
    assert len(answer.content) < 10_000
    load = device_load(LOAD, FIRST, DEVICES)
    assert found["devices"] == np.rint(100 * load / load.mean(1, keepdims=True)).tolist()
    assert found["layer_outcomes"] == ["moved"] * 58
    assert sum(found["last_moves"]) == found["moves"] > 0
    balancer.rebalance(LOAD, 288, 8, 4, DEVICES, FIRST)
    again = client(Engine()).get(LOADS_PATH).json()
    assert sum(again["last_moves"]) == again["moves"] - found["moves"]


def test_before_the_first_plan_no_device_has_a_load(balancer: Balancer) -> None:
    found = client(Engine()).get(LOADS_PATH).json()
    assert (found["plans"], found["devices"]) == (0, [])


def test_windows_are_told_whole(balancer: Balancer) -> None:
    balancer.rebalance(LOAD, 288, 8, 4, DEVICES, FIRST)
    found = client(Engine()).get(f"{WINDOWS_PATH}?after=0").json()["windows"]
    assert window_of(found[0]).load.tolist() == LOAD.tolist()
    assert client(Engine()).get(f"{WINDOWS_PATH}?after=1").json()["windows"] == []


@pytest.mark.parametrize(
    ("engine", "status"), [(None, 503), (Engine(active=False), 404)], ids=["none", "inactive"]
)
def test_a_server_without_the_feature_says_so(engine: Engine | None, status: int) -> None:
    for path in (LOADS_PATH, WINDOWS_PATH):
        answer = client(engine).get(path)
        assert (answer.status_code, "error" in answer.json()) == (status, True)

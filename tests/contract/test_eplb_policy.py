"""vLLM's EPLB asks our planner, by its own contract, and keeps its policy where we have none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm.config.vllm
from vllm.distributed.eplb import eplb_state
from vllm.distributed.eplb.policy import AbstractEplbPolicy, DefaultEplbPolicy
from vllm.v1.worker.worker_base import WorkerWrapperBase

from xllm_eplb import plugin
from xllm_eplb.balancer import Balancer
from xllm_eplb.placement import Topology, check_placement, imbalance
from xllm_eplb.policy import Rules
from xllm_eplb.trace import Machine
from xllm_plugins.activation import REPORT_KEY, SETTINGS_KEY
from xllm_plugins.compat import eplb_policy, is_patched
from xllm_plugins.config import section_values
from xllm_plugins.errors import NotAvailableError
from xllm_plugins.features import Attachment

pytestmark = pytest.mark.vllm

MACHINE = Machine(100, 40e6, 40e6, 400e12, 3e12, 40e9, 1.0)
MODEL = SimpleNamespace(expert_weights=[[torch.zeros(9, 16, 8), torch.zeros(9, 4, 2)]] * 3)
AddModel = Callable[[Any, Any, Any], None]


def config_of(*, eplb: bool = True, active: bool = True, **options: Any) -> Any:
    settings = {"window_size": 50, "step_interval": 200, "use_async": False, "policy": "default"}
    parallel = SimpleNamespace(
        enable_eplb=eplb,
        eplb_config=SimpleNamespace(**{**settings, **options}),
        rank=0,
        data_parallel_rank=0,
    )
    rows = [{"feature": "eplb", "active": active}]
    additional = {
        REPORT_KEY: {"features": rows},
        SETTINGS_KEY: {"eplb": section_values(plugin.FEATURE.section())},
    }
    return SimpleNamespace(parallel_config=parallel, additional_config=additional)


@pytest.fixture
def add_model(monkeypatch: pytest.MonkeyPatch) -> AddModel:
    """``EplbState.add_model`` as far as it chooses a policy, with our seam over it."""

    def original(self: Any, model: Any, model_config: Any) -> None:
        self.policy = DefaultEplbPolicy

    monkeypatch.setattr(eplb_state.EplbState, "add_model", original)
    monkeypatch.setattr(eplb_state.EplbState, "step", eplb_state.EplbState.step)
    monkeypatch.setattr(WorkerWrapperBase, "execute_model", WorkerWrapperBase.execute_model)
    monkeypatch.setattr(plugin, "_balancer", None)
    plugin.install()
    plugin.install()  # every process may, several times
    patched: AddModel = eplb_state.EplbState.add_model
    return patched


def policy_in(
    config: Any, add_model: AddModel, monkeypatch: pytest.MonkeyPatch
) -> type[AbstractEplbPolicy]:
    monkeypatch.setattr(vllm.config.vllm, "get_current_vllm_config_or_none", lambda: config)
    state = SimpleNamespace(policy=None)
    add_model(state, MODEL, None)
    found: Any = state.policy
    assert issubclass(found, AbstractEplbPolicy)
    return found  # type: ignore[no-any-return]


def test_a_worker_plans_with_ours(add_model: AddModel, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_in(config_of(), add_model, monkeypatch)
    assert issubclass(policy, AbstractEplbPolicy)
    weight = torch.randint(0, 10**6, (3, 64), generator=torch.Generator().manual_seed(0))
    old = (torch.arange(72) % 64).repeat(3, 1)
    found = policy.rebalance_experts(weight, 72, 1, 1, 8, old)
    assert (found.shape, found.dtype, found.device.type) == (old.shape, torch.int64, "cpu")
    check_placement(found.numpy(), 64, Topology(8, 9))
    books = plugin.worker_books(None)
    assert books is not None
    assert books["plans"] == 1
    assert is_patched(WorkerWrapperBase, "execute_model")


@pytest.mark.parametrize("config", [None, config_of(active=False)], ids=["none", "inactive"])
def test_without_the_feature_vllms_policy_stays(
    config: Any, add_model: AddModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert policy_in(config, add_model, monkeypatch) is DefaultEplbPolicy
    assert not is_patched(WorkerWrapperBase, "execute_model")


def test_a_planner_keeps_what_it_was_given_while_vllms_map_changes() -> None:
    balancer = Balancer(Rules(), MACHINE)
    policy: Any = eplb_policy.policy_class(balancer.rebalance)
    old = (torch.arange(72) % 64).repeat(1, 1)
    policy.rebalance_experts(torch.arange(1, 65).repeat(1, 1) * 1000, 72, 1, 1, 8, old)
    before = old.tolist()
    old.zero_()
    assert balancer.windows(0)[0]["placement"] == before


def test_the_experts_size_is_that_of_their_tensors() -> None:
    found = eplb_policy._experts(MODEL)
    assert found == eplb_policy.Experts(bytes=(16 * 8 + 4 * 2) * 4, weights=16 * 8 + 4 * 2)


def test_what_ours_does_not_plan_vllms_default_does() -> None:
    balancer = Balancer(Rules(), MACHINE)
    policy: Any = eplb_policy.policy_class(balancer.rebalance)
    weight, old = torch.ones(1, 4), torch.arange(4).repeat(1, 2)  # two devices hold every expert
    ours = policy.rebalance_experts(weight, 8, 1, 1, 1, old)
    assert (ours == DefaultEplbPolicy.rebalance_experts(weight, 8, 1, 1, 1, old)).all()
    first = policy.rebalance_experts(weight, 8, 1, 1, 2, None)
    assert first.shape == (1, 8)


def test_the_balance_is_that_of_the_default_at_fewer_moves() -> None:
    rng = np.random.default_rng(0)
    law = np.arange(1, 65) ** -0.6 * 1e6
    weight = torch.from_numpy(np.stack([rng.permutation(law) for _ in range(4)]))
    old = (torch.arange(72) % 64).repeat(4, 1)
    policy: Any = eplb_policy.policy_class(Balancer(Rules(), MACHINE).rebalance)
    found, default = (
        one.rebalance_experts(weight, 72, 1, 1, 8, old).numpy()
        for one in (policy, DefaultEplbPolicy)
    )
    near = imbalance(weight.numpy(), found, 8) - imbalance(weight.numpy(), default, 8)
    assert near.max() < 0.03
    assert (found != old.numpy()).sum() < 0.6 * (default != old.numpy()).sum()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config_of(eplb=False), "--enable-eplb is not given"),
        (config_of(policy="own"), "--eplb-config.policy own is kept"),
    ],
)
def test_it_stands_back_with_a_reason(config: Any, reason: str) -> None:
    with pytest.raises(NotAvailableError) as raised:
        plugin.attach(Attachment(SimpleNamespace(), config, plugin.FEATURE.section()))
    assert str(raised.value) == reason


def test_it_attaches_where_vllms_eplb_is_on() -> None:
    attachment = Attachment(SimpleNamespace(), config_of(), plugin.FEATURE.section())
    assert plugin.attach(attachment) == "vllm.distributed.eplb.EplbState"


def test_the_engine_reports_what_its_first_worker_has_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    balancer = Balancer(Rules(), MACHINE)
    monkeypatch.setattr(plugin, "_balancer", balancer)
    asked: list[Any] = []

    def collective_rpc(ask: Callable[[Any], Any]) -> list[Any]:
        asked.append(ask)
        return [ask(SimpleNamespace()), None]

    engine_core = SimpleNamespace(model_executor=SimpleNamespace(collective_rpc=collective_rpc))
    assert inspect.unwrap(plugin.report)(engine_core).facts["plans"] == 0
    assert len(asked) == 1

"""Our balancer behind vllm-ascend's policy factory, planned and handed out by its own worker."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm_ascend.eplb.core import eplb_worker
from vllm_ascend.eplb.core.eplb_utils import generate_global_placement
from vllm_ascend.eplb.core.policy.policy_default_eplb import DefaultEplb
from vllm_ascend.eplb.core.policy.policy_factory import PolicyFactory

from tests.ascend.configs import EXPERTS, configured, decision
from xllm_eplb import plugin
from xllm_eplb.placement import imbalance
from xllm_plugins.errors import FeatureError

LAYERS, RANKS, SLOTS = 3, 4, 5  # four slots more than experts
STEPS = 600  # vllm-ascend's default
ON = {"eplb_config": {"dynamic_eplb": True, "num_redundant_experts": RANKS}}


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Any]:
    """A worker process' configuration with EPLB on."""
    made = configured(tmp_path, additional=ON)
    with set_current_vllm_config(made):
        yield made


def _maps() -> torch.Tensor:
    """vllm-ascend's first placement: the slot of each expert on each rank, -1 for none."""
    table = generate_global_placement(EXPERTS, RANKS, RANKS, 0)
    maps = torch.full((LAYERS, RANKS, EXPERTS), -1, dtype=torch.int32)
    for rank, experts in enumerate(table):
        maps[:, rank, experts.long()] = torch.arange(SLOTS, dtype=torch.int32)
    return maps


def _placement(maps: torch.Tensor) -> Any:
    """``[layers, all slots]``: the expert in each slot."""
    return maps.argsort(dim=2, stable=True)[:, :, -SLOTS:].reshape(LAYERS, -1).numpy()


def _tokens(seed: int, even: bool = False) -> Any:
    """``[layers, experts]``: tokens of a window."""
    law = np.arange(1, EXPERTS + 1) ** (0.0 if even else -0.8)
    order = np.random.default_rng(seed)
    return np.stack([order.permutation(law) for _ in range(LAYERS)]) * 4e6


def _load(maps: torch.Tensor, tokens: Any) -> torch.Tensor:
    """The same by slot, replicas sharing their expert's evenly."""
    placement = _placement(maps)
    replicas = np.stack([np.bincount(layer, minlength=EXPERTS) for layer in placement])
    share = np.take_along_axis(tokens / replicas, placement, 1)
    return torch.from_numpy(share.reshape(LAYERS, RANKS, SLOTS)).to(torch.int64)


def _worker(rank: int, shared: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    group = SimpleNamespace(rank_in_group=rank)
    monkeypatch.setattr(eplb_worker, "get_ep_group", lambda: group)
    return eplb_worker.EplbWorker(shared, policy_type=2)


def test_it_attaches_where_vllm_ascends_eplb_is_on(config: Any) -> None:
    row = decision(config, "eplb")
    assert row["active"], row["reason"]
    assert row["attached_to"] == "vllm_ascend.eplb.core.policy.policy_factory.PolicyFactory"


@pytest.mark.parametrize(
    ("additional", "reason"),
    [
        ({}, "eplb_config.dynamic_eplb in --additional-config is not true"),
        (
            {"eplb_config": {"dynamic_eplb": True, "eplb_policy_type": 1}},
            "eplb_policy_type 1 is kept; eplb.mode=on takes its place",
        ),
        (
            {"eplb_config": {"dynamic_eplb": True, "eplb_policy_type": 3}},
            "eplb_policy_type 3 is kept; it counts loads by stages",
        ),
        ({**ON, "mix_placement": True}, "with mix_placement shared experts would be moved as well"),
    ],
)
def test_it_stands_back_with_a_reason(
    additional: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = configured(tmp_path, additional=additional)
    assert decision(config, "eplb")["reason"] == reason
    with set_current_vllm_config(config):
        assert type(PolicyFactory.generate_policy(1)) is DefaultEplb


def test_with_mode_on_it_takes_the_place_of_a_policy_that_the_user_chose(tmp_path: Path) -> None:
    chosen = {"dynamic_eplb": True, "eplb_policy_type": 1}
    additional = {"eplb_config": chosen, "xllm": {"eplb": {"mode": "on"}}}
    assert decision(configured(tmp_path, additional=additional), "eplb")["active"]
    with pytest.raises(FeatureError, match="eplb_policy_type 3 is kept"):
        configured(
            tmp_path,
            additional={
                **additional,
                "eplb_config": chosen
                | {
                    "eplb_policy_type": 3,
                },
            },
        )


def test_the_experts_size_is_that_of_the_model(config: Any) -> None:
    (balancer,) = plugin.ascend_planner(config).args  # type: ignore[union-attr]
    machine = balancer._machine
    assert (machine.expert_weights, machine.expert_bytes) == (3 * 64 * 32, 2 * 3 * 64 * 32)
    assert machine.steps == STEPS


def test_uneven_load_is_balanced_and_every_rank_is_told_its_part(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, tokens = _maps(), _tokens(0)
    told, after = [], []
    for rank in range(RANKS):
        shared = {"expert_maps": before.clone(), "moe_load": _load(before, tokens)}
        told.append(_worker(rank, shared, monkeypatch).do_update())
        after.append(shared["expert_maps"])
    assert all(torch.equal(after[0], one) for one in after)

    old, new = _placement(before), _placement(after[0])
    assert imbalance(tokens, old, RANKS).min() > 1.2
    assert imbalance(tokens, new, RANKS).max() < 1.03
    for layer in range(LAYERS):
        sent = {(rank, *to) for rank in range(RANKS) for to in told[rank][layer][0]}
        taken = {
            (source, rank, expert)
            for rank in range(RANKS)
            for source, expert in told[rank][layer][1]
        }
        assert sent == taken
        arrived = {(rank, expert) for _, rank, expert in taken}
        held = before[layer] >= 0
        assert arrived == set(map(tuple, ((after[0][layer] >= 0) & ~held).nonzero().tolist()))
        assert all(held[source, expert] for source, _, expert in taken)
        for rank in range(RANKS):
            assert told[rank][layer][2] == after[0][layer, rank].tolist()
            stays = held[rank] & (after[0][layer, rank] >= 0)
            assert torch.equal(after[0][layer, rank][stays], before[layer, rank][stays].long())


def test_nothing_moves_where_nothing_is_gained(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = _maps()
    tokens = _tokens(0, even=True)
    tokens[:, _replicated(maps)] *= 2
    shared = {"expert_maps": maps, "moe_load": _load(maps, tokens)}
    told = _worker(0, shared, monkeypatch).do_update()
    assert [(send, receive) for send, receive, *_ in told] == [([], [])] * LAYERS
    assert torch.equal(shared["expert_maps"], maps.long())


def _replicated(maps: torch.Tensor) -> Any:
    return np.flatnonzero(np.bincount(_placement(maps)[0]) > 1)


def test_statistics_that_cannot_be_leave_the_experts_where_they_are(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = _maps()
    shared = {"expert_maps": maps, "moe_load": -_load(maps, _tokens(0))}
    worker = _worker(0, shared, monkeypatch)
    worker.do_update()
    assert torch.equal(shared["expert_maps"], maps.long())
    shared["moe_load"] = _load(maps, _tokens(0))
    worker.do_update()
    assert not torch.equal(shared["expert_maps"], maps.long())


def test_it_plans_in_the_child_process_that_vllm_ascend_starts(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eplb_worker, "get_ep_group", lambda: SimpleNamespace(rank_in_group=0))
    maps = _maps()
    with multiprocessing.Manager() as manager:
        shared = manager.dict(expert_maps=maps, moe_load=_load(maps, _tokens(0)))
        process = eplb_worker.EplbProcess(shared, policy_type=2)
        child = process._launch_process()
        try:
            process.planner_q.put(1)
            process.block_update_q.get(timeout=120)
            found = _placement(shared["expert_maps"])
        finally:
            child.terminate()
            child.join()
    assert imbalance(_tokens(0), found, RANKS).max() < 1.03

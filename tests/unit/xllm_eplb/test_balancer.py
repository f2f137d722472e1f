"""What vLLM hands its policy becomes one state per model; what cannot be planned is left to it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.xllm_eplb.loads import initial, skewed
from xllm_eplb.balancer import Balancer
from xllm_eplb.books import METRICS, report_of
from xllm_eplb.config import EplbSection
from xllm_eplb.phases import Prefill
from xllm_eplb.placement import Topology, check_placement, imbalance, moves
from xllm_eplb.policy import Rules
from xllm_eplb.search import Floats
from xllm_eplb.trace import Machine

MACHINE = Machine(
    steps=100,
    expert_bytes=40e6,
    expert_weights=40e6,
    flops=400e12,
    memory_bytes=3e12,
    link_bytes=40e9,
    exposed=1.0,
)
EXPERTS, SLOTS, DEVICES = 64, 72, 8
FIRST = initial(3, EXPERTS, SLOTS)


def counts(seed: int = 0) -> Floats:
    """Tokens of a busy window."""
    return np.round(skewed(3, EXPERTS, seed=seed) * 1e4)


def test_a_skewed_load_is_balanced_and_counted() -> None:
    balancer = Balancer(Rules(), MACHINE)
    balancer.counted([Prefill(counts() / 2, 0.5)])
    found = balancer.rebalance(counts(), SLOTS, 1, 1, DEVICES, FIRST)
    assert found is not None
    assert (imbalance(counts(), found, DEVICES) < 1.05).all()
    books, moved = balancer.books(), int(moves(FIRST, found, DEVICES).sum())
    assert (books["plans"], books["moves"], books["outcomes"]) == (1, moved, {"moved": 3})
    assert books["moved_bytes"] == moved * MACHINE.expert_bytes
    samples = report_of(books).samples
    declared = {metric.name: len(metric.labels) for metric in METRICS}
    assert {s.name: len(s.labels) for s in samples} == declared


def test_the_profile_run_changes_nothing_and_teaches_nothing() -> None:
    balancer = Balancer(Rules(), MACHINE)
    found = balancer.rebalance(np.zeros((3, EXPERTS)), SLOTS, 1, 1, DEVICES, FIRST)
    assert found is FIRST
    assert balancer.books()["plans"] == 0


def test_empty_slots_are_filled_though_there_was_no_traffic() -> None:
    current = FIRST.copy()
    current[:, -3:] = -1  # vLLM marks the slots of a device that has come
    found = Balancer(Rules(), MACHINE).rebalance(
        np.zeros((3, EXPERTS)), SLOTS, 1, 1, DEVICES, current
    )
    assert found is not None
    check_placement(found, EXPERTS, Topology(DEVICES, SLOTS // DEVICES))


def test_a_process_counts_how_long_it_planned_and_stood_still() -> None:
    ticks = iter([1.0, 1.5])
    balancer = Balancer(Rules(), MACHINE, clock=lambda: next(ticks))
    balancer.rebalance(counts(), SLOTS, 1, 1, DEVICES, FIRST)
    for seconds in (0.2, 0.6, 0.1):
        balancer.stalled(seconds)
    books = balancer.books()
    assert books["plan_s"] == 0.5
    assert (books["stall_s"], books["longest_stall_s"]) == (pytest.approx(0.9), 0.6)


def test_each_layer_says_what_was_measured_moved_and_decided() -> None:
    balancer = Balancer(Rules(), MACHINE)
    balancer.rebalance(counts(), SLOTS, 1, 1, DEVICES, FIRST)
    books = balancer.books()
    assert books["measured"] == pytest.approx(imbalance(counts(), FIRST, DEVICES), abs=1e-4)
    assert (books["layer_outcomes"], sum(books["layer_moves"])) == (["moved"] * 3, books["moves"])
    assert all(new < old for new, old in zip(books["imbalance"], books["measured"], strict=True))


def test_bad_statistics_leave_the_experts_where_they_are() -> None:
    balancer = Balancer(Rules(), MACHINE)
    found = balancer.rebalance(np.full((3, EXPERTS), np.nan), SLOTS, 1, 1, DEVICES, FIRST)
    assert found is not None
    assert found.tolist() == FIRST.tolist()
    assert balancer.books()["refused"] == 1
    assert balancer.books()["reason"] == (
        "Layer 0 has load nan at expert 0; allowed is a number at least 0."
    )


@pytest.mark.parametrize(("devices", "slots"), [(6, 66), (10, 90)], ids=["down", "up"])
@pytest.mark.parametrize("busy", [True, False])
def test_devices_that_go_or_come_are_planned_for(devices: int, slots: int, busy: bool) -> None:
    balancer = Balancer(Rules(), MACHINE)
    load = counts() if busy else np.zeros((3, EXPERTS))
    found = balancer.rebalance(load, slots, 1, 1, devices, FIRST)
    assert found is not None
    check_placement(found, EXPERTS, Topology(devices, slots // devices))
    if devices > DEVICES:
        assert (moves(FIRST, found[:, :SLOTS], DEVICES) <= SLOTS // 2).all()


@pytest.mark.parametrize(
    ("devices", "slots", "nodes"), [(8, 73, 1), (1, 72, 1), (8, 56, 1), (8, 72, 3)]
)
def test_what_cannot_be_planned_is_left_to_vllm(devices: int, slots: int, nodes: int) -> None:
    current = initial(3, EXPERTS, slots)
    assert Balancer(Rules(), MACHINE).rebalance(counts(), slots, 1, nodes, devices, current) is None


def test_models_of_different_shape_do_not_share_a_forecast() -> None:
    balancer, draft = Balancer(Rules(), MACHINE), initial(1, EXPERTS, SLOTS)
    for _ in range(3):
        both = [
            balancer.rebalance(counts(), SLOTS, 1, 1, DEVICES, FIRST),
            balancer.rebalance(counts(5)[:1], SLOTS, 1, 1, DEVICES, draft),
        ]
    assert balancer.books()["refused"] == 0
    assert all(found is not None for found in both)


def test_the_settings_default_to_the_policys_rules() -> None:
    assert EplbSection().rules() == Rules()
    assert EplbSection(cosine=0.8, most_moves=7).rules() == Rules(cosine=0.8, most_moves=7)

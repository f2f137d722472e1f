"""The rules that ours is compared with do what is said of them, and the traffic is as described."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from benchmarks.lab.eplb_rules import AscendSwift, Rule, Xllm, packed
from benchmarks.lab.eplb_traffic import DEEPSEEK_V3, QWEN3_30B, Model, Traffic
from xllm_eplb.placement import Topology, check_placement, device_load, imbalance, moves

SMALL = Model("small", 3, 32, 4, 64, 32, 2, Topology(4, 10))


def test_the_golden_case_of_xllm() -> None:
    load = np.full(16, 3.0)
    load[[0, 1, 2, 15]] = 100.0
    found = packed(load, Topology(4, 5))
    assert found.reshape(4, 5).tolist() == [
        [0, 0, 3, 7, 11], [1, 1, 4, 8, 12], [2, 2, 5, 9, 13], [15, 15, 6, 10, 14],
    ]  # fmt: skip
    assert device_load(load[None], found[None], 4).tolist() == [[109.0] * 4]


def test_xllm_leaves_layers_alone_whose_load_is_similar() -> None:
    first, similar, other = (
        next(iter(Traffic(0.9).windows(SMALL, 1, 1e6, seed))) for seed in (1, 1, 2)
    )
    rule = Xllm()
    one = rule(first, SMALL.first(), SMALL.topology)
    assert (rule(similar, one, SMALL.topology) == one).all()
    again = rule(other * 10.0, one, SMALL.topology)
    assert not (again == one).all()


@pytest.mark.parametrize("rule", [AscendSwift(), Xllm()], ids=["swift", "xllm"])
def test_each_balances_without_losing_an_expert(rule: Rule) -> None:
    (load,) = Traffic(0.6).windows(SMALL, 1, 1e6, 3)
    found = rule(load, SMALL.first(), SMALL.topology)
    check_placement(found, 32, SMALL.topology)
    before, after = (imbalance(load, p, 4) for p in (SMALL.first(), found))
    assert (after < before).all()


def test_swift_sends_few_experts() -> None:
    (load,) = Traffic(0.6).windows(SMALL, 1, 1e6, 3)
    found = AscendSwift()(load, SMALL.first(), SMALL.topology)
    # One from each device to each other at most, besides what refills a slot given up.
    assert (moves(SMALL.first(), found, 4) <= 4 * 3 + 8).all()


def test_traffic_switches_drifts_and_stands_still() -> None:
    def shares(traffic: Traffic) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
        return [w / w.sum(1, keepdims=True) for w in traffic.windows(SMALL, 6, 1e8, 0)]

    still, switched = shares(Traffic(0.6)), shares(Traffic(0.6, switch_every=3))
    drifted, noisy = shares(Traffic(0.6, drift=True)), shares(Traffic(0.6, noise=0.15))
    assert np.abs(still[0] - still[5]).max() < 1e-4
    assert np.abs(switched[0] - switched[2]).max() < 1e-4 < np.abs(switched[2] - switched[3]).max()
    steps = [np.abs(a - b).max() for a, b in pairwise(drifted)]
    assert max(steps) == pytest.approx(min(steps), rel=0.01)
    assert np.std(noisy[0] / still[0]) == pytest.approx(0.15, rel=0.2)


def test_the_models_have_the_shapes_of_the_issue() -> None:
    assert (DEEPSEEK_V3.layers, DEEPSEEK_V3.experts) == (58, 256)
    assert DEEPSEEK_V3.topology.physical - DEEPSEEK_V3.experts == 32
    assert (QWEN3_30B.layers, QWEN3_30B.experts) == (48, 128)
    assert QWEN3_30B.topology.physical - QWEN3_30B.experts == 16

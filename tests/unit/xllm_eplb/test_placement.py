"""A placement loses no expert, is as balanced as wanted where that can be, and moves little."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.xllm_eplb.loads import initial, skewed
from xllm_eplb.errors import PlacementError
from xllm_eplb.placement import (
    Topology,
    check_placement,
    device_load,
    imbalance,
    moves,
    place,
    replica_counts,
)
from xllm_eplb.search import EMPTY, Floats, Ints


def repeats(placement: Ints, devices: int) -> int:
    """Slots whose expert an earlier slot of the same device holds, too."""
    held = placement.reshape(-1, placement.shape[1] // devices)
    return sum(len(row) - len(set(row)) for row in held.tolist())


def test_the_golden_case_of_xllm_is_balanced_with_replicas_on_different_devices() -> None:
    # Its own algorithm reaches 109 on each device with both replicas of all hot experts on one.
    load = np.full((1, 16), 3.0)
    load[0, [0, 1, 2, 15]] = 100.0
    current = np.array([[0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 11, 12, 13, 14, 15, 15]])
    found = place(load, current, Topology(4, 5))
    assert device_load(load, found, 4).tolist() == [[109.0] * 4]
    assert replica_counts(found, 16)[0, [0, 1, 2, 15]].tolist() == [2, 2, 2, 2]
    assert repeats(found, 4) == 0


def test_the_example_of_deepseeks_eplb_is_balanced_no_worse_than_by_it() -> None:
    load = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ],
        float,
    )
    published = np.array(
        [
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ]
    )
    topology = Topology(devices=8, slots=2, nodes=2, groups=4)
    found = place(load, initial(2, 12, 16), topology)
    check_placement(found, 12, topology)
    assert (imbalance(load, found, 8) <= imbalance(load, published, 8)).all()
    homes = [
        {slot // 8 for slot in np.flatnonzero(row // 3 == g)} for row in found for g in range(4)
    ]
    assert all(len(nodes) == 1 for nodes in homes)


def every_placement(devices: int, slots: int, experts: int) -> Ints:
    """All placements without an expert twice on a device."""
    held = list(itertools.combinations(range(experts), slots))
    rows = (sum(chosen, ()) for chosen in itertools.product(held, repeat=devices))
    return np.array([row for row in rows if len(set(row)) == experts])


@pytest.mark.parametrize(
    ("devices", "slots", "experts"), [(2, 2, 3), (2, 3, 4), (3, 2, 4), (3, 2, 5), (2, 4, 6)]
)
@pytest.mark.parametrize("wanted", [1.0, 1.1, 1.3])
def test_small_cases_come_close_to_the_best_there_is(
    devices: int, slots: int, experts: int, wanted: float
) -> None:
    possible, cases = every_placement(devices, slots, experts), 200
    rng = np.random.default_rng(7)
    load = rng.pareto(1.5, (cases, experts)) + 0.2
    current = possible[rng.integers(len(possible), size=cases)]
    found = place(load, current, Topology(devices, slots), wanted)
    mine, moved = imbalance(load, found, devices), moves(current, found, devices)
    gaps, more = [], []
    for case in range(cases):
        loads = np.repeat(load[case : case + 1], len(possible), 0)
        score = imbalance(loads, possible, devices)
        cost = moves(np.repeat(current[case : case + 1], len(possible), 0), possible, devices)
        gaps.append(max(mine[case] / max(score.min(), wanted), 1.0) - 1.0)
        more.append(moved[case] - cost[score <= mine[case] + 1e-9].min())
    assert min(more) >= 0
    # On average: 8 % above the exact optimum, and 0.6 moves more than any such balance takes.
    assert np.mean(gaps) <= 0.08
    assert np.mean(more) <= 0.6


@pytest.mark.parametrize("wanted", [1.01, 1.05, 1.2])
@pytest.mark.parametrize(
    ("experts", "topology"), [(256, Topology(32, 9)), (128, Topology(8, 18))], ids=["v3", "qwen"]
)
def test_large_models_reach_what_is_wanted(experts: int, topology: Topology, wanted: float) -> None:
    load = skewed(4, experts)
    found = place(load, initial(4, experts, topology.physical), topology, wanted)
    assert (imbalance(load, found, topology.devices) <= wanted + 0.003).all()


def test_less_balance_costs_fewer_moves() -> None:
    load, current = skewed(8, 256), initial(8, 256, 288)
    found = [place(load, current, Topology(32, 9), w) for w in (1.0, 1.01, 1.03, 1.1, 1.3, 2.5)]
    moved = [int(moves(current, one, 32).sum()) for one in found]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 2 * moved[4]


def test_what_is_balanced_is_left_alone() -> None:
    load, current = np.ones((3, 12)), initial(3, 12, 12)
    assert (place(load, current, Topology(4, 3)) == current).all()
    balanced = place(skewed(3, 64), initial(3, 64, 72), Topology(8, 9), 1.02)
    assert (place(skewed(3, 64), balanced, Topology(8, 9), 1.03) == balanced).all()


def test_a_layer_without_load_is_left_alone() -> None:
    load = skewed(2, 64)
    load[1] = 0.0
    current = initial(2, 64, 72)
    found = place(load, current, Topology(8, 9))
    assert moves(current, found, 8)[1] == 0
    assert imbalance(np.zeros((2, 64)), found, 8).tolist() == [1.0, 1.0]


def test_replicas_go_to_other_nodes_where_it_costs_no_balance() -> None:
    load = np.ones((1, 16))
    load[0, 0] = 8.0
    current = np.concatenate([np.arange(16), [1, 2, 3, 4, 5, 6, 7, 8]])[None]
    found = place(load, current, Topology(devices=8, slots=3, nodes=4), 1.2)
    nodes = {slot // 6 for slot in np.flatnonzero(found[0] == 0)}
    assert len(nodes) == min(4, replica_counts(found, 16)[0, 0])


def test_groups_keep_their_nodes_once_they_have_them() -> None:
    topology = Topology(devices=8, slots=9, nodes=4, groups=8)
    load = skewed(4, 64, 0.3)
    first = place(load, initial(4, 64, 72), topology)
    again = place(load * np.random.default_rng(1).normal(1, 0.02, load.shape), first, topology, 1.1)
    node = np.arange(72) // 18
    for row, other in zip(first, again, strict=True):
        assert {(e // 8, n) for e, n in zip(row, node, strict=True)} == {
            (e // 8, n) for e, n in zip(other, node, strict=True)
        }


def test_a_group_leaves_an_overloaded_node() -> None:
    topology = Topology(devices=2, slots=4, nodes=2, groups=4)
    load = np.array([[5.0, 5.0, 5.0, 5.0, 1.0, 1.0, 1.0, 1.0]])
    found = place(load, np.arange(8)[None], topology)
    assert imbalance(load, found, 2)[0] == 1.0


def test_slots_of_lost_or_new_devices_are_filled() -> None:
    load, shrunk = skewed(2, 64), initial(2, 64, 72)[:, :45].copy()
    shrunk[:, 30:] = -1
    topology = Topology(5, 13)
    current = np.concatenate([shrunk, np.full((2, 20), -1)], 1)
    found = place(load, current, topology)
    check_placement(found, 64, topology)
    assert repeats(found, 5) == 0


def test_a_second_replica_on_a_device_is_given_a_better_use() -> None:
    current = np.array([[0, 0, 1, 1, 2, 2, 3, 3]])
    found = place(np.ones((1, 4)), current, Topology(4, 2))
    assert repeats(found, 4) == 0
    assert imbalance(np.ones((1, 4)), found, 4)[0] == 1.0


@st.composite
def problems(draw: st.DrawFn) -> tuple[Floats, Ints, Topology, float]:
    nodes = draw(st.integers(1, 3))
    devices = nodes * draw(st.integers(1, 4))
    slots = draw(st.integers(1, 6))
    experts = draw(st.integers(slots, devices * slots))
    groups = draw(st.sampled_from([g for g in range(1, experts + 1) if experts % g == 0]))
    layers = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    load = rng.pareto(draw(st.floats(0.3, 5.0)), (layers, experts))
    load[rng.random(load.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0.0
    current = rng.integers(draw(st.sampled_from([-1, 0])), experts, (layers, devices * slots))
    if draw(st.booleans()):
        current = initial(layers, experts, devices * slots)
    return load, current, Topology(devices, slots, nodes, groups), draw(st.floats(1.0, 3.0))


@given(problems())
def test_no_expert_is_dropped_and_no_device_holds_one_twice(
    problem: tuple[Floats, Ints, Topology, float],
) -> None:
    load, current, topology, wanted = problem
    found = place(load, current, topology, wanted)
    check_placement(found, load.shape[1], topology)
    idle = load.sum(1) == 0
    assert repeats(found[~idle], topology.devices) == 0


@given(problems())
def test_an_expert_that_stays_on_a_device_stays_in_its_slot(
    problem: tuple[Floats, Ints, Topology, float],
) -> None:
    load, current, topology, wanted = problem
    found = place(load, current, topology, wanted)
    for before, after in zip(
        current.reshape(-1, topology.slots), found.reshape(-1, topology.slots), strict=True
    ):
        for slot, expert in enumerate(before.tolist()):
            if expert >= 0 and expert in after and expert not in before[:slot]:
                assert after[slot] == expert


@given(problems())
def test_moves_are_what_devices_receive(problem: tuple[Floats, Ints, Topology, float]) -> None:
    load, current, topology, wanted = problem
    found = place(load, current, topology, wanted)
    for layer, counted in enumerate(moves(current, found, topology.devices).tolist()):
        held = current[layer].reshape(topology.devices, -1).tolist()
        holds = found[layer].reshape(topology.devices, -1).tolist()
        assert counted == sum(
            len(set(new) - set(old)) for old, new in zip(held, holds, strict=True)
        )


@given(problems())
def test_the_same_numbers_give_the_same_placement_layer_by_layer(
    problem: tuple[Floats, Ints, Topology, float],
) -> None:
    load, current, topology, wanted = problem
    found = place(load, current, topology, wanted)
    for layer in range(len(load)):
        one = slice(layer, layer + 1)
        assert (place(load[one], current[one], topology, wanted) == found[one]).all()


@pytest.mark.parametrize(
    ("load", "current", "topology", "wanted", "sentence"),
    [
        ([[1.0, np.nan]], [[0, 1]], Topology(2, 1), 1.0,
         "Layer 0 has load nan at expert 1; allowed is a number at least 0."),
        ([[1.0, -2.0]], [[0, 1]], Topology(2, 1), 1.0,
         "Layer 0 has load -2.0 at expert 1; allowed is a number at least 0."),
        ([1.0, 2.0], [[0, 1]], Topology(2, 1), 1.0,
         "The load has shape (2,); allowed is [layers, experts]."),
        ([[1.0, 2.0]], [[0, 1, 0]], Topology(2, 1), 1.0,
         "The current placement has shape (1, 3); allowed is (1, 2)."),
        ([[1.0, 2.0]], [[0, 2]], Topology(2, 1), 1.0,
         "The current placement names expert 2 or 0; allowed is 0 to 1, or -1 for none."),
        ([[1.0, 2.0]], [[0, 1, 0, 1, 0, 1]], Topology(2, 3), 1.0,
         "2 devices have 3 slots each for 2 experts; allowed is at most as many slots on a device "
         "as experts, and no fewer in all."),
        ([[1.0, 2.0]], [[0, 1]], Topology(2, 1), 0.9,
         "wanted is 0.9; allowed is a number at least 1."),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(
    load: object, current: object, topology: Topology, wanted: float, sentence: str
) -> None:
    with pytest.raises(PlacementError) as raised:
        place(np.array(load), np.array(current), topology, wanted)
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("placement", "sentence"),
    [
        ([[0, 1, 0, 1]], "Layer 0 has no replica of expert 2."),
        ([[0, 1, 2, 3]], "Layer 0 has expert 3 in slot 3; allowed is 0 to 2."),
        ([[0, 1, 2]], "A placement has shape (1, 3); allowed is [layers, 4]."),
    ],
)
def test_a_placement_that_loses_something_is_refused(
    placement: list[list[int]], sentence: str
) -> None:
    with pytest.raises(PlacementError) as raised:
        check_placement(np.array(placement), 3, Topology(2, 2))
    assert str(raised.value) == sentence


def test_a_topology_that_cannot_be_is_refused() -> None:
    with pytest.raises(PlacementError, match="slots is 0; allowed is at least 1"):
        Topology(4, 0)
    with pytest.raises(PlacementError, match="nodes is 3; allowed is a divisor of the 4 devices"):
        Topology(4, 2, nodes=3)


def test_on_an_empty_machine_the_heaviest_expert_gets_its_replicas_first() -> None:
    load = np.array([[1000.0, 1.0, 1.0, 1.0]])
    found = place(load, np.full((1, 6), EMPTY), Topology(2, 3))
    assert replica_counts(found, 4).tolist() == [[2, 2, 1, 1]]
    assert imbalance(load, found, 2)[0] < 1.01

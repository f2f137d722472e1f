"""Loads of prefill and decode are told apart, and one of them is planned for where that is set."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pytest

from tests.unit.xllm_eplb.loads import initial, skewed
from xllm_eplb.balancer import Balancer
from xllm_eplb.books import report_of
from xllm_eplb.phases import PHASES, Phase, Prefill, is_prefill
from xllm_eplb.placement import imbalance
from xllm_eplb.policy import Rules
from xllm_eplb.search import Floats, Ints
from xllm_eplb.trace import Machine

MACHINE = Machine(100, 40e6, 40e6, 400e12, 3e12, 40e9, 1.0)
FIRST, DEVICES = initial(3, 64, 72), 8
# Prompts bring most tokens in a quarter of the steps, and want other experts.
DECODE = np.round(skewed(3, 64, seed=1) * 1e4)
PREFILL = Prefill(np.round(skewed(3, 64, seed=2) * 4e4), 0.25)
LOAD = DECODE + PREFILL.load
BY_PHASE = {Phase.ALL: LOAD, Phase.DECODE: DECODE, Phase.PREFILL: PREFILL.load}


@pytest.mark.parametrize(
    ("scheduled", "drafts", "expected"),
    [
        pytest.param({"a": 1, "b": 1}, {}, False, id="all generate"),
        pytest.param({"a": 500}, {}, True, id="a prompt"),
        pytest.param({"a": 500, **dict.fromkeys("bcdef", 1)}, {}, True, id="a prompt beside some"),
        pytest.param({"a": 4, **dict.fromkeys("bcdef", 1)}, {}, False, id="its rest beside more"),
        pytest.param({"a": 4, "b": 4}, {"a": [1, 2, 3], "b": [-1] * 3}, False, id="drafts"),
        pytest.param({"a": 4, "b": 4, "c": 9}, {"a": [1, 2, 3], "b": [-1] * 3}, True, id="both"),
        pytest.param({}, {}, False, id="nothing"),
    ],
)
def test_a_step_counts_as_what_most_of_its_tokens_are(
    scheduled: Mapping[str, int], drafts: Mapping[str, list[int]], expected: bool
) -> None:
    assert is_prefill(scheduled, drafts) == expected


def planned(phase: Phase, prefill: Prefill | None = PREFILL) -> tuple[Balancer, Ints]:
    balancer = Balancer(Rules(), MACHINE, phase)
    balancer.counted([prefill])
    found = balancer.rebalance(LOAD, 72, 1, 1, DEVICES, FIRST)
    assert found is not None
    return balancer, found


@pytest.mark.parametrize(("phase", "balanced"), list(BY_PHASE.items()), ids=list(Phase))
def test_experts_are_balanced_for_the_steps_of_a_phase(phase: Phase, balanced: Floats) -> None:
    _, found = planned(phase)
    scores = {name: imbalance(load, found, DEVICES).mean() for name, load in BY_PHASE.items()}
    assert min(scores, key=lambda name: scores[name]) is phase
    assert imbalance(balanced, found, DEVICES).max() < 1.03


def test_each_phase_has_a_forecast_whatever_is_planned_for() -> None:
    balancer, found = planned(Phase.ALL)
    balancer.counted([PREFILL])
    again = balancer.rebalance(LOAD, 72, 1, 1, DEVICES, found)
    assert again is not None
    books = balancer.books()["phases"]
    for phase, load, steps in zip(PHASES, (PREFILL.load, DECODE), (25, 75), strict=True):
        one = books[phase.value]
        assert one["steps"] == 2 * steps
        assert one["measured"] == pytest.approx(imbalance(load, found, DEVICES), abs=1e-4)
        assert one["imbalance"] == pytest.approx(imbalance(load, again, DEVICES), abs=1e-3)
    samples = {(s.name, s.labels): s.value for s in report_of(balancer.books()).samples}
    assert samples["eplb_phase_steps", ("decode",)] == 150
    expected = books["prefill"]["imbalance"][2]
    assert samples["eplb_phase_imbalance", ("prefill", "2")] == expected


@pytest.mark.parametrize(
    "prefill",
    [
        None,
        Prefill(LOAD + 1.0, 0.5),
        Prefill(PREFILL.load - LOAD, 0.5),
        Prefill(PREFILL.load[:, :9], 0.5),
    ],
    ids=["not told", "more than all", "negative", "another model's"],
)
def test_where_phases_are_not_known_all_steps_are_planned_for(
    prefill: Prefill | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vllm.xllm_eplb"):
        balancer, found = planned(Phase.DECODE, prefill)
    assert found.tolist() == planned(Phase.ALL)[1].tolist()
    assert balancer.books()["phases"]["decode"]["steps"] == 0
    assert "It is not known which steps are decode: planned for all." in caplog.text


def test_what_was_counted_is_for_one_plan_of_one_model() -> None:
    balancer, draft = Balancer(Rules(), MACHINE), initial(1, 64, 72)
    balancer.counted([None, Prefill(PREFILL.load[:1], 0.5)])
    for load, current in ((LOAD, FIRST), (LOAD[:1], draft), (LOAD, FIRST)):
        balancer.rebalance(load, 72, 1, 1, DEVICES, current)
    assert ["prefill" in one for one in balancer.windows(0)] == [False, True, False]


def test_moves_for_a_phase_have_to_pay_in_its_share_of_the_steps() -> None:
    balancer, _ = planned(Phase.PREFILL, Prefill(PREFILL.load, 1e-7))
    assert balancer.books()["outcomes"] == {"cost": 3}


def test_a_window_without_the_phase_moves_nothing() -> None:
    balancer, found = planned(Phase.PREFILL, Prefill(np.zeros_like(LOAD), 0.0))
    assert found.tolist() == FIRST.tolist()
    assert balancer.books()["outcomes"] == {"no_load": 3}

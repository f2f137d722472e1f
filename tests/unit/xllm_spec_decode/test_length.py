"""Drafts are as long as they gain more than they cost, and never break a budget."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugins.latency import StepTime
from xllm_spec_decode.length import PRIOR, draft_lengths, verification

CHEAP = StepTime(base=20.0, token=0.1, decode=0.1, ready=True)
DEAR = StepTime(base=2.0, token=1.0, decode=1.0, ready=True)


def survival(share: float, n: int = 1, most: int = 8) -> np.ndarray:
    return np.tile(share ** np.arange(1, most + 1), (n, 1))


def contexts(n: int, tokens: int = 100) -> np.ndarray:
    return np.full(n, tokens, np.int64)


def test_a_sure_draft_is_taken_whole_and_a_hopeless_one_not_at_all() -> None:
    assert draft_lengths(survival(0.95), contexts(1), CHEAP).tolist() == [8]
    assert draft_lengths(survival(0.001), contexts(1), CHEAP).tolist() == [0]
    assert draft_lengths(np.zeros((3, 8)), contexts(3), CHEAP).tolist() == [0, 0, 0]


def test_what_a_request_gets_depends_on_its_own_chances() -> None:
    both = np.concatenate([survival(0.9), survival(0.3)])
    long, short = draft_lengths(both, contexts(2), DEAR)
    assert long > short


def test_drafting_ends_as_the_batch_grows() -> None:
    lengths = [
        draft_lengths(survival(0.7, n), contexts(n), DEAR).sum() / n for n in (1, 4, 16, 64, 256)
    ]
    assert lengths[0] > 0
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 0


def test_before_steps_are_measured_the_prior_holds() -> None:
    unready = StepTime(base=1.0, token=1e6)
    found = draft_lengths(survival(0.8), contexts(1), unready)
    assert found.tolist() == draft_lengths(survival(0.8), contexts(1), PRIOR).tolist()
    assert found[0] > 0


def test_what_verifying_costs_at_all_has_to_be_gained_first() -> None:
    dear_start = StepTime(base=20.0, token=0.1, decode=0.1, square=30.0, ready=True)
    assert draft_lengths(survival(0.6), contexts(1), dear_start).tolist() == [0]
    assert draft_lengths(survival(0.95, 4), contexts(4), dear_start).sum() > 0


@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_experts_that_are_read_anyway_make_later_tokens_cheap(n: int) -> None:
    moe = StepTime(base=15.0, token=0.05, decode=0.05, experts=18.0, idle_experts=0.97, ready=True)

    def tokens_per_ms(lengths: np.ndarray) -> float:
        gained = sum(float(survival(0.85)[0, :length].sum()) for length in lengths)
        return float((n + gained) / moe.step_ms(verification(lengths, contexts(n))))

    found = draft_lengths(survival(0.85, n), contexts(n), moe)
    assert tokens_per_ms(found) >= 0.98 * max(tokens_per_ms(np.full(n, k)) for k in range(9))


def test_no_more_tokens_than_are_allowed() -> None:
    assert draft_lengths(survival(0.9, 4), contexts(4), CHEAP, most_tokens=5).sum() == 5


@pytest.mark.parametrize("budget_ms", [10.0, 20.45, 21.0, 22.0, math.inf])
def test_a_step_with_drafts_keeps_the_budget(budget_ms: float) -> None:
    lengths = draft_lengths(survival(0.9, 4), contexts(4), CHEAP, budget_ms=budget_ms)
    step_ms = CHEAP.step_ms(verification(lengths, contexts(4)))
    assert step_ms <= budget_ms or not lengths.any()
    assert lengths.any() == (budget_ms > 20.5)


@given(
    st.lists(st.lists(st.floats(0.0, 0.98), min_size=3, max_size=3), min_size=1, max_size=3),
    st.floats(0.5, 30.0),
    st.floats(0.05, 3.0),
    st.floats(0.0, 0.01),
)
@settings(max_examples=150, deadline=None)
def test_no_other_lengths_bring_all_on_much_faster(
    steps: list[list[float]], base: float, token: float, cross: float
) -> None:
    """Against all lengths that there are, by the geometric mean of the requests' speeds."""
    time = StepTime(base=base, token=token, cross=cross, decode=token, ready=True)
    chance = np.cumprod(np.array(steps), axis=1)
    n, most = chance.shape
    context = np.arange(1, n + 1) * 50

    def speed(lengths: np.ndarray) -> float:
        own = [1.0 + float(chance[i, : lengths[i]].sum()) for i in range(n)]
        return float(np.prod(own) ** (1 / n) / time.step_ms(verification(lengths, context)))

    best = max(speed(np.array(one)) for one in itertools.product(range(most + 1), repeat=n))
    found = draft_lengths(chance, context, time)
    assert speed(found) >= speed(np.zeros(n, np.int64))
    assert speed(found) >= best / 1.1 - 1e-9
    assert ((found >= 0) & (found <= most)).all()


def test_one_whose_text_repeats_slows_the_others_by_no_more_than_it_gains() -> None:
    chances = np.concatenate([survival(0.98, most=16), np.zeros((3, 16))])
    time = StepTime(base=40.0, token=5.0, decode=5.0, ready=True)
    (alone,) = draft_lengths(chances[:1], contexts(1), time)
    beside = draft_lengths(chances, contexts(4), time)
    assert 0 < beside[0] < alone
    gained = 1.0 + chances[0, : beside[0]].sum()
    slower = time.step_ms(verification(beside, contexts(4))) / time.step_ms(
        verification(np.zeros(4, np.int64), contexts(4))
    )
    assert gained > slower**4


@given(st.integers(0, 2**32), st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_tokens_are_taken_in_the_order_of_gain_for_cost(seed: int, n: int) -> None:
    """However many requests there are, and whether or not their tokens are worth the same."""
    rng = np.random.default_rng(seed)
    chance = np.cumprod(rng.choice([0.0, 0.5, 0.9, *rng.random(2)], (n, 5)), axis=1)
    context = rng.choice([100, *rng.integers(1, 5000, 2)], n)
    time = StepTime(base=20.0, decode=0.1, token=0.01, cross=1e-4, ready=True)
    cost_ms = np.repeat(time.token + time.cross * context, 5)
    before = 1.0 + np.cumsum(chance, axis=1) - chance
    order = np.argsort(-(chance / before).reshape(-1) / cost_ms, kind="stable")
    most = int(rng.integers(1, 60))
    found = draft_lengths(chance, context, time, most_tokens=most)
    drafted = order[: found.sum()]
    assert found.sum() <= most
    assert found.tolist() == np.bincount(drafted // 5, minlength=n).tolist()

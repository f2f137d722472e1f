"""The step-time model: its formula, its inverse, and what it learns from measured steps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from xllm_plugins.latency import (
    TERMS,
    StepShape,
    StepTime,
    StepTimeModel,
    _non_negative_solution,
)

# About a 1.5B model on a few CPU cores.
TRUE = StepTime(base=4.0, token=0.02, square=1e-6, cross=2e-6, decode=0.1, context=1e-5, ready=True)
CHUNKS = st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 32768)), max_size=20)
COEFFICIENT = st.one_of(st.just(0.0), st.floats(1e-15, 10.0))


def shape_of(*chunks: tuple[int, int]) -> StepShape:
    shape = StepShape()
    for new_tokens, context_tokens in chunks:
        shape = shape.with_chunk(new_tokens, context_tokens)
    return shape


def steps(count: int, seed: int = 0) -> Iterator[StepShape]:
    """Mixed steps: up to two prefill chunks and 1 to 39 decodes."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        prefills = [(int(rng.integers(16, 1024)), int(rng.integers(0, 4096)))] * rng.integers(0, 3)
        decodes = [(1, int(rng.integers(1, 4096))) for _ in range(rng.integers(1, 40))]
        yield shape_of(*prefills, *decodes)


def learned(measured: Sequence[tuple[StepShape, float]]) -> StepTimeModel:
    model = StepTimeModel()
    for shape, took_ms in measured:
        model.observe(shape, took_ms)
    return model


def worst_error(time: StepTime, true: StepTime = TRUE, scale: float = 1.0) -> float:
    """The worst relative error over steps that were not learned from."""
    return max(abs(time.step_ms(s) / (scale * true.step_ms(s)) - 1.0) for s in steps(200, seed=99))


def test_one_more_token_of_a_prompt_is_no_decode() -> None:
    shape = StepShape().with_chunk(16, 0).with_chunk(1, 16, more=True)
    assert (shape.prefill_tokens, shape.decodes, shape.decode_context) == (17, 0, 0)


def test_a_shape_sums_prefill_and_decode_terms() -> None:
    shape = shape_of((100, 1000), (50, 0), (1, 300), (1, 500), (0, 900))
    assert shape.prefill_tokens == 100 + 50
    assert shape.prefill_squares == 100 * 100 + 50 * 50
    assert shape.prefill_cross == 100 * 1000
    assert (shape.decodes, shape.decode_context) == (2, 300 + 500)
    assert shape.terms().tolist() == [1, 150, 12500, 100000, 2, 800, 0]
    assert not shape.is_empty
    assert shape_of((0, 900)).is_empty


@given(CHUNKS, CHUNKS)
def test_a_shape_does_not_depend_on_the_order_of_its_chunks(
    first: list[tuple[int, int]], second: list[tuple[int, int]]
) -> None:
    assert shape_of(*first, *second) == shape_of(*second, *first)


@given(CHUNKS, st.integers(0, 4096), st.integers(0, 32768))
def test_added_time_is_the_difference_that_a_chunk_makes(
    chunks: list[tuple[int, int]], new_tokens: int, context_tokens: int
) -> None:
    before = shape_of(*chunks)
    added = TRUE.step_ms(before.with_chunk(new_tokens, context_tokens)) - TRUE.step_ms(before)
    assert TRUE.added_ms(new_tokens, context_tokens) == pytest.approx(added, rel=1e-6, abs=1e-6)


@given(COEFFICIENT, COEFFICIENT, COEFFICIENT, st.integers(2, 8192), st.integers(0, 32768))
def test_tokens_within_a_time_inverts_the_time_of_a_chunk(
    token: float, square: float, cross: float, new_tokens: int, context_tokens: int
) -> None:
    time = StepTime(token=token, square=square, cross=cross)
    took_ms = time.added_ms(new_tokens, context_tokens)
    assume(took_ms > 0.0)
    fitting = time.prefill_tokens_within(took_ms, context_tokens)
    assert fitting == pytest.approx(new_tokens, rel=1e-9)


@pytest.mark.parametrize(
    ("time", "budget_ms", "tokens"),
    [
        (TRUE, 0.0, 0.0),
        (TRUE, -5.0, 0.0),
        (StepTime(token=0.5), 10.0, 20.0),
        (StepTime(square=0.1), 10.0, 10.0),
        (StepTime(base=4.0, decode=1.0), 10.0, math.inf),
        (TRUE, math.inf, math.inf),
        (StepTime(), math.inf, math.inf),
    ],
)
def test_tokens_within_a_time_at_the_edges(time: StepTime, budget_ms: float, tokens: float) -> None:
    assert time.prefill_tokens_within(budget_ms, 0) == pytest.approx(tokens)


def test_it_is_not_ready_before_it_has_seen_eight_steps() -> None:
    model = StepTimeModel()
    readiness = []
    for shape in steps(9):
        readiness.append(model.current.ready)
        model.observe(shape, TRUE.step_ms(shape))
    assert readiness == [False] * 8 + [True]
    assert model.steps == 9


@pytest.mark.parametrize("measured_ms", [0.0, -1.0, math.nan])
def test_a_time_that_cannot_be_is_refused(measured_ms: float) -> None:
    with pytest.raises(ValueError, match="allowed is a number above 0"):
        StepTimeModel().observe(shape_of((1, 10)), measured_ms)


def test_it_recovers_the_coefficients_of_exact_steps() -> None:
    found = learned([(s, TRUE.step_ms(s)) for s in steps(400)]).current
    assert astuple(found)[:TERMS] == pytest.approx(astuple(TRUE)[:TERMS], rel=0.05)
    assert worst_error(found) < 0.001
    assert found.error < 0.01


def test_it_predicts_through_noise_and_knows_its_error() -> None:
    rng = np.random.default_rng(1)
    noisy = [(s, TRUE.step_ms(s) * float(np.exp(rng.normal(0.0, 0.05)))) for s in steps(400)]
    found = learned(noisy).current
    assert worst_error(found) < 0.05
    assert found.error == pytest.approx(0.05 * math.sqrt(2 / math.pi), rel=0.5)


@pytest.mark.parametrize("factor", [20.0, 0.05])
def test_a_rare_step_that_was_measured_wrongly_hardly_moves_it(factor: float) -> None:
    measured = [
        (s, TRUE.step_ms(s) * (factor if i % 20 == 19 else 1.0)) for i, s in enumerate(steps(400))
    ]
    assert worst_error(learned(measured).current) < 0.02


def test_a_step_that_looks_instant_after_one_seen_too_late_hardly_moves_it() -> None:
    # With two steps in flight a stalled host sees the first end late and the second at once.
    measured = [(s, TRUE.step_ms(s)) for s in steps(400)]
    for late in range(48, 400, 50):
        shape, took_ms = measured[late]
        measured[late] = (shape, took_ms + 300.0)
        measured[late + 1] = (measured[late + 1][0], 0.1)
    assert worst_error(learned(measured).current) < 0.05


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_it_follows_an_engine_that_changes_its_speed(scale: float) -> None:
    before = [(s, TRUE.step_ms(s)) for s in steps(400)]
    after = [(s, scale * TRUE.step_ms(s)) for s in steps(200, seed=1)]
    assert worst_error(learned([*before, *after]).current, scale=scale) < 0.1


@given(st.lists(st.floats(0.01, 1000.0), min_size=12, max_size=40), st.integers(0, 100))
def test_coefficients_are_never_negative_whatever_is_measured(
    times_ms: list[float], seed: int
) -> None:
    found = learned(list(zip(steps(len(times_ms), seed), times_ms, strict=True))).current
    assert min(astuple(found)[:TERMS]) >= 0.0
    assert 0.0 <= found.error <= 1.0


def test_golden_the_quadratic_of_xllms_time_predictor() -> None:
    # xLLM's own test fits y = 0.5 x^2 + 10 x to these points and expects 150 for x = 10.
    points = [(2, 22.0), (4, 48.0), (6, 78.0), (8, 112.0)]
    found = learned([(shape_of((x, 0)), y) for x, y in points] * 25).current
    assert found.token == pytest.approx(10.0, rel=1e-3)
    assert found.square == pytest.approx(0.5, rel=1e-3)
    assert found.base == pytest.approx(0.0, abs=0.01)
    assert found.step_ms(shape_of((10, 0))) == pytest.approx(150.0, rel=1e-3)


def test_it_learns_what_reading_experts_costs() -> None:
    true = replace(TRUE, experts=30.0, idle_experts=0.9375)
    model = StepTimeModel(idle_experts=0.9375)
    for count, shape in enumerate(steps(400)):
        few = StepShape().with_decodes(1 + count % 24, 100 * (count % 24))
        for one in (shape, few):
            model.observe(one, true.step_ms(one))
    assert worst_error(model.current, true) < 0.01
    assert model.current.experts == pytest.approx(30.0, rel=0.05)
    assert model.current.idle_experts == 0.9375


@pytest.mark.parametrize(("tokens", "share"), [(0, 0.0), (1, 0.25), (2, 0.4375), (10_000, 1.0)])
def test_more_tokens_touch_more_experts(tokens: int, share: float) -> None:
    time = StepTime(experts=8.0, idle_experts=0.75)
    assert time.experts_ms(tokens) == pytest.approx(8.0 * share)
    shape = StepShape().with_decodes(tokens, 0)
    assert time.step_ms(shape) == pytest.approx(8.0 * share)
    assert shape.terms(0.75)[-1] == pytest.approx(share)


def test_a_dense_model_has_no_experts_to_read() -> None:
    found = learned([(s, TRUE.step_ms(s)) for s in steps(100)]).current
    assert found.experts == 0.0
    assert found.experts_ms(100) == 0.0


def test_it_knows_the_largest_prefill_that_it_has_seen() -> None:
    measured = [(s, TRUE.step_ms(s)) for s in steps(64)]
    assert learned(measured).current.most_prefill_tokens == max(
        shape.prefill_tokens for shape, _ in measured
    )


def test_a_restored_model_predicts_as_the_saved_one_and_learns_on() -> None:
    before = learned([(s, TRUE.step_ms(s)) for s in steps(300)])
    after = StepTimeModel()
    after.restore(json.loads(json.dumps(before.saved())))
    assert after.current == before.current
    assert after.steps == 50
    for shape in steps(300, seed=5):
        after.observe(shape, 2.0 * TRUE.step_ms(shape))
    assert worst_error(after.current, scale=2.0) < 0.05


def test_what_was_not_learned_yet_is_not_saved() -> None:
    assert StepTimeModel().saved() == {}


@given(
    st.lists(st.lists(st.floats(0.0, 10.0), min_size=TERMS, max_size=TERMS), min_size=1),
    st.lists(st.floats(-5.0, 5.0), min_size=TERMS, max_size=TERMS),
    st.lists(st.booleans(), min_size=TERMS, max_size=TERMS),
)
def test_the_solution_is_the_best_over_all_active_sets(
    rows: list[list[float]], wish: list[float], start: list[bool]
) -> None:
    terms = np.array(rows).round(3)
    gram, moment = terms.T @ terms, terms.T @ (terms @ np.array(wish))
    found = _non_negative_solution(gram, moment, np.array(start, dtype=np.float64))

    scale = np.sqrt(np.diag(gram))
    used = scale > 0.0
    norm = np.where(used, scale, 1.0)
    ridged = gram / np.outer(norm, norm) + 1e-6 * np.eye(TERMS)
    target = moment / norm

    def loss(x: NDArray[np.float64]) -> float:
        return float(x @ ridged @ x / 2.0 - target @ x)

    best = 0.0
    for chosen in product([False, True], repeat=TERMS):
        free = np.flatnonzero(np.array(chosen) & used)
        trial = np.zeros(TERMS)
        trial[free] = np.linalg.solve(ridged[np.ix_(free, free)], target[free])
        if (trial >= 0.0).all():
            best = min(best, loss(trial))
    assert (found >= 0.0).all()
    assert (found[~used] == np.array(start)[~used]).all()  # not seen now: as it was
    found[~used] = 0.0
    assert loss(found * norm) == pytest.approx(best, rel=1e-6, abs=1e-6)

"""The step-time model that scheduling, KV pricing, speculation and simulation share.

    t = c0 + c1*sum(d) + c2*sum(d^2) + c3*sum(d*p) + c4*B + c5*S        [ms]

d new tokens of a prefill chunk over a context of p tokens, B decodes with S tokens of context in
all. The prefill terms are those of xLLM's time predictor (arXiv 2510.14686), the decode terms those
of its service; coefficients are never negative. :class:`StepTimeModel` learns them from each step
by exponentially weighted least squares on the relative error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TERMS = 6
_FORGET = 0.995  # weight of a step after one more step: a memory of about 200 steps
_FORGET_WRONG = 0.97  # the same while predictions are far off: the machine has changed
_WRONG = 0.25  # a mean error that is far off
_ERROR_DECAY = 0.95
_WARM_STEPS = 8
_REFIT_EVERY = 4
_HUBER = 3.0  # residuals beyond so many mean errors count linearly
_ERROR_FLOOR = 0.02
_SWEEPS = 60


@dataclass(frozen=True)
class StepShape:
    """What one engine step computes.

    Attributes:
        prefill_tokens: sum of d over prefill chunks, in tokens.
        prefill_squares: sum of d*d, in tokens squared.
        prefill_cross: sum of d*p, in tokens squared.
        decodes: number of requests that compute one token.
        decode_context: sum of their context lengths, in tokens.
    """

    prefill_tokens: int = 0
    prefill_squares: int = 0
    prefill_cross: int = 0
    decodes: int = 0
    decode_context: int = 0

    def with_chunk(self, new_tokens: int, context_tokens: int) -> StepShape:
        """This step and one more request; a single new token is a decode."""
        if new_tokens <= 1:
            return StepShape(
                self.prefill_tokens,
                self.prefill_squares,
                self.prefill_cross,
                self.decodes + new_tokens,
                self.decode_context + new_tokens * context_tokens,
            )
        return StepShape(
            self.prefill_tokens + new_tokens,
            self.prefill_squares + new_tokens * new_tokens,
            self.prefill_cross + new_tokens * context_tokens,
            self.decodes,
            self.decode_context,
        )

    @property
    def is_empty(self) -> bool:
        """Whether the step computes nothing."""
        return self.prefill_tokens == 0 and self.decodes == 0

    def terms(self) -> NDArray[np.float64]:
        """The regressors, shape ``[6]``."""
        return np.array(
            [
                1.0,
                self.prefill_tokens,
                self.prefill_squares,
                self.prefill_cross,
                self.decodes,
                self.decode_context,
            ]
        )


@dataclass(frozen=True)
class StepTime:
    """Fitted coefficients, in ms per unit of each term; an immutable answer to "how long".

    Attributes:
        base: c0; token: c1; square: c2; cross: c3; decode: c4; context: c5.
        error: mean relative error of recent predictions, 0.1 for 10 %.
        ready: False until enough steps were seen; predictions are then not to be relied on.
    """

    base: float = 0.0
    token: float = 0.0
    square: float = 0.0
    cross: float = 0.0
    decode: float = 0.0
    context: float = 0.0
    error: float = 1.0
    ready: bool = False

    def step_ms(self, shape: StepShape) -> float:
        """The predicted time of a whole step."""
        return (
            self.base
            + self.token * shape.prefill_tokens
            + self.square * shape.prefill_squares
            + self.cross * shape.prefill_cross
            + self.decode * shape.decodes
            + self.context * shape.decode_context
        )

    def added_ms(self, new_tokens: int, context_tokens: int) -> float:
        """What one more request adds to a step."""
        if new_tokens <= 1:
            return new_tokens * (self.decode + self.context * context_tokens)
        linear = self.token + self.cross * context_tokens
        return new_tokens * (linear + self.square * new_tokens)

    def prefill_tokens_within(self, budget_ms: float, context_tokens: int) -> float:
        """How many tokens of one chunk fit into ``budget_ms``; infinite where they cost nothing."""
        if budget_ms <= 0.0 or budget_ms == math.inf:
            return max(0.0, budget_ms)
        linear = self.token + self.cross * context_tokens
        # The root of the quadratic in the form that stays exact where its square term vanishes.
        root = math.sqrt(linear * linear + 4.0 * self.square * budget_ms)
        return 2.0 * budget_ms / (linear + root) if 0.0 < root < math.inf else math.inf


class StepTimeModel:
    """Learns :class:`StepTime` from measured steps. Holds a 6x6 moment matrix and no history."""

    def __init__(self) -> None:
        self._gram: NDArray[np.float64] = np.zeros((TERMS, TERMS))
        self._moment: NDArray[np.float64] = np.zeros(TERMS)
        self._steps = 0
        self._coefficients: NDArray[np.float64] = np.zeros(TERMS)
        self._error = 1.0
        self.current = StepTime()

    @property
    def steps(self) -> int:
        """How many steps were learned from."""
        return self._steps

    def observe(self, shape: StepShape, measured_ms: float) -> None:
        """Learn from one step.

        Raises:
            ValueError: ``measured_ms`` is not above zero.
        """
        if not measured_ms > 0.0:
            raise ValueError(f"measured_ms is {measured_ms}; allowed is a number above 0.")
        terms = shape.terms()
        weight, scale_ms = 1.0, measured_ms
        if self.current.ready:
            predicted_ms = float(terms @ self._coefficients)
            # A step whose end is seen late makes the next one look far too short; by the longer of
            # the two times it is no more of an outlier than a stall.
            scale_ms = max(measured_ms, predicted_ms)
            residual = abs(predicted_ms - measured_ms) / scale_ms
            bound = _HUBER * max(self._error, _ERROR_FLOOR)
            if residual > bound and self._error < _WRONG:
                weight = bound / residual
            self._error += (1.0 - _ERROR_DECAY) * (residual - self._error)
        # Dividing by its time makes the least squares relative: short steps count too.
        scaled = terms / scale_ms
        wrong = self.current.ready and self._error >= _WRONG
        forget = _FORGET_WRONG if wrong else _FORGET
        self._gram = forget * self._gram + weight * np.outer(scaled, scaled)
        self._moment = forget * self._moment + weight * scaled * (measured_ms / scale_ms)
        self._steps += 1
        if self._steps >= _WARM_STEPS and self._steps % _REFIT_EVERY == 0:
            self._refit()

    def _refit(self) -> None:
        first = not self.current.ready
        self._coefficients = _non_negative_solution(self._gram, self._moment, self._coefficients)
        if first:
            # The fit's own residual: a first guess at the error that is not the initial 100 %.
            fitted = float(
                self._coefficients @ self._gram @ self._coefficients
                - 2.0 * self._coefficients @ self._moment
            )
            weight = (1.0 - _FORGET**self._steps) / (1.0 - _FORGET)
            self._error = min(1.0, math.sqrt(max(0.0, fitted / weight + 1.0)))
        base, token, square, cross, decode, context = self._coefficients.tolist()
        self.current = StepTime(
            base, token, square, cross, decode, context, error=self._error, ready=True
        )


def _non_negative_solution(
    gram: NDArray[np.float64], moment: NDArray[np.float64], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Minimise ``x G x / 2 - m x`` over ``x >= 0`` by coordinate descent; G is ``[n, n]``."""
    scale = np.sqrt(np.diag(gram))
    used = [i for i in range(len(scale)) if scale[i] > 0.0]
    norm = scale[used]
    g = (gram[np.ix_(used, used)] / np.outer(norm, norm)).tolist()
    m = (moment[used] / norm).tolist()
    x = (start[used] * norm).tolist()
    for _ in range(_SWEEPS):
        for i, row in enumerate(g):
            gradient = m[i] - sum(a * b for a, b in zip(row, x, strict=True)) + row[i] * x[i]
            # A little ridge keeps terms apart that so far only occurred together.
            x[i] = max(0.0, gradient / (row[i] + 1e-6))
    result = np.zeros(len(scale))
    result[used] = np.array(x) / norm
    return result

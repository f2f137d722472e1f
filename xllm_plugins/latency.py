"""The step-time model that scheduling, KV pricing, speculation and simulation share.

    t = c0 + c1*sum(d) + c2*sum(d^2) + c3*sum(d*p) + c4*B + c5*S + c6*(1 - (1 - k/E)^T)      [ms]

d new tokens of a prefill chunk over a context of p tokens, B decodes with S tokens of context in
all. The last term is for mixture-of-experts models that route each of the step's T tokens to k of E
experts: the share of experts whose weights are read. The prefill terms are those of xLLM's time
predictor (arXiv 2510.14686), the decode terms those of its service; coefficients are never
negative. :class:`StepTimeModel` learns them from each step by exponentially weighted least squares
on the relative error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TERMS = 7
_FORGET = 0.995  # weight of a step after one more step: a memory of about 200 steps
_FORGET_WRONG = 0.97  # the same while predictions are far off: the machine has changed
_WRONG = 0.25  # a mean error that is far off
_ERROR_DECAY = 0.95
_WARM_STEPS = 8
_REFIT_EVERY = 4  # steps, while they are few
_REFIT_LATER, _FEW_STEPS = 8, 200
_SETTLED = 1e-9
_HUBER = 3.0  # residuals beyond so many mean errors count linearly
_ERROR_FLOOR = 0.02
_RIDGE = 1e-6
_SEEN = 1e-9  # the size of a term's moment below which it has not been seen for long
_PRIOR_STEPS = 50.0  # what a saved profile counts for


class StepShape(NamedTuple):
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

    def with_chunk(self, new_tokens: int, context_tokens: int, *, more: bool = False) -> StepShape:
        """This step and one more request; a single new token is a decode.

        Args:
            new_tokens: of the request.
            context_tokens: before them.
            more: whether the request is in the step already, so that one more token is no decode.
        """
        if new_tokens <= 1 and not more:
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

    def with_decodes(self, decodes: int, context_tokens: int) -> StepShape:
        """This step and so many more decodes with so much context in all."""
        return StepShape(
            self.prefill_tokens,
            self.prefill_squares,
            self.prefill_cross,
            self.decodes + decodes,
            self.decode_context + context_tokens,
        )

    @property
    def tokens(self) -> int:
        """All tokens that the step computes."""
        return self.prefill_tokens + self.decodes

    @property
    def is_empty(self) -> bool:
        """Whether the step computes nothing."""
        return self.tokens == 0

    def terms(self, idle_experts: float = 1.0) -> NDArray[np.float64]:
        """The regressors, shape ``[7]``.

        Args:
            idle_experts: the share of experts that one token leaves idle, ``1 - k/E``; 1 for a
                dense model.
        """
        return np.array(
            [
                1.0,
                self.prefill_tokens,
                self.prefill_squares,
                self.prefill_cross,
                self.decodes,
                self.decode_context,
                1.0 - idle_experts**self.tokens,
            ]
        )


@dataclass(frozen=True)
class StepTime:
    """Fitted coefficients, in ms per unit of each term; an immutable answer to "how long".

    Attributes:
        base: c0; token: c1; square: c2; cross: c3; decode: c4; context: c5; experts: c6.
        idle_experts: the share of experts that one token leaves idle; 1 for a dense model.
        error: mean relative error of recent predictions, 0.1 for 10 %.
        ready: False until enough steps were seen; predictions are then not to be relied on.
        most_prefill_tokens: the most prefill tokens in a step that it learned from; far beyond
            them a prediction is a guess.
    """

    base: float = 0.0
    token: float = 0.0
    square: float = 0.0
    cross: float = 0.0
    decode: float = 0.0
    context: float = 0.0
    experts: float = 0.0
    idle_experts: float = 1.0
    error: float = 1.0
    ready: bool = False
    most_prefill_tokens: int = 0

    def step_ms(self, shape: StepShape) -> float:
        """The predicted time of a whole step."""
        dense_ms = (
            self.base
            + self.token * shape.prefill_tokens
            + self.square * shape.prefill_squares
            + self.cross * shape.prefill_cross
            + self.decode * shape.decodes
            + self.context * shape.decode_context
        )
        return dense_ms + self.experts_ms(shape.tokens)

    def experts_ms(self, tokens: int) -> float:
        """The part of a step of so many tokens that is spent on reading experts' weights."""
        if not self.experts:
            return 0.0
        return self.experts * (1.0 - float(self.idle_experts**tokens))

    def added_ms(self, new_tokens: int, context_tokens: int) -> float:
        """What one more request adds to a step, without experts that it alone needs."""
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


_LEARNED = ("base", "token", "square", "cross", "decode", "context", "experts")
COEFFICIENTS = (*_LEARNED, "idle_experts")
"""The fields of :class:`StepTime` that say how long steps take."""


class StepTimeModel:
    """Learns :class:`StepTime` from measured steps. Holds a 7x7 moment matrix and no history.

    Args:
        idle_experts: the share of experts that one token leaves idle, ``1 - k/E``; 1 for a dense
            model.
    """

    def __init__(self, idle_experts: float = 1.0) -> None:
        self._gram: NDArray[np.float64] = np.zeros((TERMS, TERMS))
        self._moment: NDArray[np.float64] = np.zeros(TERMS)
        self._steps = 0
        self._coefficients: NDArray[np.float64] = np.zeros(TERMS)
        self._error = 1.0
        self._idle_experts = idle_experts
        self._most_prefill_tokens = 0
        self.current = StepTime(idle_experts=idle_experts)

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
        terms = shape.terms(self._idle_experts)
        self._most_prefill_tokens = max(self._most_prefill_tokens, shape.prefill_tokens)
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
        self._gram *= forget
        self._gram += scaled[:, None] * (weight * scaled)
        self._moment *= forget
        self._moment += scaled * (weight * measured_ms / scale_ms)
        self._steps += 1
        every = _REFIT_LATER if self._steps > _FEW_STEPS and not wrong else _REFIT_EVERY
        if self._steps >= _WARM_STEPS and self._steps % every == 0:
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
        self._publish()

    def _publish(self) -> None:
        self.current = StepTime(
            **dict(zip(_LEARNED, self._coefficients.tolist(), strict=True)),
            idle_experts=self._idle_experts,
            error=self._error,
            ready=True,
            most_prefill_tokens=self._most_prefill_tokens,
        )

    def saved(self) -> dict[str, Any]:
        """What a later process needs to start where this one is; plain JSON types."""
        if not self.current.ready:
            return {}
        weight = (1.0 - _FORGET**self._steps) / (1.0 - _FORGET)
        return {
            "step_time_ms": dataclasses.asdict(self.current),
            "gram": (self._gram / weight).tolist(),
            "moment": (self._moment / weight).tolist(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Start from what :meth:`saved` returned; it counts for 50 steps.

        Raises:
            ValueError: it is of another shape, of another model, or not finite.
        """
        try:
            time = StepTime(**saved["step_time_ms"])
            gram = np.array(saved["gram"], dtype=np.float64)
            moment = np.array(saved["moment"], dtype=np.float64)
            values = np.array([getattr(time, name) for name in _LEARNED], dtype=np.float64)
            error, most = float(time.error), int(time.most_prefill_tokens)
            idle_experts = float(time.idle_experts)
        except (KeyError, TypeError, OverflowError) as problem:
            raise ValueError(f"it lacks or spoils {problem}") from problem
        if gram.shape != (TERMS, TERMS) or moment.shape != (TERMS,):
            raise ValueError(f"its matrix has the shape {gram.shape}; needed is {(TERMS, TERMS)}")
        if idle_experts != self._idle_experts:
            raise ValueError("it was measured with other experts")
        if not all(np.isfinite(part).all() for part in (gram, moment, values)) or values.min() < 0:
            raise ValueError("it has coefficients that are negative or not finite")
        if not 0.0 <= error <= 1.0 or most < 0:
            raise ValueError("its error or its largest prefill is out of bounds")
        self._gram, self._moment = gram * _PRIOR_STEPS, moment * _PRIOR_STEPS
        self._coefficients = values
        self._steps = int(_PRIOR_STEPS)
        self._error = error
        self._most_prefill_tokens = most
        self._publish()


def fitted(
    shapes: Sequence[StepShape], times_ms: Sequence[float], idle_experts: float = 1.0
) -> StepTime:
    """The coefficients that explain measured steps best, by the relative error, all alike.

    Args:
        shapes: what the steps computed, shape ``[n]``.
        times_ms: how long they took, shape ``[n]``.
        idle_experts: as for :class:`StepTimeModel`.

    Returns:
        The coefficients, with their mean relative error over these steps.

    Raises:
        ValueError: there is no step, or one that took no time.
    """
    if not shapes or min(times_ms) <= 0.0:
        raise ValueError(f"times_ms is {list(times_ms)}; allowed are numbers above 0, at least one")
    terms = np.array([shape.terms(idle_experts) for shape in shapes])
    times = np.array(times_ms, dtype=np.float64)
    scaled = terms / times[:, None]
    values = _non_negative_solution(scaled.T @ scaled, scaled.sum(axis=0), np.zeros(TERMS))
    error = float(np.mean(np.abs(terms @ values - times) / times))
    return StepTime(
        **dict(zip(_LEARNED, (float(value) for value in values), strict=True)),
        idle_experts=idle_experts,
        error=error,
        ready=True,
        most_prefill_tokens=max(shape.prefill_tokens for shape in shapes),
    )


def _non_negative_solution(
    gram: NDArray[np.float64], moment: NDArray[np.float64], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Minimise ``x G x / 2 - m x`` over ``x >= 0``; G is ``[n, n]``, ``start`` the last solution.

    The active-set method of Lawson and Hanson (1974), from the last solution's active set.
    """
    scale = np.sqrt(np.diag(gram))
    used = np.flatnonzero(scale > _SEEN)
    norm = scale[used]
    # A little ridge keeps terms apart that so far only occurred together.
    g = gram[np.ix_(used, used)] / np.outer(norm, norm) + _RIDGE * np.eye(len(used))
    m = moment[used] / norm
    x = np.zeros(len(used))
    free = start[used] > 0.0
    trial = _solved(g, m, free)
    if (trial[free] > 0.0).all():
        x = trial
    else:
        free[:] = False
    for _ in range(3 * len(used)):
        gradient = np.where(free, -np.inf, m - g @ x)
        if gradient.max(initial=-np.inf) <= _SETTLED:
            break
        free[int(gradient.argmax())] = True
        trial = _solved(g, m, free)
        while (trial[free] <= 0.0).any():
            # Go towards the solution until the first of them becomes zero, which leaves the set.
            falling = free & (trial <= 0.0)
            x += float(np.min(x[falling] / (x[falling] - trial[falling]))) * (trial - x)
            free &= x > _SETTLED
            x[~free] = 0.0
            trial = _solved(g, m, free)
        x = trial
    result = start.copy()  # what was not seen for long keeps its coefficient
    result[used] = x / norm
    return result


def _solved(
    g: NDArray[np.float64], m: NDArray[np.float64], free: NDArray[np.bool_]
) -> NDArray[np.float64]:
    x = np.zeros(len(m))
    chosen = np.flatnonzero(free)
    if len(chosen):
        x[chosen] = np.linalg.solve(g[np.ix_(chosen, chosen)], m[chosen])
    return x

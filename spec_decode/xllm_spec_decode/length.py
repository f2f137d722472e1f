"""How far to draft: as long as the next token gains more than the time it takes from all."""

from __future__ import annotations

import math

import numpy as np

from xllm_plugins.latency import StepShape, StepTime
from xllm_spec_decode.acceptance import Floats
from xllm_spec_decode.compiled import compiled
from xllm_spec_decode.drafters import Ints

PRIOR = StepTime(base=20.0, token=1.0, decode=1.0)
"""Before steps were measured: reading the weights takes as long as computing 20 tokens."""
_CAUTION = 1.1  # a token has to gain so many times what it costs,
_WORTH = 1.02  # and all of them together so much over a step without any
_LEAST_MS = 1e-9


def verification(drafted: Ints, contexts: Ints) -> StepShape:
    """The shape of a step that verifies drafts and computes no prompt.

    Drafted tokens count as a chunk's, the request's own as a decode's, and that there are drafts at
    all as one square, so that a model which learns from such steps alone tells what a drafted token
    adds, and what verifying adds however many there are.

    Args:
        drafted: ``[n]``, tokens drafted for each request.
        contexts: ``[n]``, tokens of its text.
    """
    tokens, cross, context = _sums(drafted, contexts)
    return StepShape(tokens, int(tokens > 0), cross, len(drafted), context)


@compiled
def _sums(drafted: Ints, contexts: Ints) -> tuple[int, int, int]:
    tokens, cross, context = 0, 0, 0
    for i in range(len(drafted)):
        tokens += drafted[i]
        cross += drafted[i] * contexts[i]
        context += contexts[i]
    return tokens, cross, context


def draft_lengths(
    survival: Floats,
    contexts: Ints,
    step_time: StepTime,
    *,
    budget_ms: float = math.inf,
    most_tokens: int = 1 << 30,
) -> Ints:
    """The lengths of drafts with which the requests together get on fastest.

    A step brings a request its own token and every drafted one that is right together with those
    before it, and takes all requests the same time. What is maximised is the product of their
    tokens per millisecond (proportional fairness; Kelly, Maulloo, Tan, 1998): where they are alike
    that is the step's tokens per millisecond, and one whose text repeats does not slow down others
    by more than it gains itself. The tokens of all drafts are taken by gain for cost, the best
    first, while that is worth its time. Gains fall along a draft and costs do not, so no token
    comes before the one that it follows; if all is no better than no drafts, there are none.

    Args:
        survival: ``[n, most]``, the chance of a token and all before it; falls along a draft.
        contexts: ``[n]``, tokens of each request's text.
        step_time: how long steps take, by :func:`verification`'s shape.
        budget_ms: that the step may take, for the sake of the others in it.
        most_tokens: that may be drafted in all.

    Returns:
        Tokens to draft, ``[n]``.
    """
    n, most = survival.shape
    model = step_time if step_time.ready else PRIOR
    plain_ms = model.step_ms(StepShape(decodes=n, decode_context=int(contexts.sum())))
    found, best = np.zeros(n, np.int64), _WORTH * n / plain_ms
    # The more tokens a step has, the fewer experts each adds: prices of drafts' 1st, 2nd, 4th, ...
    # tokens are tried, and the whole step is held against what its experts really take.
    for k in [1 << i for i in range(most.bit_length())] if model.experts else [1]:
        read_ms = model.experts_ms((k + 1) * n) - model.experts_ms(k * n)
        lengths = np.zeros(n, np.int64)
        tokens, step_ms = _take(
            survival,
            contexts,
            lengths,
            (model.token, model.cross, read_ms / n),
            (plain_ms + model.square, budget_ms),
            most_tokens,
        )
        if model.experts:
            step_ms = model.step_ms(verification(lengths, contexts))
        if step_ms <= budget_ms and tokens / step_ms >= best:
            found, best = lengths, tokens / step_ms
    return found


def speed(survival: Floats, lengths: Ints, step_ms: float) -> float:
    """What :func:`draft_lengths` maximises: the geometric mean of requests' tokens, per ms.

    Args:
        survival: ``[n, most]``, the chance of a token and all before it.
        lengths: ``[n]``, tokens of each draft that are taken.
        step_ms: that the step takes.
    """
    taken = np.arange(survival.shape[1]) < lengths[:, None]
    return float(np.exp(np.log1p(np.where(taken, survival, 0.0).sum(1)).mean()) / step_ms)


@compiled
def _take(
    survival: Floats,
    contexts: Ints,
    lengths: Ints,
    token: tuple[float, float, float],
    step: tuple[float, float],
    most_tokens: int,
) -> tuple[float, float]:
    """Fill ``lengths`` greedily; the step's tokens, and its time.

    A token's gain is held against what its request has already, its cost against the step, which
    is the product's derivative. The tokens returned are as many as if each request had the
    geometric mean of all.

    The requests play a knockout by what the next token of each gains for its cost, the first of
    equal ones wins; after a token only its request's matches are played again.
    """
    n, most = survival.shape
    token_ms, cross_ms, experts_ms = token
    start_ms, budget_ms = step
    size = 1
    while size < n:
        size *= 2
    cost_ms, ratio = np.zeros(n), np.zeros(size)
    winner = np.zeros(2 * size, np.int64)  # the final at 1, those of the match at i at 2i and 2i+1
    for i in range(size):
        winner[size + i] = i
        if i < n:
            cost_ms[i] = max(token_ms + cross_ms * contexts[i], _LEAST_MS) + experts_ms
            ratio[i] = survival[i, 0] / cost_ms[i]
    for match in range(size - 1, 0, -1):
        one, other = winner[2 * match], winner[2 * match + 1]
        winner[match] = one if ratio[one] >= ratio[other] else other
    own = np.ones(n)
    taken, spent_ms = 0, 0.0
    while taken < most_tokens and ratio[winner[1]] > 0.0:
        i = winner[1]
        gain, cost = survival[i, lengths[i]], cost_ms[i]
        step_ms = start_ms + (spent_ms + cost)
        if step_ms > budget_ms or gain / own[i] * (step_ms - cost) <= _CAUTION * n * cost:
            break
        own[i] += gain
        taken, spent_ms = taken + 1, spent_ms + cost
        lengths[i] += 1
        ratio[i] = survival[i, lengths[i]] / own[i] / cost if lengths[i] < most else 0.0
        best, its, match = i, ratio[i], size + i
        while match > 1:
            rival = winner[match ^ 1]
            theirs = ratio[rival]
            # As a number: a branch that nothing can predict takes twice the time.
            beaten = np.int64((theirs > its) | ((theirs == its) & (rival < best)))
            best += beaten * (rival - best)
            its = max(its, theirs)
            match >>= 1
            winner[match] = best
    return n * math.exp(np.log(own).mean()), start_ms + spent_ms

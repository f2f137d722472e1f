"""How far to draft: as long as the next token gains more than the time it takes."""

from __future__ import annotations

import math

import numpy as np

from xllm_plugins.latency import StepShape, StepTime
from xllm_spec_decode.acceptance import Floats
from xllm_spec_decode.drafters import Ints

PRIOR = StepTime(base=20.0, token=1.0, decode=1.0)
"""Before steps were measured: reading the weights takes as long as computing 20 tokens."""
_CAUTION = 1.1  # a token has to gain so many times what it costs,
_WORTH = 1.02  # and all of them together so much over a step without any
_LEAST_MS = 1e-9


def verification(requests: int, context_tokens: int, drafted: Ints, contexts: Ints) -> StepShape:
    """The shape of a step that verifies drafts and computes no prompt.

    Drafted tokens count as a chunk's, the request's own as a decode's, and that there are drafts at
    all as one square, so that a model which learns from such steps alone tells what a drafted token
    adds, and what verifying adds however many there are.

    Args:
        requests: in the step.
        context_tokens: of all of them.
        drafted: ``[n]``, tokens drafted for each request.
        contexts: ``[n]``, tokens of its text.
    """
    return StepShape(
        prefill_tokens=int(drafted.sum()),
        prefill_squares=int(drafted.any()),
        prefill_cross=int(drafted @ contexts),
        decodes=requests,
        decode_context=context_tokens,
    )


def draft_lengths(
    survival: Floats,
    contexts: Ints,
    step_time: StepTime,
    *,
    budget_ms: float = math.inf,
    most_tokens: int = 1 << 30,
) -> Ints:
    """The lengths of drafts that yield the most tokens per millisecond of the step.

    A step of ``n`` requests yields ``n`` tokens, and with them every drafted token that is right
    together with those before it. The tokens of all drafts are taken by gain for cost, the best
    first, while that is above the yield of the step so far. Gains fall along a draft and costs do
    not, so no token comes before the one that it follows, and where the greedy choice ends the
    yield is at its maximum; if that is none over a step without drafts, there are none.

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
    cost_ms = np.maximum(model.token + model.cross * contexts, _LEAST_MS)
    if model.experts:
        cost_ms += (model.experts_ms(2 * n) - model.experts_ms(n)) / n
    ratio = (survival / cost_ms[:, None]).reshape(-1)
    # Nothing below the yield without drafts can be worth it, since drafts only raise that.
    worth = np.flatnonzero(ratio > _CAUTION * n / plain_ms)
    order = worth[np.argsort(-ratio[worth], kind="stable")][:most_tokens]
    rows = order // most
    gains, costs_ms = survival.reshape(-1)[order], cost_ms[rows]
    tokens = n + np.cumsum(gains)
    step_ms = plain_ms + model.square + np.cumsum(costs_ms)
    gaining = gains * (step_ms - costs_ms) > _CAUTION * (tokens - gains) * costs_ms
    fits = gaining & (step_ms <= budget_ms)
    taken = len(fits) if fits.all() else int(fits.argmin())
    if not taken or tokens[taken - 1] * plain_ms < _WORTH * n * step_ms[taken - 1]:
        return np.zeros(n, np.int64)
    return np.bincount(rows[:taken], minlength=n)

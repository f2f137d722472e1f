"""How many tokens a model drafts for every request of a step, where one number holds for all."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xllm_plugins.compat.spec_beside import NO_PASS
from xllm_plugins.latency import StepShape, StepTimeModel

PRIOR_CHANCE = 0.7  # of a first token; a later one's prior is the chance of the one before it
_PRIOR_TRIES = 8.0
_MEMORY = 0.998  # weight of a try after one more
WORTH = 1.02  # times what no draft would yield, at least
_WARM_ROUNDS = 2  # through all numbers, before the best is chosen
_PROBE_EVERY = 64  # steps after which another number shows what it costs and yields


class Drafted(NamedTuple):
    """What a step has computed.

    Attributes:
        requests: in it.
        verified: tokens drafted before it for each request that had a draft, ``[with a draft]``.
        accepted: of them the ones that the model said too, ``[with a draft]``.
        width: tokens that were drafted after it for each request.
        context_tokens: of all requests; None where prompts were computed.
        took_ms: None where the time is not the step's alone.
    """

    requests: int
    verified: NDArray[np.int64]
    accepted: NDArray[np.int64]
    width: int
    context_tokens: int | None
    took_ms: float | None


class Turns:
    """Which lengths are tried, and when: all until step times are known, then one in 64 steps.

    Drafts that nobody makes tell nothing. 0, 1, 2, 4, ... and the longest show what a pass takes.

    Args:
        most: tokens that are drafted at most.
    """

    def __init__(self, most: int) -> None:
        powers = [1 << i for i in range(most.bit_length()) if 1 << i < most]
        self._lengths = [most, *powers[::-1], 0]
        self._turn = 0
        self._steps = 0  # since one was tried

    @property
    def warm(self) -> bool:
        """Whether all have been tried as often as the first choice needs."""
        return self._turn >= _WARM_ROUNDS * len(self._lengths)

    def due(self) -> bool:
        """Asked once in a step that chooses: whether it is to try one instead."""
        self._steps += 1
        return self._steps >= _PROBE_EVERY

    def next(self) -> int:
        """The length to try in this step."""
        self._steps = 0
        self._turn += 1
        return self._lengths[(self._turn - 1) % len(self._lengths)]


class BatchWidth:
    """Chooses the number that yields the most tokens per millisecond, from what was measured.

    A step of ``n`` requests whose drafts are ``K`` tokens long yields ``n`` times one token and the
    chances that the first one, two, ... of them are right. It verifies ``n * K`` tokens and the
    drafter computes ``P`` passes, one for ``K = 0`` and else ``K``, which is learned apart, for
    drafting is paid however much of it is verified:

        step_ms  base + request * n + context * S + token * n * K + pass * P + pass_request * P * n

    All numbers up to ``most`` are compared. Every 64 steps another one is tried, in turn.

    Args:
        most: tokens that are drafted at most.
        idle_experts: as for :class:`xllm_plugins.latency.StepTimeModel`.
    """

    def __init__(self, most: int, idle_experts: float = 1.0) -> None:
        self._most = most
        self._hits = np.zeros(most)
        self._tries = np.zeros(most)
        self._model = StepTimeModel(idle_experts)
        self._context_per_request = 0.0
        self._turns = Turns(most)

    def choose(self, requests: int, budget_ms: float) -> int:
        """The tokens to draft for each of so many requests, with steps within ``budget_ms``."""
        if not self._model.current.ready or not self._turns.warm:
            return self._turns.next()
        shapes = [
            shape(requests, requests * k, k, int(requests * self._context_per_request))
            for k in range(self._most + 1)
        ]
        step_ms = np.array([self._model.current.step_ms(one) for one in shapes])
        allowed = step_ms <= budget_ms
        allowed[0] = True
        if self._turns.due():
            probe = self._turns.next()
            return probe if allowed[probe] else 0
        tokens = 1.0 + np.concatenate(([0.0], np.cumsum(np.cumprod(self.chances()))))
        per_ms = np.where(allowed, tokens / np.maximum(step_ms, 1e-9), 0.0)
        best = int(per_ms.argmax())
        return best if per_ms[best] > WORTH * per_ms[0] else 0

    def observe(self, step: Drafted) -> None:
        """Learn from a step."""
        for k in range(self._most):
            reached = int(((step.verified > k) & (step.accepted >= k)).sum())
            if reached:
                memory = _MEMORY**reached
                self._tries[k] = self._tries[k] * memory + reached
                self._hits[k] = self._hits[k] * memory + int((step.accepted > k).sum())
        if step.context_tokens is None:
            return
        self._context_per_request = step.context_tokens / max(1, step.requests)
        if step.took_ms is not None:
            verified = int(step.verified.sum())
            done = shape(step.requests, verified, step.width, step.context_tokens)
            self._model.observe(done, step.took_ms)

    def chances(self) -> NDArray[np.float64]:
        """The chance of each token of a draft once those before it were right, ``[most]``."""
        return chances(self._hits, self._tries)

    def step_facts(self) -> dict[str, Any]:
        """The learned step times, in plain types."""
        time = self._model.current
        return {
            "ready": time.ready,
            "base": time.base,
            "request": time.decode,
            "drafted_token": time.token,
            "pass": time.square,
            "pass_request": time.cross,
            "error": time.error,
        }


def chances(hits: NDArray[np.float64], tries: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chance of each place, ``[k]``; one that is hardly tried has that of the one before."""
    found, before = np.zeros(len(hits)), PRIOR_CHANCE
    for k in range(len(hits)):
        before = found[k] = (hits[k] + _PRIOR_TRIES * before) / (tries[k] + _PRIOR_TRIES)
    return found


def passes(width: int) -> int:
    """Passes of the drafter for drafts of so many tokens; none for ``NO_PASS``."""
    return 0 if width == NO_PASS else max(1, width)


def shape(requests: int, verified: int, width: int, context_tokens: int) -> StepShape:
    """A step that verifies so many drafted tokens, and drafts ``width`` for each request.

    The drafter's passes take the place of what a step that computes prompts has.
    """
    return StepShape(
        prefill_tokens=verified,
        prefill_squares=passes(width),
        prefill_cross=passes(width) * requests,
        decodes=requests,
        decode_context=context_tokens,
    )

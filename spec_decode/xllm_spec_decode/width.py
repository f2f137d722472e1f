"""How many tokens a model drafts for every request of a step, where one number holds for all."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xllm_plugins.latency import StepShape, StepTimeModel

_PRIOR_CHANCE = 0.7  # of a first token; a later one's prior is the chance of the one before it
_PRIOR_TRIES = 8.0
_MEMORY = 0.998  # weight of a try after one more
_WORTH = 1.02  # times what no draft would yield, at least
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


class BatchWidth:
    """Chooses the number that yields the most tokens per millisecond, from what was measured.

    A step of ``n`` requests whose drafts are ``K`` tokens long yields ``n`` times one token and the
    chances that the first one, two, ... of them are right. It verifies ``n * K`` tokens and the
    drafter computes ``K`` passes, which is learned apart, for drafting is paid however much of it
    is verified:

        step_ms  base + request * n + context * S + token * n * K + pass * K + pass_request * K * n

    All numbers up to ``most`` are compared. Every 64 steps another one is tried, in turn, since
    drafts that nobody makes tell nothing: at most a 64th of the time is spent on that.

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
        self._turn = 0  # through the numbers, from the largest down
        self._since_probe = 0

    def choose(self, requests: int, budget_ms: float) -> int:
        """The tokens to draft for each of so many requests, with steps within ``budget_ms``."""
        if not self._model.current.ready or self._turn < _WARM_ROUNDS * (self._most + 1):
            return self._next()
        shapes = [
            shape(requests, requests * k, k, int(requests * self._context_per_request))
            for k in range(self._most + 1)
        ]
        step_ms = np.array([self._model.current.step_ms(one) for one in shapes])
        allowed = step_ms <= budget_ms
        allowed[0] = True
        self._since_probe += 1
        if self._since_probe >= _PROBE_EVERY:
            self._since_probe = 0
            probe = self._next()
            return probe if allowed[probe] else 0
        tokens = 1.0 + np.concatenate(([0.0], np.cumsum(np.cumprod(self.chances()))))
        per_ms = np.where(allowed, tokens / np.maximum(step_ms, 1e-9), 0.0)
        best = int(per_ms.argmax())
        return best if per_ms[best] > _WORTH * per_ms[0] else 0

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
        found, before = np.zeros(self._most), _PRIOR_CHANCE
        for k in range(self._most):
            hits = self._hits[k] + _PRIOR_TRIES * before
            before = found[k] = hits / (self._tries[k] + _PRIOR_TRIES)
        return found

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

    def _next(self) -> int:
        self._turn += 1
        return self._most - (self._turn - 1) % (self._most + 1)


def shape(requests: int, verified: int, width: int, context_tokens: int) -> StepShape:
    """A step that verifies so many drafted tokens, and drafts ``width`` for each request.

    The drafter's passes take the place of what a step that computes prompts has.
    """
    return StepShape(
        prefill_tokens=verified,
        prefill_squares=width,
        prefill_cross=width * requests,
        decodes=requests,
        decode_context=context_tokens,
    )

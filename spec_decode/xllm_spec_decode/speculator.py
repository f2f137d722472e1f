"""One engine's speculation: from a step's requests to their drafts, and the books of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from xllm_plugins.latency import StepTimeModel
from xllm_spec_decode.acceptance import Acceptance, Best
from xllm_spec_decode.drafters import Drafter, Drafts, Ints, Rows, Tokens
from xllm_spec_decode.length import draft_lengths, verification
from xllm_spec_decode.slots import Request, Slots
from xllm_spec_decode.tally import Tally

logger = logging.getLogger("vllm.xllm_spec_decode")

_FIRST_TOKENS = 8  # drafted at most before anything was measured, or for each 8th request one,
_FIRST_REQUESTS = 8
_GROWTH = 2  # and then so often as many as in any step that was
_PROBE_EVERY = 64  # steps without drafts after which one request's shows what drafting costs now
_PROBE_CHANCE = 0.5  # of the tokens that it takes
_STALE_S = 1.0  # a step that took longer waited for something else


class Step(NamedTuple):
    """What a step has computed, as the engine tells it.

    Attributes:
        ids: the requests, in the order of their rows.
        new: those that were not there before.
        finished: those that are gone.
        drafted: tokens that were drafted for a request in this step, where any were.
        computed_tokens: of all requests.
        prompts: ``[n]``, prompt tokens of each.
    """

    ids: Sequence[str]
    new: Mapping[str, Request]
    finished: Sequence[str]
    drafted: Mapping[str, int]
    computed_tokens: int
    prompts: Ints


class Speculator:
    """Asks drafters for drafts, estimates their worth, and says whose are used and how far.

    Args:
        drafters: by name; one that fails is switched off.
        slots: requests at a time.
        most: tokens of a draft at most.
        idle_experts: as for :class:`xllm_plugins.latency.StepTimeModel`.
    """

    def __init__(
        self, drafters: Mapping[str, Drafter], slots: int, most: int, idle_experts: float = 1.0
    ) -> None:
        self._names = list(drafters)
        self._drafters: list[Drafter | None] = list(drafters.values())
        self._acceptance = Acceptance(len(drafters), slots, most)
        self._model = StepTimeModel(idle_experts)
        self._slots = Slots(slots)
        self._known = np.zeros(slots, np.int64)
        self._chosen = np.zeros(slots, np.int64)  # whose draft a request has
        self._drafts = [Drafts.empty(slots, most) for _ in drafters]
        self._best = Best.empty(slots, most)
        self._last: tuple[float, frozenset[str]] = (-math.inf, frozenset())
        self._quiet_steps = 0
        self._tally = Tally(self._names)

    def propose(
        self, step: Step, said: Sequence[Sequence[int]], lengths: Ints, tokens: Tokens, now_s: float
    ) -> list[list[int]]:
        """The drafts for the next step.

        Args:
            step: the one that has just been computed.
            said: the tokens that each request said in it; none while its prompt is computed.
            lengths: ``[n]``, tokens of each request's text, those included.
            tokens: ``[any, longest text]``, the texts, one a row.
            now_s: the time.

        Returns:
            A draft for each request, empty for none.
        """
        slots = self._admit(step)
        n = len(slots)
        grown = np.fromiter(map(len, said), np.int64, n)
        drafted = np.fromiter(map(step.drafted.get, step.ids, repeat(0)), np.int64, n)
        self._tally.add(drafted, grown, self._chosen[slots])
        self._learn_time(step, drafted, lengths - grown, now_s)
        rows = Rows(
            tokens=tokens,
            rows=np.arange(n),
            slots=slots,
            known=self._known[slots],
            lengths=lengths,
            prompts=step.prompts,
            tenants=self._slots.tenants(slots),
        )
        self._acceptance.observe(rows)
        self._each(lambda drafter, number: drafter.learn(rows))
        self._known[slots] = lengths
        found: list[list[int]] = [[] for _ in said]
        speaking = np.flatnonzero(grown)
        if not len(speaking):
            return found
        if len(speaking) < n:
            rows = Rows(tokens, *(part[speaking] for part in rows[1:]))
        best, chosen = self._choose(rows)
        self._chosen[rows.slots] = best.drafter
        drafting = np.flatnonzero(chosen)
        for place, draft, length in zip(
            speaking[drafting].tolist(),
            best.tokens[drafting].tolist(),
            chosen[drafting].tolist(),
            strict=True,
        ):
            found[place] = draft[:length]
        return found

    def warm_up(
        self, step: Step, said: Sequence[Sequence[int]], lengths: Ints, tokens: Tokens
    ) -> None:
        """Go through a step of requests that are then forgotten, so that everything is compiled."""
        self.propose(step, said, lengths, tokens, -math.inf)
        self.propose(step._replace(new={}), said, lengths, tokens, -math.inf)
        for request_id in step.ids:
            self._slots.release(request_id)
        self._last = (-math.inf, frozenset())
        failed, self._tally = self._tally.failed, Tally(self._names)
        self._tally.failed.update(failed)

    def facts(self) -> dict[str, Any]:
        """What was done and is expected, in plain types."""
        time = self._model.current
        chances = self._acceptance.first_token()
        return {
            **self._tally.facts(),
            "acceptance": dict(zip(self._names, chances, strict=True)),
            "step_ms": {
                "ready": time.ready,
                "base": time.base,
                "request": time.decode,
                "drafted_token": time.token,
                "verifying": time.square,
                "error": time.error,
            },
        }

    def _admit(self, step: Step) -> Ints:
        for request_id in step.finished:
            self._slots.release(request_id)
        slots, taken = self._slots.take(step.ids, step.new)
        for slot in taken:
            self._known[slot] = 0
            self._acceptance.forget(slot)
            self._each(lambda drafter, number, slot=slot: drafter.forget(slot))  # type: ignore[misc]
        return slots

    def _learn_time(self, step: Step, drafted: Ints, contexts: Ints, now_s: float) -> None:
        """Learn from a step that followed the last one at once and computed no prompt."""
        (last_s, before), here = self._last, frozenset(step.ids)
        self._last = (now_s, here)
        alone = step.computed_tokens == len(step.ids) + int(drafted.sum())
        if alone and here <= before and 0.0 < now_s - last_s < _STALE_S:
            shape = verification(drafted, contexts)
            self._model.observe(shape, (now_s - last_s) * 1e3)

    def _choose(self, rows: Rows) -> tuple[Best, Ints]:
        """For each row the best draft, and how many tokens of it to take."""
        n = len(rows.rows)
        drafts = [one.head(n) for one in self._drafts]
        best = self._best.head(n)
        self._each(lambda drafter, number: drafter.draft(rows, drafts[number]))
        for number, drafter in enumerate(self._drafters):
            if drafter is None:
                drafts[number].lengths[:] = 0
        self._acceptance.best(rows, drafts, best)
        time = self._model.current
        budget_ms = self._slots.least_tpot_ms(rows.slots)
        first = max(_FIRST_TOKENS, n // _FIRST_REQUESTS)
        most = max(first, _GROWTH * time.most_prefill_tokens)
        lengths = draft_lengths(
            best.survival, rows.lengths, time, budget_ms=budget_ms, most_tokens=most
        )
        if not lengths.any() and self._quiet_steps >= _PROBE_EVERY:
            row = int(best.survival[:, 0].argmax())
            probe = np.zeros_like(lengths)
            probe[row] = np.count_nonzero(best.survival[row] > _PROBE_CHANCE)
            shape = verification(probe, rows.lengths)
            if time.step_ms(shape) <= budget_ms:
                lengths = probe
        self._quiet_steps = 0 if lengths.any() else self._quiet_steps + 1
        return best, lengths

    def _each(self, call: Callable[[Drafter, int], None]) -> None:
        """Have all drafters do something; one that fails is not asked again."""
        for number, drafter in enumerate(self._drafters):
            if drafter is None:
                continue
            try:
                call(drafter, number)
            except Exception as error:
                name = self._names[number]
                logger.exception("The drafter %s failed and is switched off", name)
                self._tally.failed[name] = f"{type(error).__name__}: {error}"
                self._drafters[number] = None

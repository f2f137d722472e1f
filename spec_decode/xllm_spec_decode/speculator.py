"""One engine's speculation: from a step's requests to their drafts, and the books of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from xllm_plugins.latency import StepTime, StepTimeModel
from xllm_spec_decode.acceptance import Acceptance, Best, Floats
from xllm_spec_decode.beside import ModelBeside
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
# When a step ended, the requests in it, and whether it computed no prompt:
_NO_STEP: tuple[float, frozenset[str], bool] = (-math.inf, frozenset(), False)
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


class _Begun(NamedTuple):
    """A step between the drafts from texts and those of a model.

    Attributes:
        requests: in it.
        places: of those that said something among them, ``[n]``.
        rows: those.
        best: for each of them the best draft so far.
    """

    requests: int
    places: Ints
    rows: Rows
    best: Best


class Speculator:
    """Asks drafters for drafts, estimates their worth, and says whose are used and how far.

    A drafting model may stand beside drafters from texts, which draft first: see
    :class:`xllm_spec_decode.beside.ModelBeside`.

    Args:
        drafters: from texts, by name; one that fails is switched off.
        slots: requests at a time.
        most: tokens of a draft at most.
        idle_experts: as for :class:`xllm_plugins.latency.StepTimeModel`.
        model: the name of a drafting model beside them; empty for none.
    """

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        slots: int,
        most: int,
        idle_experts: float = 1.0,
        model: str = "",
    ) -> None:
        self._names = [*drafters, *([model] if model else [])]
        self._drafters: list[Drafter | None] = list(drafters.values())
        self._beside = ModelBeside(slots, most) if model else None
        self._begun: _Begun | None = None
        self._acceptance = Acceptance(len(self._names), slots, most, bool(model))
        self._model = StepTimeModel(idle_experts)
        self._slots = Slots(slots)
        self._known = np.zeros(slots, np.int64)
        self._chosen = np.zeros(slots, np.int64)  # whose draft a request has
        self._drafts = [Drafts.empty(slots, most) for _ in self._names]
        self._best = Best.empty(slots, most)
        self._last = _NO_STEP
        self._quiet_steps = 0
        self._tally = Tally(self._names)

    def propose(
        self, step: Step, said: Sequence[Sequence[int]], lengths: Ints, tokens: Tokens, now_s: float
    ) -> list[list[int]]:
        """The drafts for the next step, where there is no model: :meth:`begin`, :meth:`finish`."""
        self.begin(step, said, lengths, tokens, now_s)
        return self.finish()

    def begin(
        self, step: Step, said: Sequence[Sequence[int]], lengths: Ints, tokens: Tokens, now_s: float
    ) -> int:
        """Learn from a step and draft from texts.

        Args:
            step: the one that has just been computed.
            said: the tokens that each request said in it; none while its prompt is computed.
            lengths: ``[n]``, tokens of each request's text, those included.
            tokens: ``[any, longest text]``, the texts, one a row.
            now_s: the time.

        Returns:
            The tokens that the model is to draft for each request; ``NO_PASS`` for no pass.
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
        speaking = np.flatnonzero(grown)
        if len(speaking) < n:
            rows = Rows(tokens, *(part[speaking] for part in rows[1:]))
        best = self._best.head(len(speaking))
        best.survival[:] = 0.0
        self._begun = _Begun(n, speaking, rows, best)
        if len(speaking):
            self._draft(rows, best)
        return self._width(slots, rows, best)

    def finish(self, modelled: Tokens | None = None) -> list[list[int]]:
        """The drafts for the next step.

        Args:
            modelled: what the model has drafted, ``[n, as many as it was told to]``.

        Returns:
            A draft for each request, empty for none.
        """
        assert self._begun is not None
        n, places, rows, best = self._begun
        found: list[list[int]] = [[] for _ in range(n)]
        if not len(places):
            return found
        if self._beside is not None and modelled is not None and modelled.shape[1]:
            drafts = self._drafts[-1].head(len(places))
            self._beside.compare(rows.slots, modelled[places], best, drafts)
            self._acceptance.judge(len(self._names) - 1, rows, drafts, best)
        chosen = self._lengths(rows, best)
        self._chosen[rows.slots] = best.drafter
        drafting = np.flatnonzero(chosen)
        for place, draft, length in zip(
            places[drafting].tolist(),
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
        self._last = _NO_STEP
        if self._beside is not None:
            self._beside = ModelBeside(*self._best.survival.shape)
        failed, self._tally = self._tally.failed, Tally(self._names)
        self._tally.failed.update(failed)

    def facts(self) -> dict[str, Any]:
        """What was done and is expected, in plain types."""
        time = self._model.current
        chances = self._acceptance.first_token()
        drafting = {"verifying": time.square}
        if self._beside is not None:
            drafting = {"pass": time.square, "pass_request": time.cross}
        return {
            **self._tally.facts(),
            "acceptance": dict(zip(self._names, chances, strict=True)),
            "step_ms": {
                "ready": time.ready,
                "base": time.base,
                "request": time.decode,
                "drafted_token": time.token,
                **drafting,
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
        if self._beside is not None:
            for slot, request_id in zip(slots.tolist(), step.ids, strict=True):
                if request_id in step.new:
                    self._beside.admit(slot, step.new[request_id].cached_tokens)
        return slots

    def _learn_time(self, step: Step, drafted: Ints, contexts: Ints, now_s: float) -> None:
        """Learn from a step that followed the last one at once and computed no prompt.

        What a drafting model computes after a step of prompts is in the time of the next one.
        """
        (last_s, before, last_alone), here = self._last, frozenset(step.ids)
        alone = step.computed_tokens == len(step.ids) + int(drafted.sum())
        self._last = (now_s, here, alone)
        plain = alone and (last_alone or self._beside is None)
        if plain and here <= before and 0.0 < now_s - last_s < _STALE_S:
            shape = (self._beside.step if self._beside else verification)(drafted, contexts)
            self._model.observe(shape, (now_s - last_s) * 1e3)

    def _draft(self, rows: Rows, best: Best) -> None:
        """For each row the best draft from texts."""
        drafts = [one.head(len(rows.rows)) for one in self._drafts]
        self._each(lambda drafter, number: drafter.draft(rows, drafts[number]))
        for number, drafter in enumerate(self._drafters):
            if drafter is not None:
                self._acceptance.judge(number, rows, drafts[number], best)

    def _width(self, slots: Ints, rows: Rows, best: Best) -> int:
        """How far the model drafts."""
        if self._beside is None:
            return 0
        if not self._beside.begin(slots) or not len(rows.rows):
            return self._beside.width
        budget_ms = self._slots.least_tpot_ms(rows.slots)
        likely = self._acceptance.likely(rows.slots)
        self._beside.choose(
            rows.slots,
            best.survival,
            likely,
            rows.lengths,
            self._model.current,
            budget_ms,
            lambda survival, time: self._fitting(survival, rows, time, budget_ms),
        )
        return self._beside.width

    def _lengths(self, rows: Rows, best: Best) -> Ints:
        """How many tokens of each row's draft to take."""
        time = self._model.current
        if self._beside is not None:
            time = self._beside.time(time, len(rows.rows), self._beside.width)
        budget_ms = self._slots.least_tpot_ms(rows.slots)
        lengths = self._fitting(best.survival, rows, time, budget_ms)
        if not lengths.any() and self._quiet_steps >= _PROBE_EVERY:
            row = int(best.survival[:, 0].argmax())
            probe = np.zeros_like(lengths)
            probe[row] = np.count_nonzero(best.survival[row] > _PROBE_CHANCE)
            shape = verification(probe, rows.lengths)
            if time.step_ms(shape) <= budget_ms:
                lengths = probe
        self._quiet_steps = 0 if lengths.any() else self._quiet_steps + 1
        return lengths

    def _fitting(self, survival: Floats, rows: Rows, time: StepTime, budget_ms: float) -> Ints:
        first = max(_FIRST_TOKENS, len(rows.rows) // _FIRST_REQUESTS)
        most = max(first, _GROWTH * time.most_prefill_tokens)
        return draft_lengths(survival, rows.lengths, time, budget_ms=budget_ms, most_tokens=most)

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

"""A drafting model beside drafters from texts: how far it drafts, for what that adds to theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from xllm_plugins.compat.spec_beside import NO_PASS
from xllm_plugins.latency import StepShape, StepTime
from xllm_spec_decode.acceptance import Best, Floats
from xllm_spec_decode.drafters import AGREED, ALONE, DISPUTED, Drafts, Ints, Tokens
from xllm_spec_decode.length import speed, verification
from xllm_spec_decode.width import WORTH, Turns, passes, shape

_GIVE_UP = 64  # steps in a row that would have been faster without the model,
_REST = 4096  # and then so many in which it computes nothing


class ModelBeside:
    """Chooses the model's length when texts have drafted, and takes part in the step's time.

    Texts draft first, since that costs nothing. The model drafts the same number of tokens for all
    requests, and each of them then has the draft that is expected to bring more. That number is the
    one with which requests get on fastest, by :func:`xllm_spec_decode.length.speed` and the step
    time of :class:`xllm_spec_decode.width.BatchWidth`; so it is 0 where texts do as well.

    With 0 the model still computes a pass, for the KV of what was said. Where steps would be faster
    without even that, 64 times in a row, it rests. Requests that were there meanwhile have gaps in
    its KV, and so have those that later find such KV cached, which would make its drafts worse and
    change no answer; it goes on with others that come after.

    Args:
        slots: requests at a time.
        most: tokens that are drafted at most.

    Attributes:
        width: the tokens that the model drafts after this step; ``NO_PASS`` while it rests.
    """

    def __init__(self, slots: int, most: int) -> None:
        self._turns = Turns(most)
        self._behind = np.zeros(slots, np.bool_)
        self._rested = False  # ever
        self._worse = 0  # steps in a row
        self._rest = 0  # steps that are left of it
        self.width = 0

    def admit(self, slot: int, cached_tokens: int) -> None:
        """The slot is another request's; KV that it finds computed may be of a time of rest."""
        self._behind[slot] = self._rested and cached_tokens > 0

    def step(self, drafted: Ints, contexts: Ints) -> StepShape:
        """A step that verified so many tokens of each request, after the model's passes."""
        done = verification(drafted, contexts)
        return shape(done.decodes, done.prefill_tokens, self.width, done.decode_context)

    def time(self, learned: StepTime, requests: int, width: int) -> StepTime:
        """Step times for :func:`xllm_spec_decode.length.draft_lengths` once that is drafted."""
        drafting_ms = (learned.square + learned.cross * requests) * passes(width)
        return dataclasses.replace(learned, base=learned.base + drafting_ms, square=0.0, cross=0.0)

    def begin(self, slots: Ints) -> bool:
        """A step of these requests has been computed; whether the model is not to rest after it."""
        self._rest = max(0, self._rest - 1)
        if self._rest:
            self._behind[slots] = True
        resting = bool(self._behind[slots].all())
        self.width = NO_PASS if resting else 0
        return not resting

    def choose(
        self,
        slots: Ints,
        texts: Floats,
        likely: Floats,
        contexts: Ints,
        learned: StepTime,
        budget_ms: float,
        fitting: Callable[[Floats, StepTime], Ints],
    ) -> None:
        """Set :attr:`width` for a step in which requests have said something.

        Args:
            slots: of those requests, ``[n]``.
            texts: the survival of drafts from texts, ``[n, most]``.
            likely: that of the model's, as far as can be said before, ``[n, most]``.
            contexts: tokens of each request's text, ``[n]``.
            learned: step times by :meth:`step`.
            budget_ms: that the step may take.
            fitting: the lengths of drafts with such survival and step times, ``[n]``.
        """
        if not learned.ready or not self._turns.warm:
            self.width = self._turns.next()
            return
        n, most = texts.shape
        likely = np.where(self._behind[slots, None], 0.0, likely)
        expected, places = texts.sum(1), np.arange(most)

        def fastest(width: int) -> float:
            model = np.where(places < width, likely, 0.0)
            best = np.where((model.sum(1) > expected)[:, None], model, texts)
            time = self.time(learned, n, width)
            lengths = fitting(best, time)
            step_ms = time.step_ms(verification(lengths, contexts))
            allowed = step_ms <= budget_ms or width <= 0
            return speed(best, lengths, step_ms) if allowed else 0.0

        speeds = np.array([fastest(width) for width in range(most + 1)])
        choice = int(speeds.argmax())
        self.width = choice if speeds[choice] > WORTH * speeds[0] else 0
        if self._turns.due():
            probe = self._turns.next()
            self.width = probe if speeds[probe] else 0
        self._worse = self._worse + 1 if fastest(NO_PASS) > WORTH * speeds[choice] else 0
        if self._worse >= _GIVE_UP:
            self._worse, self._rest, self.width = 0, _REST, NO_PASS
            self._rested = True
            self._behind[slots] = True

    def compare(self, slots: Ints, modelled: Tokens, texts: Best, drafts: Drafts) -> None:
        """Make drafts of the model's tokens; one from texts that says the same is a vote for them.

        Args:
            slots: of the requests, ``[n]``.
            modelled: ``[n, width]``.
            texts: for each request the best draft from texts.
            drafts: is filled; there are none for requests whose KV the model lacks.
        """
        width = modelled.shape[1]
        drafts.tokens[:, :width], drafts.matches[:] = modelled, 0
        drafts.lengths[:] = np.where(self._behind[slots], 0, width)
        there = texts.survival[:, :width] > 0.0
        together = np.logical_and.accumulate(there & (texts.tokens[:, :width] == modelled), axis=1)
        before = np.ones_like(together)
        before[:, 1:] = together[:, :-1]
        votes = drafts.votes[:, :width]
        votes[:] = ALONE
        votes[together] = AGREED
        votes[before & there & ~together] = DISPUTED

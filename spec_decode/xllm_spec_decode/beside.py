"""A drafting model beside drafters from texts: how far it drafts, for what that adds to theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from xllm_plugins.latency import StepShape, StepTime
from xllm_spec_decode.acceptance import Best, Floats
from xllm_spec_decode.drafters import AGREED, ALONE, DISPUTED, Drafts, Ints, Tokens
from xllm_spec_decode.length import speed, verification
from xllm_spec_decode.width import WORTH, Turns, shape


class ModelBeside:
    """Chooses the model's length when texts have drafted, and takes part in the step's time.

    Texts draft first, since that costs nothing. The model drafts the same number of tokens for all
    requests, and each of them then has the draft that is expected to bring more. That number is the
    one with which requests get on fastest, by :func:`xllm_spec_decode.length.speed` and the step
    time of :class:`xllm_spec_decode.width.BatchWidth`; so it is 0 where texts do as well.

    Args:
        most: tokens that are drafted at most.

    Attributes:
        passes: that the model made at the end of the last step.
    """

    def __init__(self, most: int) -> None:
        self._turns = Turns(most)
        self.passes = 0

    def step(self, drafted: Ints, contexts: Ints) -> StepShape:
        """A step that verified so many tokens of each request, after the model's passes."""
        done = verification(drafted, contexts)
        return shape(done.decodes, done.prefill_tokens, self.passes, done.decode_context)

    def time(self, learned: StepTime, requests: int, passes: int | None = None) -> StepTime:
        """Step times for :func:`xllm_spec_decode.length.draft_lengths`, these passes being made."""
        width = self.passes if passes is None else passes
        drafting_ms = learned.square * width + learned.cross * width * requests
        base_ms = learned.base + drafting_ms
        return dataclasses.replace(learned, base=base_ms, square=0.0, cross=0.0)

    def choose(
        self,
        texts: Floats,
        likely: Floats,
        contexts: Ints,
        learned: StepTime,
        budget_ms: float,
        fitting: Callable[[Floats, StepTime], Ints],
    ) -> None:
        """Set :attr:`passes` for a step.

        Args:
            texts: the survival of drafts from texts, ``[n, most]``.
            likely: that of the model's, as far as can be said before, ``[n, most]``.
            contexts: tokens of each request's text, ``[n]``.
            learned: step times by :meth:`step`.
            budget_ms: that the step may take.
            fitting: the lengths of drafts with such survival and step times, ``[n]``.
        """
        if not learned.ready or not self._turns.warm:
            self.passes = self._turns.next()
            return
        n, most = texts.shape
        expected, places = texts.sum(1), np.arange(most)
        speeds = np.zeros(most + 1)
        for width in range(most + 1):
            model = np.where(places < width, likely, 0.0)
            best = np.where((model.sum(1) > expected)[:, None], model, texts)
            time = self.time(learned, n, width)
            lengths = fitting(best, time)
            step_ms = time.step_ms(verification(lengths, contexts))
            if step_ms <= budget_ms or not width:
                speeds[width] = speed(best, lengths, step_ms)
        if self._turns.due():
            probe = self._turns.next()
            self.passes = probe if speeds[probe] else 0
            return
        choice = int(speeds.argmax())
        self.passes = choice if speeds[choice] > WORTH * speeds[0] else 0


def compare(modelled: Tokens, texts: Best, drafts: Drafts) -> None:
    """Make drafts of a model's tokens; a draft from texts that says the same is a vote for one.

    Args:
        modelled: ``[n, width]``.
        texts: for each request the best draft from texts.
        drafts: is filled.
    """
    width = modelled.shape[1]
    drafts.tokens[:, :width], drafts.lengths[:], drafts.matches[:] = modelled, width, 0
    there = texts.survival[:, :width] > 0.0
    together = np.logical_and.accumulate(there & (texts.tokens[:, :width] == modelled), axis=1)
    before = np.ones_like(together)
    before[:, 1:] = together[:, :-1]
    votes = drafts.votes[:, :width]
    votes[:] = ALONE
    votes[together] = AGREED
    votes[before & there & ~together] = DISPUTED

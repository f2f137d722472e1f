"""How likely each drafter's next tokens are what the model says, learned from every draft made.

A drafter's draft is held against what the model said next whether it was used or not, over as many
steps as that takes. So all drafters are observed all the time, and finding out which one is good,
or whether drafting has become worth it again, costs no step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xllm_spec_decode.compiled import Parts, compiled
from xllm_spec_decode.drafters import (
    AGREED,
    DISPUTED,
    LONGEST_MATCH,
    Drafts,
    Ints,
    Rows,
    Tokens,
)
from xllm_spec_decode.width import PRIOR_CHANCE, chances

Floats = NDArray[np.float64]
# The prior chance of a token by how many agreed before it: 2, 3, 4 and 5, to 8, to 16, more.
_BOUNDS = (3, 4, 6, 9, 17)
_PRIOR = (0.3, 0.4, 0.5, 0.65, 0.75, 0.85)
_PRIOR_TRIES = 8.0
_VOTES = 3
_AGREED = 0.5  # of what is missing to certainty, which an agreed token has as well
_DISPUTED = 0.5  # of its chance, which a disputed token keeps
_LATER_BONUS = 0.15  # by which a token's chance rises once the one before was right
_MEMORY = 0.998  # weight of a try after one more
_OWN_MEMORY = 0.96  # the same of one request,
_OWN_PRIOR = 4.0  # and the tokens that its own record starts with
_MOST_CHANCE = 0.99


class _Estimates(NamedTuple):
    """What is known; ``d`` drafters, ``m`` matches and votes, ``k`` positions, ``s`` slots.

    Attributes:
        group: ``[LONGEST_MATCH + 1]``, the ``m`` of each length of match; more by a token's vote.
        hits, tries: ``[d, m, k]``, decayed: tokens that were right, once those before them were.
        own_hits, own_expected: ``[s, d, 2]``, a request's right tokens, and what was expected of
            them; first tokens of drafts and later ones apart, for later ones are those of drafts
            that began well.
        tokens: ``[s, d, k]``, the draft that is being held against the text.
        begin: ``[s, d]``, the length of the text that it follows.
        length: ``[s, d]``, its tokens, 0 for none.
        match: ``[s, d, k]``, the ``m`` of each.
        done: ``[s, d]``, tokens of it that were right so far.
    """

    group: Ints
    hits: Floats
    tries: Floats
    own_hits: Floats
    own_expected: Floats
    tokens: Tokens
    begin: Ints
    length: Ints
    match: Ints
    done: Ints


class Best(NamedTuple):
    """The draft chosen for each row.

    Attributes:
        survival: ``[n, most]``, the chance that a token and all before it are right; 0 for none.
        tokens: ``[n, most]``.
        drafter: ``[n]``, whose it is.
    """

    survival: Floats
    tokens: Tokens
    drafter: Ints

    @classmethod
    def empty(cls, n: int, most: int) -> Best:
        """Room for so many drafts."""
        return cls(np.zeros((n, most)), np.zeros((n, most), np.int32), np.zeros(n, np.int64))

    def head(self, n: int) -> Best:
        """The first ones."""
        return Best(self.survival[:n], self.tokens[:n], self.drafter[:n])


class Acceptance:
    """Estimates the chance of every token of a draft.

    By drafter, length of match, vote of other places and position: the decayed share of right
    tokens with a prior, all requests together. Times what the request's own record is to what was
    expected of it.

    Args:
        drafters: their number.
        slots: requests at a time.
        most: tokens of a draft.
        model: whether the last drafter is a model, whose drafts match nothing.
    """

    def __init__(self, drafters: int, slots: int, most: int, model: bool = False) -> None:
        prior = np.repeat(_prior()[None, :, None], most, axis=2).repeat(drafters, axis=0)
        prior[:, :, 1:] = np.minimum(prior[:, :, 1:] + _LATER_BONUS, 0.9)
        tries = np.full_like(prior, _PRIOR_TRIES)
        if model:
            prior[-1], tries[-1] = PRIOR_CHANCE, 1.0
        pairs = (slots, drafters)
        group = np.searchsorted(_BOUNDS, np.arange(LONGEST_MATCH + 1), "right")
        self._chances = np.zeros(most)
        self._estimates = _Estimates(
            group=group.astype(np.int64) * _VOTES,
            hits=prior * tries,
            tries=tries,
            own_hits=np.full((*pairs, 2), _OWN_PRIOR),
            own_expected=np.full((*pairs, 2), _OWN_PRIOR),
            tokens=np.zeros((*pairs, most), np.int32),
            begin=np.zeros(pairs, np.int64),
            length=np.zeros(pairs, np.int64),
            match=np.zeros((*pairs, most), np.int64),
            done=np.zeros(pairs, np.int64),
        )

    def forget(self, slot: int) -> None:
        """The slot is another request's from now on."""
        self._estimates.length[slot] = 0
        self._estimates.own_hits[slot] = self._estimates.own_expected[slot] = _OWN_PRIOR

    def observe(self, rows: Rows) -> None:
        """Hold the drafts that were made against what has been said since."""
        _observe(tuple(rows), tuple(self._estimates))

    def judge(self, drafter: int, rows: Rows, drafts: Drafts, best: Best) -> None:
        """Take a drafter's drafts as the best where most of their tokens are expected to be right.

        All are remembered, to be held against what will be said.

        Args:
            drafter: its number.
            rows: the requests.
            drafts: its own.
            best: of the drafters before it; is changed.
        """
        learned = tuple(self._estimates)
        _judge(drafter, tuple(rows), tuple(drafts), learned, tuple(best), self._chances)

    def likely(self, slots: Ints) -> Floats:
        """What :attr:`Best.survival` of the model's drafts will be, ``[n, most]``, unseen."""
        group = slice(self._estimates.group[0], self._estimates.group[0] + _VOTES)
        hits, tries = (
            part[-1, group].sum(0) for part in (self._estimates.hits, self._estimates.tries)
        )
        own = self._estimates.own_hits[slots, -1] / self._estimates.own_expected[slots, -1]
        found = chances(hits, tries)[None] * own[:, np.minimum(np.arange(len(hits)), 1)]
        return np.cumprod(np.minimum(found, _MOST_CHANCE), axis=1)

    def first_token(self) -> list[float]:
        """The chance of a first drafted token, by drafter, over all lengths of match."""
        hits, tries = self._estimates.hits[:, :, 0].sum(1), self._estimates.tries[:, :, 0].sum(1)
        return [float(chance) for chance in hits / tries]


def _prior() -> Floats:
    """By length of match and vote."""
    prior = np.repeat(np.array(_PRIOR)[:, None], _VOTES, axis=1)
    prior[:, AGREED] += _AGREED * (1.0 - prior[:, AGREED])
    prior[:, DISPUTED] *= _DISPUTED
    return prior.reshape(-1)


@compiled
def _observe(step: Parts, learned: Parts) -> None:
    rows, known = Rows(*step), _Estimates(*learned)
    for i in range(len(rows.rows)):
        text, slot = rows.tokens[rows.rows[i]], rows.slots[i]
        for d in range(known.length.shape[1]):
            while known.done[slot, d] < known.length[slot, d]:
                k = known.done[slot, d]
                place = known.begin[slot, d] + k
                if place >= rows.lengths[i]:
                    break
                m = known.match[slot, d, k]
                right = 1.0 if known.tokens[slot, d, k] == text[place] else 0.0
                chance = known.hits[d, m, k] / known.tries[d, m, k]
                own = (slot, d, min(k, 1))
                known.own_hits[own] = known.own_hits[own] * _OWN_MEMORY + right
                known.own_expected[own] = known.own_expected[own] * _OWN_MEMORY + chance
                known.hits[d, m, k] = known.hits[d, m, k] * _MEMORY + right
                known.tries[d, m, k] = known.tries[d, m, k] * _MEMORY + 1.0
                if right == 0.0:
                    known.length[slot, d] = 0
                    break
                known.done[slot, d] = k + 1


@compiled
def _judge(
    d: int, step: Parts, drafted: Parts, learned: Parts, chosen: Parts, chances: Floats
) -> None:
    rows, drafts = Rows(*step), Drafts(*drafted)
    known, best = _Estimates(*learned), Best(*chosen)
    # Loops in place of slices: they take numba a tenth of the time to compile.
    most = drafts.tokens.shape[1]
    for i in range(len(rows.rows)):
        length, slot = drafts.lengths[i], rows.slots[i]
        if length == 0:
            continue
        group = known.group[drafts.matches[i]]
        own = known.own_hits[slot, d, 0] / known.own_expected[slot, d, 0]
        own_later = known.own_hits[slot, d, 1] / known.own_expected[slot, d, 1]
        chance, expected, expected_best = 1.0, 0.0, 0.0
        for k in range(most):
            expected_best += best.survival[i, k]
            if k < length:
                m = group + drafts.votes[i, k]
                chance *= min(_MOST_CHANCE, own * known.hits[d, m, k] / known.tries[d, m, k])
                own = own_later
                expected += chance
                chances[k] = chance
            else:
                chances[k] = 0.0
        if expected > expected_best:
            best.drafter[i] = d
            for k in range(most):
                best.survival[i, k] = chances[k]
                best.tokens[i, k] = drafts.tokens[i, k]
        if known.done[slot, d] >= known.length[slot, d]:
            known.begin[slot, d] = rows.lengths[i]
            known.length[slot, d] = length
            known.done[slot, d] = 0
            for k in range(length):
                known.tokens[slot, d, k] = drafts.tokens[i, k]
                known.match[slot, d, k] = group + drafts.votes[i, k]

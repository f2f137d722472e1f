"""What every drafter offers, and prompt lookup: what followed in the same text the last time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xllm_spec_decode.compiled import Parts, compiled

Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]
LONGEST_MATCH = 32  # tokens of the text's end that are compared
_CANDIDATES = 16  # places that are looked at for one draft
_GRAM = 2  # tokens that a place has to share with the text's end to be found
# What a drafted token is by the other places that went on alike until there:
ALONE, AGREED, DISPUTED = 0, 1, 2


class Rows(NamedTuple):
    """The requests of a step; every array but ``tokens`` is ``[n]``, one entry for each.

    Attributes:
        tokens: ``[any, longest text]``, prompt and output, among them the requests' rows.
        rows: where a request's text stands in ``tokens``.
        slots: the number that it has with us for as long as it lives.
        known: tokens of its text that drafters have learned before.
        lengths: tokens of its text.
        prompts: of them the prompt's.
        tenants: who may see what it says; a number for each cache salt and adapter.
    """

    tokens: Tokens
    rows: Ints
    slots: Ints
    known: Ints
    lengths: Ints
    prompts: Ints
    tenants: Ints


class Drafts(NamedTuple):
    """What one drafter proposes; drafters fill it.

    Attributes:
        tokens: ``[n, most]``.
        lengths: ``[n]``, tokens of each draft, 0 for none.
        matches: ``[n]``, how many tokens of the text's end were found again.
        votes: ``[n, most]``, for each token ``ALONE``, ``AGREED`` or ``DISPUTED``.
    """

    tokens: Tokens
    lengths: Ints
    matches: Ints
    votes: Ints

    @classmethod
    def empty(cls, n: int, most: int) -> Drafts:
        """Room for so many drafts."""
        tokens, votes = np.zeros((n, most), np.int32), np.zeros((n, most), np.int64)
        return cls(tokens, np.zeros(n, np.int64), np.zeros(n, np.int64), votes)

    def head(self, n: int) -> Drafts:
        """The first ones."""
        return Drafts(self.tokens[:n], self.lengths[:n], self.matches[:n], self.votes[:n])


@compiled
def vote(agreeing: int, asked: int) -> int:
    """What a drafted token is if so many of the places asked, its own among them, agree."""
    if asked < 2:
        return ALONE
    return AGREED if agreeing == asked else DISPUTED


class Drafter(ABC):
    """Proposes how texts go on. It sees every new token once, and keeps what it likes, bounded."""

    @abstractmethod
    def learn(self, rows: Rows) -> None:
        """Take in the tokens from ``known`` to ``lengths``."""

    @abstractmethod
    def forget(self, slot: int) -> None:
        """The slot is another request's from now on."""

    @abstractmethod
    def draft(self, rows: Rows, drafts: Drafts) -> None:
        """Propose for each row at most as many tokens as ``drafts`` is wide."""


class PromptLookup(Drafter):
    """The place in the same text, among the newest 16, that agrees with its end for longest.

    A text that repeats itself is continued into its own draft. The idea is prompt lookup decoding
    (Saxena 2023); an index of pairs of tokens in place of a search makes it independent of length.

    Args:
        slots: requests at a time.
        window: tokens of each text that are remembered; a power of two.
    """

    def __init__(self, slots: int, window: int) -> None:
        self._newest = np.full((slots, window), -1, np.int32)  # by hash
        self._older = np.full((slots, window), -1, np.int32)  # by place

    def learn(self, rows: Rows) -> None:  # noqa: D102
        _index(tuple(rows), self._newest, self._older)

    def forget(self, slot: int) -> None:  # noqa: D102
        self._newest[slot] = -1

    def draft(self, rows: Rows, drafts: Drafts) -> None:  # noqa: D102
        _look_up(tuple(rows), self._newest, self._older, tuple(drafts))


@compiled
def _hash(text: Tokens, end: int, buckets: int) -> Any:
    mixed = np.int64(text[end - 1]) * 0x9E3779B1 + np.int64(text[end]) * 0x85EBCA77
    return (mixed ^ (mixed >> 29)) & (buckets - 1)


@compiled
def _index(step: Parts, newest: Tokens, older: Tokens) -> None:
    rows = Rows(*step)
    window = older.shape[1]
    for i in range(len(rows.rows)):
        text, slot = rows.tokens[rows.rows[i]], rows.slots[i]
        start = max(rows.known[i], rows.lengths[i] - window, 1)
        for place in range(start, rows.lengths[i]):
            pair = _hash(text, place, window)
            older[slot, place & (window - 1)] = newest[slot, pair]
            newest[slot, pair] = place


@compiled
def _look_up(step: Parts, newest: Tokens, older: Tokens, room: Parts) -> None:
    rows, drafts = Rows(*step), Drafts(*room)
    window, most = older.shape[1], drafts.tokens.shape[1]
    places = np.zeros(_CANDIDATES, np.int64)
    for i in range(len(rows.rows)):
        text, slot, end = rows.tokens[rows.rows[i]], rows.slots[i], rows.lengths[i] - 1
        drafts.lengths[i] = 0
        if end < _GRAM:
            continue
        place, best, best_match, found = end, -1, _GRAM - 1, 0
        for _ in range(_CANDIDATES):
            before = older[slot, place & (window - 1)]
            # A cell that a later place has taken over leads nowhere.
            if before < 1 or before >= place or before <= end - window:
                break
            place = before
            places[found] = place
            found += 1
            longest, match = min(LONGEST_MATCH, place + 1), 0
            # A longer match agrees there too.
            if best_match < longest and text[place - best_match] == text[end - best_match]:
                while match < longest and text[place - match] == text[end - match]:
                    match += 1
            if match > best_match:
                best, best_match = place, match
        if best < 0:
            continue
        for k in range(most):
            source = best + 1 + k
            token = text[source] if source <= end else drafts.tokens[i, source - end - 1]
            drafts.tokens[i, k] = token
            asked, agreeing = 0, 0
            for j in range(found):
                follows = places[j] + 1 + k
                if follows <= end:
                    asked += 1
                    if text[follows] == token:
                        places[agreeing] = places[j]
                        agreeing += 1
            drafts.votes[i, k] = vote(agreeing, asked)
            found = agreeing
        drafts.lengths[i] = most
        drafts.matches[i] = best_match

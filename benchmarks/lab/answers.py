"""Answers of two servers to the same requests, compared token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        name: what identifies it in the vocabulary.
        logprob: its log-probability.
        likeliest: the log-probabilities of the likeliest tokens at its place, by name.
    """

    name: str
    logprob: float
    likeliest: dict[str, float]

    def margin_over(self, other: str) -> float:
        """By how much it was likelier than another; infinite if that is not among the likeliest."""
        return self.logprob - self.likeliest.get(other, -math.inf)


@dataclass(frozen=True)
class Answer:
    """One request's whole answer."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Difference:
    """Where two answers to one request part.

    Attributes:
        request: its number.
        position: of the first token that differs, from 0.
        ours: that token; None if the answer has ended there.
        theirs: the other answer's.
        margin: the greater of the two log-probability margins by which each side chose its own over
            the other's. Rounding can turn a choice only where it is small.
    """

    request: int
    position: int
    ours: str | None
    theirs: str | None
    margin: float


@dataclass(frozen=True)
class Agreement:
    """How far two servers agree.

    Attributes:
        identical: how many answers are the same.
        tokens: how many tokens are the same, up to the first difference of each answer.
        drift: the largest difference in the log-probability of one such token.
        differences: the others.
    """

    identical: int
    tokens: int
    drift: float
    differences: tuple[Difference, ...]

    @property
    def largest_margin(self) -> float:
        """Of all differences; 0 without any."""
        return max((one.margin for one in self.differences), default=0.0)


def first_difference(request: int, ours: Answer, theirs: Answer) -> Difference | None:
    """Where two answers part; None if they are the same."""
    for position, (mine, other) in enumerate(zip_longest(ours.tokens, theirs.tokens)):
        if mine is None or other is None:
            # One goes on where the other has ended: there is no choice to weigh.
            ours_name, theirs_name = (one.name if one else None for one in (mine, other))
            return Difference(request, position, ours_name, theirs_name, math.inf)
        if mine.name != other.name:
            margin = max(mine.margin_over(other.name), other.margin_over(mine.name))
            return Difference(request, position, mine.name, other.name, margin)
    if ours.text != theirs.text:
        return Difference(request, len(ours.tokens), None, None, math.inf)
    return None


def compare(ours: Sequence[Answer], theirs: Sequence[Answer]) -> Agreement:
    """Compare answers to the same requests, in the same order."""
    differences = []
    tokens = 0
    drift = 0.0
    for request, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        difference = first_difference(request, mine, other)
        same = len(mine.tokens)
        if difference is not None:
            differences.append(difference)
            same = difference.position
        tokens += same
        for one, two in zip(mine.tokens[:same], other.tokens[:same], strict=True):
            drift = max(drift, abs(one.logprob - two.logprob))
    return Agreement(len(ours) - len(differences), tokens, drift, tuple(differences))

"""Answers are compared token by token, and a difference is weighed by its margin."""

import math

import pytest

from benchmarks.lab.answers import Answer, Token, compare, first_difference


def answer(*tokens: Token) -> Answer:
    return Answer("".join(token.name for token in tokens), tokens)


def token(name: str, logprob: float = -0.1, **others: float) -> Token:
    return Token(name, logprob, {name: logprob, **others})


def test_the_same_tokens_are_the_same_answer_however_their_logprobs_drift() -> None:
    ours, theirs = answer(token("a", -0.5), token("b")), answer(token("a", -0.25), token("b"))
    agreement = compare([ours], [theirs])
    assert (agreement.identical, agreement.tokens, agreement.differences) == (1, 2, ())
    assert agreement.drift == pytest.approx(0.25)
    assert agreement.largest_margin == 0.0


def test_the_margin_is_the_greater_of_both_sides() -> None:
    ours = answer(token("x"), token("a", -0.70, b=-0.71))
    theirs = answer(token("x"), token("b", -0.68, a=-0.72))
    difference = first_difference(3, ours, theirs)
    assert difference is not None
    assert (difference.request, difference.position) == (3, 1)
    assert (difference.ours, difference.theirs) == ("a", "b")
    assert difference.margin == pytest.approx(0.04)


def test_only_the_first_difference_counts() -> None:
    ours = answer(token("a", -0.7, b=-0.7), token("c", -0.1, d=-9.0))
    theirs = answer(token("b", -0.7, a=-0.7), token("d", -0.1, c=-9.0))
    agreement = compare([ours], [theirs])
    assert [one.position for one in agreement.differences] == [0]
    assert (agreement.identical, agreement.tokens) == (0, 0)
    assert agreement.largest_margin == 0.0


def test_a_token_that_was_not_among_the_likeliest_is_no_tie() -> None:
    difference = first_difference(0, answer(token("a", b=-0.2)), answer(token("b")))
    assert difference is not None
    assert difference.margin == math.inf


def test_an_answer_that_ends_early_is_no_tie() -> None:
    difference = first_difference(0, answer(token("a")), answer(token("a"), token("b")))
    assert difference is not None
    assert (difference.position, difference.ours, difference.theirs) == (1, None, "b")
    assert difference.margin == math.inf


def test_the_same_tokens_with_another_text_are_no_tie() -> None:
    tokens = (token("a"),)
    assert first_difference(0, Answer("a", tokens), Answer("A", tokens)) is not None


def test_servers_that_answered_unequally_many_requests_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([answer(token("a"))], [])

"""Chances are learned from all drafts, used or not, by drafter, match, position and request."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.xllm_spec_decode.texts import rows_of
from xllm_spec_decode.acceptance import Acceptance, Best
from xllm_spec_decode.drafters import AGREED, DISPUTED, Drafts

MOST = 4


def drafts(tokens: list[int], match: int = 4) -> Drafts:
    made = Drafts.empty(1, MOST)
    made.tokens[0, : len(tokens)] = tokens
    made.lengths[0], made.matches[0] = len(tokens), match
    return made


def judge(
    acceptance: Acceptance, text: list[int], made: list[Drafts], best: Best, slot: int = 0
) -> None:
    """Fill ``best`` from one draft of each drafter."""
    best.survival[:] = 0.0
    for number, one in enumerate(made):
        acceptance.judge(number, rows_of([text], slots=[slot]), one, best)


def course(
    acceptance: Acceptance, rights: list[float], rounds: int, seed: int = 0, slot: int = 0
) -> Best:
    """A text that is drafted for in every round; drafter ``d``'s tokens are right so often."""
    rng = random.Random(seed)
    text, best = [0] * 4, Best.empty(1, MOST)
    for _ in range(rounds):
        following = [rng.randrange(1, 100) for _ in range(MOST)]
        made = [drafts([t if rng.random() < right else -1 for t in following]) for right in rights]
        judge(acceptance, text, made, best, slot)
        text = text + following
        acceptance.observe(rows_of([text], slots=[slot]))
    return best


@pytest.mark.parametrize("right", [0.1, 0.5, 0.9])
def test_chances_become_what_is_seen(right: float) -> None:
    acceptance = Acceptance(1, 1, MOST)
    found = course(acceptance, [right], 600).survival[0]
    again = np.mean([course(acceptance, [right], 40, seed).survival[0] for seed in range(20)], 0)
    assert again == pytest.approx(right ** np.arange(1, MOST + 1), abs=0.1)
    assert (np.diff(found) <= 0).all()


def test_tokens_that_other_places_dispute_are_judged_apart() -> None:
    acceptance, best, text = Acceptance(1, 1, MOST), Best.empty(1, MOST), [0] * 4
    rng = random.Random(0)
    for number in range(200):
        made = drafts([rng.randrange(1, 100)])
        made.votes[0, 0] = DISPUTED if number % 2 else AGREED
        judge(acceptance, text, [made], best)
        text = [*text, -1 if number % 2 else int(made.tokens[0, 0])]
        acceptance.observe(rows_of([text]))
    chance = {}
    for vote in (AGREED, DISPUTED):
        made = drafts([5])
        made.votes[0, 0] = vote
        judge(acceptance, text, [made], best)
        chance[vote] = best.survival[0, 0]
    assert chance[AGREED] > 0.7
    assert chance[DISPUTED] < 0.2


def test_the_better_drafter_is_chosen_and_the_other_still_observed() -> None:
    acceptance = Acceptance(2, 1, MOST)
    assert course(acceptance, [0.2, 0.8], 60).drafter[0] == 1
    # Things turn; the one that was not used has been held against the text all the time.
    assert course(acceptance, [0.9, 0.1], 60, seed=1).drafter[0] == 0


def test_a_request_is_judged_by_its_own_record() -> None:
    acceptance = Acceptance(1, 2, MOST)
    for seed in range(30):
        course(acceptance, [0.9], 10, seed, slot=0)
        course(acceptance, [0.1], 10, seed, slot=1)
    good = course(acceptance, [0.9], 20, slot=0).survival[0, 0]
    bad = course(acceptance, [0.1], 20, slot=1).survival[0, 0]
    assert good > 0.7
    assert bad < 0.4
    acceptance.forget(1)
    assert bad < course(acceptance, [0.5], 1, slot=1).survival[0, 0] < good


def test_a_draft_is_held_against_what_comes_one_token_at_a_time() -> None:
    one, whole = Acceptance(1, 1, MOST), Acceptance(1, 1, MOST)
    following, best = [5, 6, 7, 8], Best.empty(1, MOST)
    for acceptance in (one, whole):
        judge(acceptance, [1, 2, 3], [drafts(following)], best)
    for k in range(1, 5):
        one.observe(rows_of([[1, 2, 3, *following[:k]]]))
        judge(one, [1, 2, 3, *following[:k]], [drafts([])], best)
    whole.observe(rows_of([[1, 2, 3, *following]]))
    assert one.first_token() == whole.first_token()
    for name in ("hits", "tries"):
        first, second = (getattr(a._estimates, name) for a in (one, whole))
        assert first == pytest.approx(second)


@given(st.lists(st.booleans(), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_chances_stay_chances(rights: list[bool]) -> None:
    acceptance, text, best = Acceptance(1, 1, MOST), [0] * 4, Best.empty(1, MOST)
    for right in rights:
        judge(acceptance, text, [drafts([1 if right else 2] * MOST)], best)
        survival = best.survival[0]
        assert ((survival >= 0) & (survival < 1)).all()
        assert (np.diff(survival) <= 0).all()
        text = [*text, 1]
        acceptance.observe(rows_of([text]))

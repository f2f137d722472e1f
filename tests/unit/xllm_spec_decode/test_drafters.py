"""Drafts are what followed where a text's end stood before, in itself or its tenant's outputs."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.xllm_spec_decode.texts import drafts_of, rows_of
from xllm_spec_decode.compiled import compiled
from xllm_spec_decode.drafters import (
    AGREED,
    ALONE,
    DISPUTED,
    LONGEST_MATCH,
    Drafts,
    PromptLookup,
)
from xllm_spec_decode.recent import TOKEN_BYTES, RecentOutputs

SMALL = TOKEN_BYTES << 12  # the least that an index holds: 4,096 tokens


def lookup(text: Sequence[int], most: int = 8, window: int = 64) -> list[int]:
    drafter, rows = PromptLookup(1, window), rows_of([text])
    drafter.learn(rows)
    return drafts_of(drafter, rows, most)[0]


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        pytest.param([1, 2, 3, 4, 5, 9, 1, 2], [3, 4, 5, 9], id="what followed"),
        pytest.param([1, 2, 3, 7, 1, 2, 4, 8, 1, 2], [4, 8, 1, 2], id="the newest of equal ones"),
        pytest.param([6, 1, 2, 3, 7, 5, 1, 2, 4, 6, 1, 2], [3, 7, 5, 1], id="the longest match"),
        pytest.param([1, 2, 3, 4, 5], [], id="nothing that was there before"),
        pytest.param([9, 1, 8, 1], [], id="one token is no match"),
        pytest.param([5, 5, 5], [5, 5, 5, 5], id="a repetition goes on"),
        pytest.param([1, 2, 3, 1, 2, 3], [1, 2, 3, 1], id="so does a longer one"),
        pytest.param([3], [], id="a text of one token"),
    ],
)
def test_prompt_lookup_drafts(text: Sequence[int], draft: Sequence[int]) -> None:
    assert lookup(text, most=4) == draft


@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.data())
@settings(max_examples=200, deadline=None)
def test_prompt_lookup_finds_a_place_that_agrees_however_the_text_came(
    text: list[int], data: st.DataObject
) -> None:
    drafter, known = PromptLookup(1, 64), 0
    while known < len(text):
        to = data.draw(st.integers(known + 1, len(text)))
        drafter.learn(rows_of([text[:to]], known=[known]))
        known = to
    (draft,) = drafts_of(drafter, rows_of([text]))
    assert draft == lookup(text)
    ends = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 1] == text[-2:]]
    assert bool(draft) == any(i > len(text) - 1 - 64 for i in ends)
    if draft:
        endless = text + draft
        assert any(endless[i + 1 : i + 1 + len(draft)] == draft for i in ends)


@pytest.mark.parametrize(
    ("text", "votes"),
    [
        pytest.param([1, 2, 3, 4, 4, 4, 1, 2, 3], [ALONE] * 3, id="one place"),
        pytest.param(
            [1, 2, 3, 4, 7, 1, 2, 3, 4, 8, 1, 2, 3], [AGREED, DISPUTED, ALONE], id="two places"
        ),
        pytest.param(
            [1, 2, 3, 7, 7, 1, 2, 3, 8, 8, 1, 2, 3], [DISPUTED, ALONE, ALONE], id="at once"
        ),
    ],
)
def test_other_places_that_go_on_alike_have_a_vote(text: list[int], votes: list[int]) -> None:
    own, others = PromptLookup(1, 64), RecentOutputs(2, SMALL)
    own.learn(rows_of([text]))
    others.learn(rows_of([text[:-3]]))
    for drafter, rows in ((own, rows_of([text])), (others, rows_of([text[-3:]], slots=[1]))):
        drafts = Drafts.empty(1, 3)
        drafter.draft(rows, drafts)
        assert drafts.votes[0, : drafts.lengths[0]].tolist() == votes[: drafts.lengths[0]]
        assert drafts.lengths[0] >= 2


def test_a_slot_that_is_given_away_knows_nothing_of_its_last_request() -> None:
    drafter = PromptLookup(1, 64)
    drafter.learn(rows_of([[1, 2, 3, 4, 1, 2]]))
    drafter.forget(0)
    rows = rows_of([[9, 1, 2]])
    drafter.learn(rows)
    assert drafts_of(drafter, rows) == [[]]


def recent(said: Sequence[Sequence[int]], tenants: Sequence[int] | None = None) -> RecentOutputs:
    drafter = RecentOutputs(8, SMALL)
    drafter.learn(rows_of(said, tenants=tenants))
    return drafter


def test_recent_outputs_of_others_are_drafts() -> None:
    drafter = recent([[1, 2, 3, 4, 5, 6], [7, 7, 7, 8]])
    rows = rows_of([[0, 2, 3, 4], [0, 0, 0, 0]], slots=[2, 3])
    assert drafts_of(drafter, rows) == [[5, 6], []]


def test_the_longer_match_is_preferred_to_the_newer() -> None:
    drafter = recent([[8, 1, 2, 3, 4], [9, 1, 2, 3, 5]])
    rows = rows_of([[8, 1, 2, 3], [0, 1, 2, 3]], slots=[2, 3])
    assert drafts_of(drafter, rows) == [[4], [5]]


def test_prompts_are_not_shared() -> None:
    drafter = RecentOutputs(2, SMALL)
    drafter.learn(rows_of([[1, 2, 3, 4, 5, 6, 7, 8]], prompts=[4]))
    found = drafts_of(drafter, rows_of([[1, 2, 3], [5, 6, 7]], slots=[1, 1]))
    assert found == [[], [8]]


def test_another_tenants_outputs_are_never_drafts() -> None:
    drafter = recent([[1, 2, 3, 4, 5]], tenants=[7])
    found = drafts_of(drafter, rows_of([[1, 2, 3]] * 2, tenants=[7, 8], slots=[1, 2]))
    assert found == [[4, 5], []]


def test_tenants_whose_numbers_hash_alike_stay_apart() -> None:
    drafter = recent([[1, 2, 3, 4, 5]], tenants=[7])
    assert drafts_of(drafter, rows_of([[1, 2, 3]], tenants=[7 + (1 << 16)], slots=[1])) == [[]]


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_however_much_is_said_each_draft_is_what_its_tenant_said(
    seed: int, requests: int, letters: int
) -> None:
    """Thrice as much as fits, request by request replaced; memory and privacy hold throughout."""
    rng = random.Random(seed)
    drafter = RecentOutputs(requests, SMALL)
    texts: list[list[int]] = [[] for _ in range(requests)]
    said: dict[int, list[list[int]]] = {0: [], 1: []}
    for i, text in enumerate(texts):
        said[i % 2].append(text)
    total = 0
    while total < 3 * 4096:
        known = [len(text) for text in texts]
        for text in texts:
            text += [rng.randrange(letters) for _ in range(rng.randrange(1, 60))]
        tenants = [i % 2 for i in range(requests)]
        drafter.learn(rows_of(texts, known=known, tenants=tenants))
        total += sum(map(len, texts)) - sum(known)
        rows = rows_of(texts, tenants=tenants)
        for i, draft in enumerate(drafts_of(drafter, rows)):
            if draft:
                piece = bytes(texts[i][-3:] + draft)
                assert any(piece in bytes(text) for text in said[i % 2])
        assert drafter.held_tokens <= 4096
        if rng.random() < 0.2:
            slot = rng.randrange(requests)
            drafter.forget(slot)
            texts[slot] = []
            said[slot % 2].append(texts[slot])


def test_drafts_go_on_over_many_pages() -> None:
    text = list(range(300))
    drafter = recent([text])
    rows = rows_of([text[:LONGEST_MATCH]], slots=[1])
    assert drafts_of(drafter, rows, most=200) == [text[LONGEST_MATCH : LONGEST_MATCH + 200]]


def test_without_numba_the_loops_are_plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)

    def double(value: int) -> int:
        return 2 * value

    assert compiled(double) is double

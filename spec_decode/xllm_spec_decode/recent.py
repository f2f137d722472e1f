"""What followed in recent outputs: an index over the outputs of all requests of a tenant."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from xllm_spec_decode.compiled import Parts, compiled
from xllm_spec_decode.drafters import LONGEST_MATCH, Drafter, Drafts, Ints, Rows, Tokens, vote

TOKEN_BYTES = 4 + 8 + 8  # of a place and of the table, pages aside
_PAGE = 64  # tokens
_CANDIDATES = 4
_GRAM = 3


class _Ring(NamedTuple):
    """The newest output tokens of all requests, in pages of one text each.

    Pages are numbered as they come and no number is used twice; a page lies in the cell of its
    number modulo the cells, and one that a later page lies in is gone. A place is a page's number
    times 64 and the token within it.

    Attributes:
        made: ``[1]``, pages so far: the next page's number.
        tokens: ``[places]``.
        older: ``[places]``, the place before that ends with tokens of the same hash; -1 for none.
        newest: ``[buckets]``, the newest place by hash.
        tenants, fill: ``[pages]``, whose it is, and how many tokens it has.
        before, after: ``[pages]``, its neighbours in its text; -1 for none.
        last: ``[slots]``, the page that a request writes to.
    """

    made: Ints
    tokens: Tokens
    older: Ints
    newest: Ints
    tenants: Ints
    fill: Ints
    before: Ints
    after: Ints
    last: Ints


class RecentOutputs(Drafter):
    """The place in recent outputs, among the newest 4, that agrees with a text's end for longest.

    Suffix decoding (arXiv 2411.04975) keeps a tree of outputs; here it is a ring with chains of
    places that end alike, which needs no building and whose memory is fixed. What one tenant's
    requests said is found for that tenant's alone.

    Args:
        slots: requests at a time.
        memory_bytes: of the index, rounded down to a power of two tokens.
    """

    def __init__(self, slots: int, memory_bytes: int) -> None:
        places = 1 << max(12, (memory_bytes // TOKEN_BYTES).bit_length() - 1)

        def none(size: int) -> Ints:
            return np.full(size, -1, np.int64)

        pages = places // _PAGE
        self._ring = _Ring(
            made=np.zeros(1, np.int64),
            tokens=np.zeros(places, np.int32),
            older=none(places),
            newest=none(places),
            tenants=none(pages),
            fill=np.zeros(pages, np.int64),
            before=none(pages),
            after=none(pages),
            last=none(slots),
        )

    @property
    def held_tokens(self) -> int:
        """How many output tokens it remembers."""
        return int(self._ring.fill.sum())

    def learn(self, rows: Rows) -> None:  # noqa: D102
        _append(tuple(rows), tuple(self._ring))

    def forget(self, slot: int) -> None:  # noqa: D102
        self._ring.last[slot] = -1

    def draft(self, rows: Rows, drafts: Drafts) -> None:  # noqa: D102
        _recall(tuple(rows), tuple(self._ring), tuple(drafts))


@compiled
def _hash(text: Tokens, end: int, tenant: int, buckets: int) -> Any:
    first, second, third = np.int64(text[end - 2]), np.int64(text[end - 1]), np.int64(text[end])
    own = third ^ ((tenant & 0xFFFF) << 10)  # another tenant's places shall not crowd out one's own
    mixed = first * 0x9E3779B1 + second * 0x85EBCA77 + own * 0xC2B2AE3D
    return (mixed ^ (mixed >> 29)) & (buckets - 1)


@compiled
def _append(step: Parts, held: Parts) -> None:
    rows, ring = Rows(*step), _Ring(*held)
    pages, mask = len(ring.fill), len(ring.tokens) - 1
    for i in range(len(rows.rows)):
        text, slot = rows.tokens[rows.rows[i]], rows.slots[i]
        for position in range(max(rows.known[i], rows.prompts[i]), rows.lengths[i]):
            page = ring.last[slot]
            if page < ring.made[0] - pages:
                page = -1
            if page < 0 or ring.fill[page & (pages - 1)] == _PAGE:
                new = ring.made[0]
                ring.made[0] = new + 1
                cell = new & (pages - 1)
                ring.tenants[cell] = rows.tenants[i]
                ring.fill[cell] = 0
                ring.before[cell] = page
                ring.after[cell] = -1
                if page >= 0:
                    ring.after[page & (pages - 1)] = new
                page = new
                ring.last[slot] = page
            place = page * _PAGE + ring.fill[page & (pages - 1)]
            ring.fill[page & (pages - 1)] += 1
            ring.tokens[place & mask] = text[position]
            ring.older[place & mask] = -1
            # Before that a place would be found by tokens of the prompt, which are nobody else's.
            if position - rows.prompts[i] >= _GRAM - 1:
                key = _hash(text, position, rows.tenants[i], len(ring.newest))
                ring.older[place & mask] = ring.newest[key]
                ring.newest[key] = place


@compiled
def _next(place: int, ring: _Ring) -> int:
    """The place after one that is there; -1 for none."""
    page, cells = place // _PAGE, len(ring.fill) - 1
    if place % _PAGE + 1 < ring.fill[page & cells]:
        return place + 1
    after = ring.after[page & cells]
    return after * _PAGE if after >= 0 else -1


@compiled
def _agreement(text: Tokens, end: int, place: int, ring: _Ring) -> int:
    """How many tokens up to a place are those up to the text's end."""
    pages, mask = len(ring.fill), len(ring.tokens) - 1
    match = 0
    while match < min(LONGEST_MATCH, end + 1) and ring.tokens[place & mask] == text[end - match]:
        match += 1
        if place % _PAGE:
            place -= 1
            continue
        before = ring.before[(place // _PAGE) & (pages - 1)]
        if before < 0 or before < ring.made[0] - pages:
            break
        place = before * _PAGE + _PAGE - 1
    return match


@compiled
def _recall(step: Parts, held: Parts, room: Parts) -> None:
    rows, ring, drafts = Rows(*step), _Ring(*held), Drafts(*room)
    pages, mask = len(ring.fill), len(ring.tokens) - 1
    oldest, most = max(0, ring.made[0] - pages) * _PAGE, drafts.tokens.shape[1]
    places = np.zeros(_CANDIDATES, np.int64)
    for i in range(len(rows.rows)):
        text, end = rows.tokens[rows.rows[i]], rows.lengths[i] - 1
        drafts.lengths[i] = 0
        if end < _GRAM - 1:
            continue
        place = ring.newest[_hash(text, end, rows.tenants[i], len(ring.newest))]
        best, best_match, found = -1, _GRAM - 1, 0
        while place >= oldest and found < _CANDIDATES:
            follows = _next(place, ring)
            if ring.tenants[(place // _PAGE) & (pages - 1)] == rows.tenants[i] and follows >= 0:
                places[found] = follows
                found += 1
                before = (place - best_match) & mask
                # A longer match agrees there too, if that is on the same page.
                if best_match < LONGEST_MATCH and (
                    place % _PAGE < best_match or ring.tokens[before] == text[end - best_match]
                ):
                    match = _agreement(text, end, place, ring)
                    if match > best_match:
                        best, best_match = follows, match
            place = ring.older[place & mask]
        length = 0
        while best >= 0 and length < most:
            token = ring.tokens[best & mask]
            drafts.tokens[i, length] = token
            agreeing, going_on = 0, 0
            for j in range(found):
                if ring.tokens[places[j] & mask] == token:
                    agreeing += 1
                    follows = _next(places[j], ring)
                    if follows >= 0:
                        places[going_on] = follows
                        going_on += 1
            drafts.votes[i, length] = vote(agreeing, found)
            found = going_on
            length += 1
            best = _next(best, ring)
        drafts.lengths[i] = length
        drafts.matches[i] = best_match

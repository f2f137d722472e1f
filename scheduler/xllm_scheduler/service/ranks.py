"""Which data-parallel rank a request goes to: the one with least to compute; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping


class Ranks:
    """Tokens under way at each rank, as far as this router sent them."""

    def __init__(self) -> None:
        self._at: defaultdict[tuple[str, int], float] = defaultdict(float)
        self._of: dict[str, list[tuple[tuple[str, int], float]]] = {}

    def placed(
        self,
        request_id: str,
        name: str,
        ranks: int,
        prompt_tokens: int,
        cached: Mapping[tuple[str, int], float],
    ) -> int:
        """The rank of an instance that a request goes to.

        Args:
            request_id: the request's.
            name: the instance.
            ranks: how many it has.
            prompt_tokens: the prompt's.
            cached: tokens of it that each rank holds.
        """
        places = [(name, rank) for rank in range(ranks)]
        place = min(places, key=lambda p: (self._at[p] - cached.get(p, 0.0), p))
        tokens = max(1.0, prompt_tokens - cached.get(place, 0.0))
        self._at[place] += tokens
        self._of.setdefault(request_id, []).append((place, tokens))
        return place[1]

    def over(self, request_id: str) -> None:
        """A request is over."""
        for place, tokens in self._of.pop(request_id, ()):
            if place in self._at:
                self._at[place] -= tokens

    def remove(self, name: str, ranks: int) -> None:
        """An instance has gone."""
        for rank in range(ranks):
            self._at.pop((name, rank), None)

"""Which KV each instance holds, as a router knows it, and what a prompt finds there; pure.

Known from an instance's events, and until they come by what was just sent there; where an instance
publishes none, or a prompt is known by its text alone, by what was sent for as long as that lasts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xllm_kv.index import KvIndex, Match, Prompt, Tier
from xllm_kv.snapshot import Held
from xllm_scheduler.service.registry import Record

CREDITS: Mapping[Tier, float] = {
    Tier.DEVICE: 1.0,
    Tier.HOST: 0.75,
    Tier.DISK: 0.25,
    Tier.REMOTE: 0.25,
}
"""What a token counts for that lies in a tier; the first three as in Dynamo's router."""

TEXT_BLOCK = 16  # tokens, where an instance does not tell, or text stands for them
_MOST_SENT_BLOCKS = 500_000
_PROMISE_S = 2.0  # for events to tell of a prompt that was sent


class KvBook:
    """See the module.

    Args:
        index: what instances' events have told.
    """

    def __init__(self, index: KvIndex) -> None:
        self._index = index
        self._sent = KvIndex(_MOST_SENT_BLOCKS)

    def add(self, record: Record) -> None:
        """An instance has joined, and holds nothing."""
        model = record.models[0]
        if record.block_tokens:
            for rank in range(record.dp_size):
                name = index_name(record.name, rank)
                self._index.add(name, model, record.block_tokens, record.full_groups)
        self._sent.add(index_name(record.name, 0), model, TEXT_BLOCK)

    def remove(self, name: str, ranks: int) -> None:
        """An instance has gone."""
        for rank in range(ranks):
            self._index.remove(index_name(name, rank))
        self._sent.remove(index_name(name, 0))

    def applied(self, name: str, rank: int, events: Sequence[Any]) -> bool:
        """An instance's rank has stored and removed KV; whether all parents were known."""
        return self._index.apply(index_name(name, rank), events)

    def restarted(self, name: str, rank: int) -> None:
        """What is known of the KV of an instance's rank no longer holds."""
        self._index.clear(index_name(name, rank))

    def held(self, name: str, rank: int, held: Held) -> None:
        """An instance's rank says that it holds these blocks."""
        self._index.load(index_name(name, rank), held)

    def sent(self, prompt: Prompt, record: Record, rank: int, now_s: float) -> None:
        """A prompt goes to an instance's rank, which will hold it."""
        if prompt.approximate or not record.block_tokens:
            self._sent.note(index_name(record.name, 0), prompt)
        else:
            self._index.promise(index_name(record.name, rank), prompt, now_s + _PROMISE_S)

    def matches(
        self, prompt: Prompt, records: Iterable[Record], now_s: float
    ) -> dict[tuple[str, int], Match]:
        """What each rank of each instance holds of a prompt; those that hold nothing left out."""
        self._index.expire(now_s)
        found: dict[str, Match] = {}
        if prompt.approximate or any(not record.block_tokens for record in records):
            found = self._sent.match(prompt)
        if not prompt.approximate:
            found |= self._index.match(prompt)
        return {_place(name): match for name, match in found.items()}


def index_name(instance: str, rank: int) -> str:
    """What the index calls a data-parallel rank of an instance."""
    return f"{instance}#{rank}"


def _place(name: str) -> tuple[str, int]:
    instance, _, rank = name.rpartition("#")
    return instance, int(rank)


def credit(match: Match) -> float:
    """Tokens that need not be computed, those in slower tiers for less."""
    return sum(tokens * CREDITS[tier] for tier, tokens in zip(Tier, match.tokens, strict=True))

"""What is asked of a simulated cluster: streams of requests, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from xllm_plugins.errors import ConfigError

HASH_TOKENS = 512  # of a Mooncake trace's hash_id


class Ask(NamedTuple):
    """One request.

    Attributes:
        at_s: when it comes, in seconds from the start; what is taken from a backlog has no time.
        prompt_tokens: its length.
        output_tokens: how many tokens it generates.
        hash_ids: one per ``HASH_TOKENS`` tokens of the prompt; equal ones, from the start on, are
            equal text. Empty if it shares nothing with others.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        new_tokens: of the user, after all that was said before.
        output_tokens: how many tokens are generated.
        think_s: how long after the last answer it comes.
    """

    new_tokens: int
    output_tokens: int
    think_s: float


class Session(NamedTuple):
    """A conversation; each turn waits for the answer to the one before.

    Attributes:
        at_s: when its first turn comes.
        turns: at least one.
    """

    at_s: float
    turns: Sequence[Turn]


@dataclass(frozen=True)
class Slo:
    """What a request is promised; infinite for offline ones."""

    ttft_ms: float = math.inf
    tpot_ms: float = math.inf


@dataclass(frozen=True)
class Stream:
    """Requests of one class.

    Attributes:
        name: in reports.
        online: whether they have SLOs.
        slo: which.
        asks: requests that come at their times, in order of time.
        sessions: conversations, in order of time.
        outstanding: how many of ``asks`` are outstanding at any time, whatever their times: a
            backlog that is worked off in order; 0 for requests that come at their times.
    """

    name: str
    online: bool
    slo: Slo = Slo()
    asks: Sequence[Ask] = ()
    sessions: Sequence[Session] = ()
    outstanding: int = 0

    def __post_init__(self) -> None:
        if self.sessions and self.outstanding:
            raise ConfigError(f"The stream {self.name} has sessions and a backlog; allowed is one.")


def scaled(asks: Iterable[Ask], factor: float) -> list[Ask]:
    """The same requests at ``factor`` times the rate."""
    return [ask._replace(at_s=ask.at_s / factor) for ask in asks]


def between(asks: Iterable[Ask], start_s: float, end_s: float) -> list[Ask]:
    """The requests of a window, which then begins at 0."""
    return [a._replace(at_s=a.at_s - start_s) for a in asks if start_s <= a.at_s < end_s]


def fitting(stream: Stream, most_tokens: int) -> tuple[Stream, int]:
    """The stream without requests that are longer than a model allows, and how many those were."""
    asks = [a for a in stream.asks if a.prompt_tokens + a.output_tokens <= most_tokens]
    sessions = [s for s in stream.sessions if _longest(s) <= most_tokens]
    dropped = len(stream.asks) - len(asks) + len(stream.sessions) - len(sessions)
    return replace(stream, asks=asks, sessions=sessions), dropped


def _longest(session: Session) -> int:
    return sum(turn.new_tokens + turn.output_tokens for turn in session.turns)


class Prompts:
    """Token ids for requests, so that what shares text shares KV, and nothing else does.

    Args:
        vocabulary: how many token ids there are.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._unique = 0

    def of(self, ask: Ask) -> list[int]:
        """The prompt of a request."""
        tokens: list[int] = []
        for hash_id in ask.hash_ids:
            tokens += self._text(2 * hash_id, HASH_TOKENS)
        missing = ask.prompt_tokens - len(tokens)
        return tokens + self.new(missing) if missing > 0 else tokens[: ask.prompt_tokens]

    def new(self, tokens: int) -> list[int]:
        """Text that nobody else has."""
        self._unique += 1
        return self._text(2 * self._unique + 1, tokens)

    def token(self) -> int:
        """One for an answer."""
        self._unique += 1
        return self._unique % self._vocabulary

    def _text(self, number: int, tokens: int) -> list[int]:
        # Each KV block's hash covers all before it, so a block needs to differ only in itself.
        low, high = number % self._vocabulary, number // self._vocabulary % self._vocabulary
        return ([low, high] * (tokens // 2 + 1))[:tokens]


def arrivals(streams: Sequence[Stream]) -> Iterator[tuple[float, int, Ask | Session]]:
    """All that comes at a time, in order: when, of which stream, what."""
    timed: list[tuple[float, int, Ask | Session]] = []
    for index, stream in enumerate(streams):
        if not stream.outstanding:
            timed += [(ask.at_s, index, ask) for ask in stream.asks]
            timed += [(session.at_s, index, session) for session in stream.sessions]
    return iter(sorted(timed, key=lambda one: one[:2]))

"""Leaves an instance alone that keeps failing, and tries it again after a while.

Source: the circuit breaker of Nygard, Release It!, with the numbers that vLLM's router has.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from enum import Enum


class Circuit(str, Enum):
    """Whether requests may pass."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass
class Breaker:
    """One instance's.

    Attributes:
        failures: how many within the window open it.
        successes: how many close it again.
        window_s: the window.
        open_s: how long it stays open before one request at a time may try.
    """

    failures: int = 5
    successes: int = 2
    window_s: float = 60.0
    open_s: float = 30.0
    _failed_s: deque[float] = field(default_factory=deque)
    _opened_s: float | None = None
    _trying: bool = False
    _good: int = 0

    def state(self, now_s: float) -> Circuit:
        """How it is."""
        if self._opened_s is None:
            return Circuit.CLOSED
        return Circuit.HALF_OPEN if now_s - self._opened_s >= self.open_s else Circuit.OPEN

    def passes(self, now_s: float) -> bool:
        """Whether a request may be sent now."""
        state = self.state(now_s)
        return state is Circuit.CLOSED or (state is Circuit.HALF_OPEN and not self._trying)

    def sent(self, now_s: float) -> None:
        """A request has been sent."""
        self._trying = self.state(now_s) is Circuit.HALF_OPEN

    def released(self) -> None:
        """It is over without having shown anything; another one may try."""
        self._trying = False

    def succeeded(self, now_s: float) -> None:
        """It was answered."""
        if self._opened_s is None:
            self._failed_s.clear()
            return
        self._trying = False
        self._good += 1
        if self._good >= self.successes:
            self._opened_s, self._good = None, 0
            self._failed_s.clear()

    def failed(self, now_s: float) -> None:
        """It was not."""
        self._trying, self._good = False, 0
        if self._opened_s is not None:
            self._opened_s = now_s
            return
        self._failed_s.append(now_s)
        while self._failed_s and now_s - self._failed_s[0] > self.window_s:
            self._failed_s.popleft()
        if len(self._failed_s) >= self.failures:
            self._opened_s = now_s


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a request is sent again.

    Attributes:
        first_s: before the first time.
        factor: longer each time.
        most_s: at most.
        jitter: this share of it at random, so that many do not come back together.
    """

    first_s: float = 0.1
    factor: float = 2.0
    most_s: float = 10.0
    jitter: float = 0.5

    def delay_s(self, attempt: int, rng: random.Random) -> float:
        """Before attempt 1, 2, ... after the first one."""
        whole_s = min(self.most_s, self.first_s * self.factor ** (attempt - 1))
        return whole_s * (1.0 - self.jitter * rng.random())

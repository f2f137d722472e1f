"""Whether to fetch KV or to compute it: a tier's time for it, learned, against the prefill's.

    fetch = latency + bytes / speed + bytes under way / speed        [ms]

A tier's latency and speed are fitted to its last transfers, each counting for 0.8 of the next one.
What is known to take longer than computing is not fetched, so a tier that turns slow is left alone
by itself, and at once where a fetch from it had to be given up; now and then one block of it is
fetched with nobody waiting, so that it comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

_FORGET = 0.8
_CHANGED = 3.0  # times what was expected, or a third of it: the tier is not what it was
_KEPT = 0.02  # of all that was known of a tier that has turned slow
_MIB = 1 << 20
_FIRST_MIB = (1.0, 64.0)  # a guess counts as two transfers of these sizes
_PATIENCE = 2.0  # times the predicted fetch, before one that is late is given up
_LEAST_PATIENCE_MS = 20.0
_WORTH_TRYING = 0.05  # the share of the time to compute it that may be waited in vain
PROBE_S = 5.0


class Run(NamedTuple):
    """Blocks of a prompt that follow each other and lie in one tier.

    Attributes:
        tier: its name.
        tokens: that they hold.
        kv_bytes: that would be moved.
    """

    tier: str
    tokens: int
    kv_bytes: int


class Fetch(NamedTuple):
    """What a request shall fetch.

    Attributes:
        tokens: from the first external hit on; 0 for none.
        predicted_ms: how long that takes.
        prefill_ms: how long computing it would take.
        probe: a tier that was refused and of which a block shall be fetched in the background.
    """

    tokens: int
    predicted_ms: float
    prefill_ms: float = 0.0
    probe: str | None = None

    @property
    def deadline_ms(self) -> float:
        """After so long without it the request computes its prompt."""
        patience_ms = max(_PATIENCE * self.predicted_ms, _WORTH_TRYING * self.prefill_ms)
        return max(_LEAST_PATIENCE_MS, patience_ms)


@dataclass
class TierCounts:
    """What happened at one tier, for metrics: blocks' tokens, bytes, seconds."""

    won_tokens: int = 0
    refused_tokens: int = 0
    missed_tokens: int = 0
    late: int = 0
    probes: int = 0
    prefetched_bytes: int = 0
    fetched_bytes: int = 0
    fetch_s: float = 0.0
    stored_bytes: int = 0
    store_s: float = 0.0
    skipped: int = 0
    errors: int = 0
    evicted: int = 0


@dataclass
class Line:
    """Least squares of ms over MiB, exponentially weighted.

    Args:
        guess_ms, guess_ms_per_mib: what is thought before anything was seen.
    """

    guess_ms: float
    guess_ms_per_mib: float
    sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def __post_init__(self) -> None:
        for mib in _FIRST_MIB:
            self.add(mib, self.guess_ms + mib * self.guess_ms_per_mib)

    def learn(self, mib: float, ms: float) -> None:
        """Add a transfer, after which others are expected to take as much more or less time."""
        expected_ms = self.at(mib)
        if ms > _CHANGED * expected_ms:
            self.sums = [_KEPT * value for value in self.sums]
        elif ms < expected_ms / _CHANGED:
            # One block is fetched to see this, so what is known of larger ones shrinks with it.
            for place in (2, 4):
                self.sums[place] *= ms / expected_ms
        self.add(mib, ms)

    def add(self, mib: float, ms: float) -> None:
        """Add a transfer, and believe no less in what was seen before."""
        for place, value in enumerate((1.0, mib, ms, mib * mib, mib * ms)):
            self.sums[place] = _FORGET * self.sums[place] + value

    def at(self, mib: float) -> float:
        """How long so much takes, ms."""
        n, x, y, xx, xy = self.sums
        spread = n * xx - x * x
        slope = (n * xy - x * y) / spread if spread > 1e-9 * n * xx else y / x if x else 0.0
        slope = min(max(slope, 0.0), y / x if x else 0.0)  # and no negative latency
        return (y - slope * x) / n + slope * mib


class Prices:
    """Prices fetches from tiers.

    Args:
        guesses: by tier, a latency in ms and a speed in MiB per ms to begin with.
    """

    def __init__(self, guesses: Mapping[str, tuple[float, float]]) -> None:
        self._lines = {t: Line(ms, 1.0 / speed) for t, (ms, speed) in guesses.items()}
        self._under_way = dict.fromkeys(guesses, 0)
        self._tried_s = dict.fromkeys(guesses, float("-inf"))
        self._late: set[str] = set()
        self.counts = {tier: TierCounts() for tier in guesses}

    def fetch_ms(self, tier: str, kv_bytes: int) -> float:
        """How long a fetch takes that begins now."""
        return self._lines[tier].at((kv_bytes + self._under_way[tier]) / _MIB)

    def under_way(self, tier: str) -> int:
        """Bytes that are being fetched."""
        return self._under_way[tier]

    def missed(self, runs: Sequence[Run], tokens: int) -> None:
        """Count what was not found.

        Args:
            runs: what was, see :meth:`choose`; tiers are looked at in the order of the guesses.
            tokens: that were looked for.
        """
        for tier, counts in self.counts.items():
            tokens -= sum(run.tokens for run in runs if run.tier == tier)
            counts.missed_tokens += tokens

    def began(self, tier: str, kv_bytes: int) -> None:
        """Note that a fetch has begun."""
        self._under_way[tier] += kv_bytes

    def ended(self, tier: str, kv_bytes: int, took_s: float, *, ok: bool = True) -> None:
        """Note that a fetch has ended, and learn from it."""
        self._under_way[tier] = max(0, self._under_way[tier] - kv_bytes)
        if ok:
            self.learn(tier, kv_bytes, took_s)
        else:
            self.counts[tier].errors += 1

    def learn(self, tier: str, kv_bytes: int, took_s: float) -> None:
        """Learn from a fetch that has ended, or one of a block that nobody waited for."""
        counts = self.counts[tier]
        counts.fetched_bytes += kv_bytes
        counts.fetch_s += took_s
        self._late.discard(tier)
        self._lines[tier].learn(kv_bytes / _MIB, took_s * 1e3)

    def stored(self, tier: str, kv_bytes: int, took_s: float) -> None:
        """Note that something was written."""
        self.counts[tier].stored_bytes += kv_bytes
        self.counts[tier].store_s += took_s

    def late(self, tier: str) -> None:
        """Note that a fetch was given up: nobody waits for that tier until one of its ends."""
        self.counts[tier].late += 1
        self._late.add(tier)

    @property
    def distrusted(self) -> str | None:
        """A tier that nobody waits for; None without any."""
        return next(iter(self._late), None)

    def choose(
        self,
        runs: Sequence[Run],
        prefill_ms: Callable[[int], float],
        now_s: float,
        *,
        counted: bool = True,
    ) -> Fetch:
        """How much to fetch of what lies in tiers: the part whose saving is the largest.

        Args:
            runs: from the first token on that the device does not hold.
            prefill_ms: how long the first tokens of them take to compute.
            now_s: the time.
            counted: whether the tokens are counted; not while a tier has yet to say what it holds.
        """
        best, best_ms, gain = 0, 0.0, 0.0
        tokens, fetch_ms = 0, 0.0
        for tier, run in _by_tier(runs):
            tokens += run.tokens
            fetch_ms += self.fetch_ms(tier, run.kv_bytes) if tier not in self._late else inf
            if prefill_ms(tokens) - fetch_ms > gain:
                best, best_ms, gain = tokens, fetch_ms, prefill_ms(tokens) - fetch_ms
        probe = self._count(runs, best, now_s, counted=counted)
        return Fetch(best, best_ms, prefill_ms(best) if best else 0.0, probe)

    def _count(
        self, runs: Sequence[Run], fetched: int, now_s: float, *, counted: bool
    ) -> str | None:
        probe, begin = None, 0
        for run in runs:
            counts = self.counts[run.tier]
            won = min(max(fetched - begin, 0), run.tokens)
            if counted:
                counts.won_tokens += won
                counts.refused_tokens += run.tokens - won
            begin += run.tokens
            if won:
                self._tried_s[run.tier] = now_s
            elif probe is None and now_s - self._tried_s[run.tier] >= PROBE_S:
                self._tried_s[run.tier] = now_s
                probe = run.tier
        return probe


def _by_tier(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Runs of one tier that follow each other are one fetch."""
    joined: list[tuple[str, Run]] = []
    for run in runs:
        if joined and joined[-1][0] == run.tier:
            last = joined[-1][1]
            run = Run(run.tier, last.tokens + run.tokens, last.kv_bytes + run.kv_bytes)
            joined[-1] = (run.tier, run)
        else:
            joined.append((run.tier, run))
    return joined

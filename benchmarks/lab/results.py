"""What a load run measured, and the numbers drawn from it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


class RequestClass(enum.Enum):
    """Whether somebody waits for the answer."""

    ONLINE = "online"
    OFFLINE = "offline"


@dataclass(frozen=True)
class Slo:
    """What an online request is promised."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class Record:
    """One request as its client saw it; times are seconds since the measured window began."""

    request_class: RequestClass
    arrival_s: float
    end_s: float
    """When the answer ended, failed, or was no longer waited for."""
    tokens: tuple[tuple[float, int], ...]
    """When a piece of the answer came, and the output tokens received by then."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the server took from its prefix cache."""
    finished: bool = True
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        """Output tokens received."""
        return self.tokens[-1][1] if self.tokens else 0

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token, None if none came."""
        return (self.tokens[0][0] - self.arrival_s) * 1e3 if self.tokens else None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of each token after the first, None if there was at most one."""
        if self.output_tokens < 2:
            return None
        (first_s, head), (last_s, _) = self.tokens[0], self.tokens[-1]
        after_first = self.output_tokens - head
        return (last_s - first_s) * 1e3 / after_first if after_first else 0.0

    def meets(self, slo: Slo) -> bool:
        """True if the whole answer came, its first token and its pace in time."""
        if self.error is not None or not self.finished or self.ttft_ms is None:
            return False
        return self.ttft_ms <= slo.ttft_ms and (self.tpot_ms or 0.0) <= slo.tpot_ms

    def longest_wait_s(self, window_s: float) -> float:
        """The longest time without a new token inside the window, from arrival to end."""
        moments = [self.arrival_s, *(at_s for at_s, _ in self.tokens), self.end_s]
        inside = [min(max(at_s, 0.0), window_s) for at_s in moments]
        return max(later - earlier for earlier, later in pairwise(inside))


@dataclass(frozen=True)
class Percentiles:
    """Three percentiles of a sample; None if it is empty."""

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Summary:
    """One load run, or several pooled, in numbers."""

    online_n: int
    online_failed: int
    """Ended in an error, or not at all within the drain limit."""
    attainment: float | None
    """Share of online requests that met both SLOs; None without online requests."""
    attainment_low: float | None
    attainment_high: float | None
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    offline_n: int
    offline_errors: int
    offline_output_tok_s: float
    offline_total_tok_s: float
    """Output tokens received, and prompt tokens computed, each second of the window."""
    longest_offline_wait_s: float
    window_s: float
    others_cpu: float
    """Share of the machine's CPU time that other processes took: above a few percent, distrust."""


@dataclass(frozen=True)
class Run:
    """The records of one measured window."""

    records: tuple[Record, ...]
    window_s: float
    others_cpu: float = 0.0
    """Share of the machine's CPU time that other processes took."""

    def of(self, request_class: RequestClass) -> list[Record]:
        """The records of one class."""
        return [record for record in self.records if record.request_class is request_class]


def summarize(runs: Sequence[Run], slo: Slo) -> Summary:
    """Pools runs: online requests that arrived in a window, offline tokens that came in one."""
    window_s = sum(run.window_s for run in runs)
    online = [
        record
        for run in runs
        for record in run.of(RequestClass.ONLINE)
        if 0 <= record.arrival_s < run.window_s
    ]
    met = [record.meets(slo) for record in online]
    low, high = bootstrap_share(met) if met else (None, None)
    offline = [(record, run.window_s) for run in runs for record in run.of(RequestClass.OFFLINE)]
    output = sum(output_tokens_in(record, end_s) for record, end_s in offline)
    prompt = sum(prompt_tokens_in(record, end_s) for record, end_s in offline)
    return Summary(
        online_n=len(online),
        online_failed=sum(record.error is not None or not record.finished for record in online),
        attainment=sum(met) / len(met) if met else None,
        attainment_low=low,
        attainment_high=high,
        ttft_ms=percentiles(record.ttft_ms for record in online),
        tpot_ms=percentiles(record.tpot_ms for record in online),
        offline_n=len(offline),
        offline_errors=sum(record.error is not None for record, _ in offline),
        offline_output_tok_s=output / window_s,
        offline_total_tok_s=(output + prompt) / window_s,
        longest_offline_wait_s=max((r.longest_wait_s(end_s) for r, end_s in offline), default=0.0),
        window_s=window_s,
        others_cpu=sum(run.others_cpu * run.window_s for run in runs) / window_s,
    )


def output_tokens_in(record: Record, end_s: float) -> int:
    """Output tokens received from second 0 up to, not including, `end_s`."""
    before = max((count for at_s, count in record.tokens if at_s < 0), default=0)
    by_end = max((count for at_s, count in record.tokens if at_s < end_s), default=0)
    return by_end - before


def prompt_tokens_in(record: Record, end_s: float) -> int:
    """Prompt tokens computed, counted where the first token came from second 0 to `end_s`."""
    if not record.tokens or not 0 <= record.tokens[0][0] < end_s:
        return 0
    return record.prompt_tokens - record.cached_tokens


def percentiles(values: Iterable[float | None]) -> Percentiles:
    """Percentiles of the values that are there."""
    sample = [value for value in values if value is not None]
    if not sample:
        return Percentiles(None, None, None)
    return Percentiles(*(float(value) for value in np.percentile(sample, (50, 90, 99))))


def bootstrap_share(outcomes: Sequence[bool], resamples: int = 20_000) -> tuple[float, float]:
    """95 % bootstrap interval of the share of true outcomes.

    A resample of n outcomes holds binomial(n, share) true ones, so that is what is drawn.
    """
    n = len(outcomes)
    shares = np.random.default_rng(0).binomial(n, sum(outcomes) / n, resamples) / n
    low, high = np.percentile(shares, (2.5, 97.5))
    return float(low), float(high)

"""What became of each request, and the figures drawn from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from xllm_scheduler.simulate.workload import Slo


@dataclass(slots=True)
class Outcome:
    """One request, as its client sees it; times in seconds from the start.

    Attributes:
        request_id: its id.
        stream: the stream that it is of.
        online: whether it has SLOs.
        slo: which.
        arrival_s: when it came.
        prompt_tokens: its prompt's length.
        wanted_tokens: how many tokens it is to generate.
        prefill: the instance that computed its prompt last.
        decode: the instance that generated last.
        first_s: when its first token came; None before.
        last_s: when its last token so far came; None before.
        tokens: how many came.
        cached_tokens: of its prompt, found in the first instance's prefix cache.
        longest_gap_s: the longest time without a token, from arrival on.
        attempts: 1, and one more for each instance that failed it.
        finished: whether all tokens came.
    """

    request_id: str
    stream: str
    online: bool
    slo: Slo
    arrival_s: float
    prompt_tokens: int
    wanted_tokens: int
    prefill: str = ""
    decode: str = ""
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0
    cached_tokens: int = 0
    longest_gap_s: float = 0.0
    attempts: int = 1
    finished: bool = False

    def produced(self, tokens: int, now_s: float) -> None:
        """Note new tokens."""
        before_s = self.arrival_s if self.last_s is None else self.last_s
        self.longest_gap_s = max(self.longest_gap_s, now_s - before_s)
        if self.first_s is None:
            self.first_s = now_s
        self.last_s = now_s
        self.tokens += tokens
        self.finished = self.tokens >= self.wanted_tokens

    def late_by(self, now_s: float) -> bool:
        """Whether its first token came too late, or would if it came now; never if offline."""
        first_s = now_s if self.first_s is None else self.first_s
        return self.online and (first_s - self.arrival_s) * 1e3 > self.slo.ttft_ms

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token; None if none came."""
        return None if self.first_s is None else (self.first_s - self.arrival_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of each further token; None if there was none."""
        if self.first_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) * 1e3 / (self.tokens - 1)

    @property
    def met(self) -> bool:
        """Whether all of it came in time."""
        if not self.finished or self.ttft_ms is None:
            return False
        return self.ttft_ms <= self.slo.ttft_ms and (self.tpot_ms or 0.0) <= self.slo.tpot_ms


@dataclass(frozen=True)
class Spread:
    """A distribution in three numbers; NaN where there is nothing."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """Of the values that are there."""
        there = [value for value in values if value is not None]
        if not there:
            return cls(math.nan, math.nan, math.nan)
        return cls(*(float(value) for value in np.percentile(there, (50, 90, 99))))


@dataclass(frozen=True)
class Summary:
    """A run in numbers.

    Attributes:
        online: how many online requests came.
        attainment: the share of them that met both SLOs; NaN without any.
        goodput_s: online requests that met both SLOs, per second.
        ttft_ms: of online requests.
        tpot_ms: of online requests.
        online_tokens_s: tokens that online requests generated, per second.
        offline_finished: offline requests that were answered in full.
        offline_tokens_s: tokens generated for offline requests, per second.
        offline_total_tokens_s: those, and the prompt tokens computed for them.
        longest_offline_wait_s: the longest time in which an offline request got no token.
        cached_share: the share of prompt tokens that a prefix cache held.
        seconds: the length of the run.
    """

    online: int
    attainment: float
    goodput_s: float
    ttft_ms: Spread
    tpot_ms: Spread
    online_tokens_s: float
    offline_finished: int
    offline_tokens_s: float
    offline_total_tokens_s: float
    longest_offline_wait_s: float
    cached_share: float
    seconds: float


@dataclass(frozen=True)
class Sample:
    """An instance at one time.

    Attributes:
        at_s: when.
        instance: which.
        role: its role then.
        waiting: requests that wait.
        running: requests that run.
        kv_used: share of its KV cache, 0..1.
        offline_share: of the tokens computed since the sample before, 0..1.
    """

    at_s: float
    instance: str
    role: str
    waiting: int
    running: int
    kv_used: float
    offline_share: float


@dataclass(frozen=True)
class Run:
    """All that a simulation brought.

    Attributes:
        outcomes: every request that came, in order.
        samples: every instance, at regular times.
        seconds: how long the run lasted in virtual time.
        steps: engine steps of all instances.
        busy_s: seconds of these, by instance.
        moved_bytes: KV that was sent from instance to instance.
        offline_tokens: computed for offline requests, of prompts and answers.
        dropped: requests of the workload that are longer than the model allows.
        events: role changes, failures and recoveries: when and what.
    """

    outcomes: Sequence[Outcome]
    samples: Sequence[Sample]
    seconds: float
    steps: int
    busy_s: dict[str, float]
    moved_bytes: int
    offline_tokens: int
    dropped: int = 0
    events: Sequence[tuple[float, str]] = field(default_factory=tuple)

    def summary(self) -> Summary:
        """The run in numbers."""
        online = [o for o in self.outcomes if o.online]
        offline = [o for o in self.outcomes if not o.online]
        met = sum(o.met for o in online)
        generated = sum(o.tokens for o in offline)
        waits = (_longest_wait_s(o, self.seconds) for o in offline if o.prefill)
        prompts = sum(o.prompt_tokens for o in self.outcomes if o.first_s is not None)
        cached = sum(o.cached_tokens for o in self.outcomes)
        return Summary(
            online=len(online),
            attainment=met / len(online) if online else math.nan,
            goodput_s=met / self.seconds,
            ttft_ms=Spread.of(o.ttft_ms for o in online),
            tpot_ms=Spread.of(o.tpot_ms for o in online),
            online_tokens_s=sum(o.tokens for o in online) / self.seconds,
            offline_finished=sum(o.finished for o in offline),
            offline_tokens_s=generated / self.seconds,
            offline_total_tokens_s=self.offline_tokens / self.seconds,
            longest_offline_wait_s=max(waits, default=0.0),
            cached_share=cached / prompts if prompts else 0.0,
            seconds=self.seconds,
        )


def _longest_wait_s(one: Outcome, end_s: float) -> float:
    if one.finished:
        return one.longest_gap_s
    since_s = one.arrival_s if one.last_s is None else one.last_s
    return max(one.longest_gap_s, end_s - since_s)

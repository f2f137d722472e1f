"""Makes requests: arrival processes, lengths and conversations, the same for the same seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from xllm_plugins.errors import ConfigError
from xllm_scheduler.simulate.workload import Ask, Session, Turn


@dataclass(frozen=True)
class Arrivals:
    """When requests come.

    Attributes:
        rate: mean requests per second.
        burstiness: the gaps' coefficient of variation; 1 is a Poisson process, above it a Gamma
            process with bursts.
        diurnal: by what share the rate swings around its mean, 0..1.
        period_s: in what time.
    """

    rate: float
    burstiness: float = 1.0
    diurnal: float = 0.0
    period_s: float = 86400.0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("rate", 0.0, math.inf),
            ("burstiness", 0.0, math.inf),
            ("period_s", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not least < value < most:
                raise ConfigError(f"arrivals.{name} is {value!r}; allowed are numbers above 0.")
        if not 0.0 <= self.diurnal <= 1.0:
            raise ConfigError(
                f"arrivals.diurnal is {self.diurnal!r}; allowed are numbers from 0 to 1."
            )

    def times(self, rng: random.Random, end_s: float) -> list[float]:
        """All times before ``end_s``, in order."""
        shape = 1.0 / self.burstiness**2
        times: list[float] = []
        work = 0.0
        while True:
            # In units of the mean gap; the swing of the rate stretches and shrinks it.
            work += rng.gammavariate(shape, 1.0 / shape)
            at_s = self._when(work / self.rate)
            if at_s >= end_s:
                return times
            times.append(at_s)

    def _when(self, mean_s: float) -> float:
        """When as many requests have come as come in ``mean_s`` at the mean rate."""
        if not self.diurnal:
            return mean_s
        turn = 2.0 * math.pi / self.period_s
        low, high = mean_s - self.period_s, mean_s + self.period_s
        for _ in range(60):  # halving, to far below a microsecond
            middle = (low + high) / 2.0
            come = middle + self.diurnal / turn * (1.0 - math.cos(turn * middle))
            low, high = (middle, high) if come < mean_s else (low, middle)
        return max(0.0, high)


@dataclass(frozen=True)
class Lengths:
    """Token counts of a log-normal distribution, within bounds.

    Attributes:
        mean: of the distribution before it is bounded.
        spread: its coefficient of variation; 0 for a fixed length.
        most: the longest.
    """

    mean: float
    spread: float = 0.0
    most: int = 1 << 30

    def draw(self, rng: random.Random) -> int:
        """One of them."""
        if not self.spread:
            return max(1, min(self.most, round(self.mean)))
        sigma = math.sqrt(math.log(1.0 + self.spread**2))
        drawn = rng.lognormvariate(math.log(self.mean) - sigma * sigma / 2.0, sigma)
        return max(1, min(self.most, round(drawn)))


def requests(
    arrivals: Arrivals, prompt: Lengths, output: Lengths, *, seconds: float, seed: int
) -> list[Ask]:
    """Requests that share nothing."""
    rng = random.Random(f"requests-{seed}")  # noqa: S311
    times = arrivals.times(rng, seconds)
    return [Ask(at_s, prompt.draw(rng), output.draw(rng)) for at_s in times]


def drawn(asks: Sequence[Ask], arrivals: Arrivals, *, seconds: float, seed: int) -> list[Ask]:
    """Requests with the lengths of a trace in its order, but with other times."""
    rng = random.Random(f"drawn-{seed}")  # noqa: S311
    times = arrivals.times(rng, seconds)
    return [asks[i % len(asks)]._replace(at_s=at_s) for i, at_s in enumerate(times)]


def conversations(
    arrivals: Arrivals,
    turns: Lengths,
    new: Lengths,
    output: Lengths,
    think_s: float,
    *,
    seconds: float,
    seed: int,
) -> list[Session]:
    """Conversations whose users think for ``think_s`` on average, exponentially."""
    rng = random.Random(f"conversations-{seed}")  # noqa: S311
    return [
        Session(
            at_s,
            [
                Turn(new.draw(rng), output.draw(rng), rng.expovariate(1.0 / think_s))
                for _ in range(turns.draw(rng))
            ],
        )
        for at_s in arrivals.times(rng, seconds)
    ]

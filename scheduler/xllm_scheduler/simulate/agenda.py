"""What is to happen when, in order of virtual time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from xllm_scheduler.simulate.clock import START_S, VirtualClock
from xllm_scheduler.simulate.instance import SimulationError


class _Event(NamedTuple):
    at_s: float
    number: int  # events at the same time happen in the order in which they were planned
    act: Callable[..., None]
    args: tuple[Any, ...]


class Agenda:
    """Events by time.

    Args:
        clock: is set to the time of each event.
    """

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._events: list[_Event] = []
        self._number = 0

    def at(self, at_s: float, act: Callable[..., None], *args: Any) -> None:
        """Plan to call ``act`` at a time, which may be now."""
        self._number += 1
        heapq.heappush(self._events, _Event(at_s, self._number, act, args))

    def after(self, seconds: float, act: Callable[..., None], *args: Any) -> None:
        """Plan to call ``act`` in so many seconds."""
        self.at(self._clock.now_s + seconds, act, *args)

    def happen(self, end_s: float = math.inf) -> Iterator[float]:
        """Let events happen one by one; yields the time of each.

        Raises:
            SimulationError: one raised; says when, what it was, and for whom.
        """
        while self._events and self._events[0].at_s <= end_s:
            event = heapq.heappop(self._events)
            self._clock.now_s = event.at_s
            try:
                event.act(*event.args)
            except Exception as error:
                what = " ".join([event.act.__name__.strip("_"), *(str(a)[:80] for a in event.args)])
                kind = "" if isinstance(error, SimulationError) else f"{type(error).__name__}: "
                raise SimulationError(
                    f"At {event.at_s - START_S:.6f} s ({what}): {kind}{error}"
                ) from error
            yield event.at_s

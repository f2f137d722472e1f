"""Waiting queues: a lane per class, online by deadline and first, offline behind a gate."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

_LATE_TURN = 4  # of so many admissions one is of a request that is late already


class DeadlineLane(RequestQueue):  # type: ignore[misc]
    """Requests by deadline, earliest first; those that are late already step back.

    Earliest deadline first collapses under overload: it spends itself on requests that are lost.
    So whoever is late when :meth:`turn` is called waits behind all who can still be served in
    time, except that every fourth admission is of one who is late.
    """

    def __init__(self, due_s: Callable[[Request], float]) -> None:
        self._due_s = due_s
        self._timely: list[tuple[float, int, Request]] = []
        self._late: list[tuple[float, int, Request]] = []
        self._now_s = 0.0
        self._added = 0
        self._admitted = 0

    def turn(self, now_s: float) -> None:
        """Set the time by which requests are late."""
        self._now_s = now_s
        passed = bisect_left(self._timely, (now_s,))
        if passed:
            for entry in self._timely[:passed]:
                insort(self._late, entry)
            del self._timely[:passed]

    def add_request(self, request: Request) -> None:
        """Add by its deadline; among equals the first to come is first."""
        self._added += 1
        entry = (self._due_s(request), self._added, request)
        insort(self._late if entry[0] < self._now_s else self._timely, entry)

    def pop_request(self) -> Request:
        """Take the head out."""
        entry = self._front().pop(0)
        self._admitted += 1
        return entry[2]

    def peek_request(self) -> Request:
        """The head."""
        return self._front()[0][2]

    def prepend_request(self, request: Request) -> None:
        """Put back by its deadline, before its equals."""
        entry = (self._due_s(request), -self._added - 1, request)
        self._added += 1
        insort(self._late if entry[0] < self._now_s else self._timely, entry)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put back several."""
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """Take one request out."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take several out."""
        gone = {id(request) for request in requests}
        self._timely = [entry for entry in self._timely if id(entry[2]) not in gone]
        self._late = [entry for entry in self._late if id(entry[2]) not in gone]

    def __bool__(self) -> bool:
        return bool(self._timely or self._late)

    def __len__(self) -> int:
        return len(self._timely) + len(self._late)

    def __iter__(self) -> Iterator[Request]:
        front = self._front()
        back = self._late if front is self._timely else self._timely
        return (entry[2] for entry in chain(front, back))

    def _front(self) -> list[tuple[float, int, Request]]:
        late_first = self._admitted % _LATE_TURN == _LATE_TURN - 1
        if self._late and (late_first or not self._timely):
            return self._late
        return self._timely


class ClassQueue(RequestQueue):  # type: ignore[misc]
    """A lane per class.

    While ``offline_open`` is False the offline lane can still be filled, counted and emptied of
    aborted requests, but the queue is false without online ones and gives out no other.

    Args:
        online: an empty queue for online requests.
        offline: an empty queue for offline requests.
        is_online: tells which lane a request belongs to.
    """

    def __init__(self, online: Any, offline: Any, is_online: Callable[[Request], bool]) -> None:
        self._online = online
        self._offline = offline
        self._is_online = is_online
        self.offline_open = True

    def turn(self, now_s: float) -> None:
        """Tell the lanes the time."""
        if isinstance(self._online, DeadlineLane):
            self._online.turn(now_s)

    def add_request(self, request: Request) -> None:
        """Add at the end of the class's lane."""
        self._lane(request).add_request(request)

    def pop_request(self) -> Request:
        """Take the head out."""
        return self._front().pop_request()

    def peek_request(self) -> Request:
        """The head: online first, offline while its lane is open."""
        return self._front().peek_request()

    def prepend_request(self, request: Request) -> None:
        """Put at the head of the class's lane."""
        self._lane(request).prepend_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put each at the head in turn; the last one ends up first, as with extendleft."""
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        """Take one request out, open lane or not."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take several out, open lane or not, and whatever their class has become."""
        wanted = set(requests)
        self._online.remove_requests(wanted)
        self._offline.remove_requests(wanted)

    def count(self, online: bool) -> int:
        """How many requests of one class wait."""
        return len(self._online if online else self._offline)

    def head(self, online: bool, most: int) -> list[Request]:
        """The first requests of one lane."""
        return list(islice(self._online if online else self._offline, most)) if most > 0 else []

    def __getitem__(self, index: int) -> Request:
        # vLLM's queue for first come, first served is a deque, which can be indexed.
        return list(self)[index]

    def __bool__(self) -> bool:
        return bool(self._online) or (self.offline_open and bool(self._offline))

    def __len__(self) -> int:
        return len(self._online) + len(self._offline)

    def __iter__(self) -> Iterator[Request]:
        yield from self._online
        yield from self._offline

    def _lane(self, request: Request) -> Any:
        return self._online if self._is_online(request) else self._offline

    def _front(self) -> Any:
        return self._online if self._online or not self.offline_open else self._offline

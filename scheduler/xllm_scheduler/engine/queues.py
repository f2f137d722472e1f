"""A waiting queue with a lane per class: online first, and a gate before the offline lane."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request


class ClassQueue(RequestQueue):  # type: ignore[misc]
    """vLLM's own queues as lanes, so that each keeps its order (arrival or priority).

    While ``offline_open`` is False the offline lane can still be filled, counted and emptied of
    aborted requests, but the queue is false without online ones and gives out no other.
    """

    def __init__(self, new_lane: Callable[[], Any], is_online: Callable[[Request], bool]) -> None:
        self._online = new_lane()
        self._offline = new_lane()
        self._is_online = is_online
        self.offline_open = True

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
        self._lane(request).remove_request(request)

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take several out, open lane or not."""
        wanted = set(requests)
        for lane, online in ((self._online, True), (self._offline, False)):
            mine = {r for r in wanted if self._is_online(r) is online}
            if mine:
                lane.remove_requests(mine)

    def count(self, online: bool) -> int:
        """How many requests of one class wait."""
        return len(self._online if online else self._offline)

    def head(self, online: bool, most: int) -> list[Request]:
        """The first requests of one lane; of a heap only the very first, which costs nothing."""
        lane = self._online if online else self._offline
        if isinstance(lane, deque):
            return list(islice(lane, most))
        return [lane.peek_request()] if lane else []

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

"""Which instance serves a request and which role an instance has: interface and first policies.

The router and the simulator carry the same policies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple


class Role(str, Enum):
    """What an instance is given to do. A role is routing state: every instance can do all."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class RequestView(NamedTuple):
    """A request that has to be placed.

    Attributes:
        request_id: its id.
        online: whether it has SLOs.
        prompt_tokens: to be computed or found in a cache.
        ttft_ms: its SLO; infinite for offline requests.
        tpot_ms: its SLO; infinite for offline requests.
    """

    request_id: str
    online: bool
    prompt_tokens: int
    ttft_ms: float
    tpot_ms: float


class InstanceView(NamedTuple):
    """What is known of an instance.

    Attributes:
        instance_id: its id.
        role: what it is given to do.
        waiting: requests that wait there.
        running: requests that run there.
        waiting_tokens: tokens that are to be prefilled there.
        kv_used: the used share of its KV cache, 0..1.
        accepts: False while it drains or is lost.
    """

    instance_id: str
    role: Role
    waiting: int = 0
    running: int = 0
    waiting_tokens: int = 0
    kv_used: float = 0.0
    accepts: bool = True


class Route(NamedTuple):
    """Where a request goes.

    Attributes:
        prefill: the instance that computes its prompt.
        decode: the instance that generates; the same one unless KV is to be moved.
    """

    prefill: str
    decode: str


class RoutingPolicy(ABC):
    """The interface of kind ``service.routing``."""

    @abstractmethod
    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """Place one request; None to let it wait for an instance that accepts."""


class RolePolicy(ABC):
    """The interface of kind ``service.roles``."""

    @abstractmethod
    def roles(self, instances: Sequence[InstanceView], now_s: float) -> Mapping[str, Role]:
        """The role that each instance shall have, by id; those that may stay can be left out."""


class RoundRobin(RoutingPolicy):
    """Each instance in turn, prefill and decode apart."""

    def __init__(self) -> None:
        self._prefills = self._decodes = 0

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """See :class:`RoutingPolicy`."""
        return routed(instances, self._next_prefill, self._next_decode)

    def _next_prefill(self, among: Sequence[InstanceView]) -> InstanceView:
        self._prefills += 1
        return among[(self._prefills - 1) % len(among)]

    def _next_decode(self, among: Sequence[InstanceView]) -> InstanceView:
        self._decodes += 1
        return among[(self._decodes - 1) % len(among)]


class LeastLoaded(RoutingPolicy):
    """Fewest tokens to prefill, then fewest requests; generating goes where fewest requests are."""

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """See :class:`RoutingPolicy`."""
        return routed(
            instances,
            lambda among: min(among, key=lambda i: (i.waiting_tokens, i.waiting + i.running)),
            lambda among: min(among, key=lambda i: (i.waiting + i.running, i.kv_used)),
        )


def routed(
    instances: Sequence[InstanceView],
    pick_prefill: Callable[[Sequence[InstanceView]], InstanceView],
    pick_decode: Callable[[Sequence[InstanceView]], InstanceView],
) -> Route | None:
    """A route over those that accept, by their roles; None if nobody does.

    Args:
        instances: all of them.
        pick_prefill: who computes the prompt, of at least one; without one of the roles, whoever
            accepts.
        pick_decode: who generates, of at least one; asked where a prefill instance was picked.
    """
    accepting = [i for i in instances if i.accepts]
    if not accepting:
        return None
    prefill = pick_prefill([i for i in accepting if i.role is not Role.DECODE] or accepting)
    decodes = [i for i in accepting if i.role is not Role.PREFILL]
    if prefill.role is not Role.PREFILL or not decodes:
        return Route(prefill.instance_id, prefill.instance_id)
    return Route(prefill.instance_id, pick_decode(decodes).instance_id)

"""Which instance serves a request and which role an instance has: interface and first policies.

The router and the simulator carry the same policies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
        prefills, decodes = candidates(instances)
        if not prefills:
            return None
        prefill = prefills[self._prefills % len(prefills)]
        self._prefills += 1
        if prefill.role is not Role.PREFILL or not decodes:
            return Route(prefill.instance_id, prefill.instance_id)
        decode = decodes[self._decodes % len(decodes)]
        self._decodes += 1
        return Route(prefill.instance_id, decode.instance_id)


class LeastLoaded(RoutingPolicy):
    """Fewest tokens to prefill, then fewest requests; generating goes where fewest requests are."""

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """See :class:`RoutingPolicy`."""
        prefills, decodes = candidates(instances)
        if not prefills:
            return None
        prefill = min(prefills, key=lambda i: (i.waiting_tokens, i.waiting + i.running))
        if prefill.role is not Role.PREFILL or not decodes:
            return Route(prefill.instance_id, prefill.instance_id)
        decode = min(decodes, key=lambda i: (i.waiting + i.running, i.kv_used))
        return Route(prefill.instance_id, decode.instance_id)


def candidates(
    instances: Sequence[InstanceView],
) -> tuple[list[InstanceView], list[InstanceView]]:
    """Who may prefill and who may decode; without one of the roles, whoever accepts may."""
    accepting = [i for i in instances if i.accepts]
    prefills = [i for i in accepting if i.role is not Role.DECODE] or accepting
    decodes = [i for i in accepting if i.role is not Role.PREFILL]
    return prefills, decodes

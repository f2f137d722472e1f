"""Routing in three small parts: who may be picked, what each would cost, and how one is picked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from hashlib import blake2b

from xllm_scheduler.service.routing import (
    InstanceView,
    RequestView,
    Role,
    Route,
    RoutingPolicy,
)

Cost = Callable[[RequestView, InstanceView], float]
"""What a request costs on an instance; lower is better."""

Picker = Callable[[RequestView, Sequence[InstanceView], Cost], InstanceView]
"""Picks one of at least one."""


class Staged(RoutingPolicy):
    """Filters by role, then a picker over costs; prefill and decode each have their own.

    Args:
        prefill: what computing a prompt costs.
        decode: what generating costs.
        pick_prefill: picks who computes the prompt.
        pick_decode: picks who generates; asked only where a prefill instance was picked.
    """

    def __init__(
        self, prefill: Cost, decode: Cost, pick_prefill: Picker, pick_decode: Picker
    ) -> None:
        self._prefill, self._decode = prefill, decode
        self._pick_prefill, self._pick_decode = pick_prefill, pick_decode

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """See :class:`RoutingPolicy`."""
        accepting = [i for i in instances if i.accepts]
        if not accepting:
            return None
        # Without one of the roles, whoever accepts does both.
        prefills = [i for i in accepting if i.role is not Role.DECODE] or accepting
        prefill = self._pick_prefill(request, prefills, self._prefill)
        decodes = [i for i in accepting if i.role is not Role.PREFILL and i.transfers]
        if prefill.role is not Role.PREFILL or not prefill.transfers or not decodes:
            return Route(prefill.instance_id, prefill.instance_id)
        decode = self._pick_decode(request, decodes, self._decode)
        return Route(prefill.instance_id, decode.instance_id)


class Guarded(RoutingPolicy):
    """Another policy; where that raises, the least loaded instance, so that no request fails.

    Args:
        policy: the other one.
        failed: is told of each exception.
    """

    def __init__(self, policy: RoutingPolicy, failed: Callable[[Exception], None]) -> None:
        self._policy, self._failed = policy, failed
        self._instead = least_loaded()
        self.reads_cached = policy.reads_cached

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """See :class:`RoutingPolicy`."""
        try:
            return self._policy.route(request, instances, now_s)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's policy raises
            self._failed(error)
            return self._instead.route(request, instances, now_s)


class Turns:
    """Each in turn, whatever it costs."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(
        self, request: RequestView, among: Sequence[InstanceView], cost: Cost
    ) -> InstanceView:
        """See :data:`Picker`."""
        self._count += 1
        return among[(self._count - 1) % len(among)]


def cheapest(request: RequestView, among: Sequence[InstanceView], cost: Cost) -> InstanceView:
    """The one with the lowest cost, the first of equals."""
    return min(among, key=lambda instance: cost(request, instance))


class TwoChoices:
    """The cheaper of two at random, which several routers with old views do not all agree on.

    Source: Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001.
    """

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)  # noqa: S311 - not for secrets

    def __call__(
        self, request: RequestView, among: Sequence[InstanceView], cost: Cost
    ) -> InstanceView:
        """See :data:`Picker`."""
        two = among if len(among) < 3 else self._rng.sample(among, 2)
        return cheapest(request, two, cost)


def by_session(request: RequestView, among: Sequence[InstanceView], cost: Cost) -> InstanceView:
    """The same instance for a session as long as it is there, by rendezvous hashing.

    Requests without a session go to the cheapest.
    """
    if not request.session:
        return cheapest(request, among, cost)
    return max(among, key=lambda i: _rendezvous(request.session, i.instance_id))


def _rendezvous(session: str, instance: str) -> bytes:
    return blake2b(f"{instance}\0{session}".encode(), digest_size=8).digest()


def prompt_load(request: RequestView, instance: InstanceView) -> float:
    """Tokens to be prefilled; of equals, requests count."""
    return instance.waiting_tokens + (instance.waiting + instance.running) * 1e-4


def answer_load(request: RequestView, instance: InstanceView) -> float:
    """Requests; of equals, the used share of the KV cache counts."""
    return instance.waiting + instance.running + instance.kv_used * 0.5


def round_robin() -> Staged:
    """Each instance in turn, prefill and decode apart."""
    return Staged(prompt_load, answer_load, Turns(), Turns())


def least_loaded() -> Staged:
    """Fewest tokens to prefill, then fewest requests; generating goes where fewest requests are."""
    return Staged(prompt_load, answer_load, cheapest, cheapest)


def power_of_two(seed: int = 0) -> Staged:
    """The less loaded of two at random."""
    return Staged(prompt_load, answer_load, TwoChoices(seed), TwoChoices(seed + 1))


def session_affinity() -> Staged:
    """Each session at one instance."""
    return Staged(prompt_load, answer_load, by_session, by_session)

"""The first routing policies."""

from __future__ import annotations

import pytest

from xllm_scheduler.service.routing import (
    InstanceView,
    LeastLoaded,
    RequestView,
    Role,
    RoundRobin,
    Route,
    RoutingPolicy,
)

REQUEST = RequestView("r", True, 100, 1000.0, 50.0)
MIXED = [InstanceView(name, Role.MIXED) for name in ("a", "b")]
SPLIT = [
    InstanceView("p0", Role.PREFILL),
    InstanceView("p1", Role.PREFILL),
    InstanceView("d0", Role.DECODE),
    InstanceView("d1", Role.DECODE),
]


def routes(policy: RoutingPolicy, instances: list[InstanceView], count: int) -> list[Route | None]:
    return [policy.route(REQUEST, instances, 0.0) for _ in range(count)]


def test_round_robin_takes_turns() -> None:
    assert routes(RoundRobin(), MIXED, 3) == [Route("a", "a"), Route("b", "b"), Route("a", "a")]
    assert routes(RoundRobin(), SPLIT, 3) == [
        Route("p0", "d0"),
        Route("p1", "d1"),
        Route("p0", "d0"),
    ]


def test_least_loaded_counts_tokens_to_prefill_then_requests() -> None:
    instances = [
        InstanceView("a", Role.MIXED, waiting_tokens=900),
        InstanceView("b", Role.MIXED, waiting_tokens=10, running=9),
        InstanceView("c", Role.MIXED, waiting_tokens=10, running=8, waiting=2),
    ]
    assert routes(LeastLoaded(), instances, 1) == [Route("b", "b")]


def test_least_loaded_decodes_where_fewest_requests_are() -> None:
    instances = [
        InstanceView("p", Role.PREFILL),
        InstanceView("d0", Role.DECODE, running=3),
        InstanceView("d1", Role.DECODE, running=2, waiting=1, kv_used=0.1),
    ]
    assert routes(LeastLoaded(), [*instances[:2]], 1) == [Route("p", "d0")]
    busier = instances[1]._replace(kv_used=0.5)
    assert routes(LeastLoaded(), [instances[0], busier, instances[2]], 1) == [Route("p", "d1")]


@pytest.mark.parametrize("policy", [RoundRobin, LeastLoaded])
def test_what_does_not_accept_gets_nothing(policy: type[RoutingPolicy]) -> None:
    gone = [i._replace(accepts=False) for i in MIXED]
    assert routes(policy(), gone, 1) == [None]
    assert routes(policy(), [gone[0], MIXED[1]], 1) == [Route("b", "b")]


@pytest.mark.parametrize("policy", [RoundRobin, LeastLoaded])
def test_an_instance_left_alone_does_both(policy: type[RoutingPolicy]) -> None:
    for role in (Role.PREFILL, Role.DECODE):
        assert routes(policy(), [InstanceView("x", role)], 1) == [Route("x", "x")]

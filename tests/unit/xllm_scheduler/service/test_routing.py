"""Routing in parts: who may be picked, what it costs, who is picked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from xllm_plugins.manager import registry
from xllm_scheduler.service.config import ROUTING_KIND, RouterSection, routing_of
from xllm_scheduler.service.routing import (
    InstanceView,
    RequestView,
    Role,
    Route,
    RoutingPolicy,
)
from xllm_scheduler.service.staged import (
    Guarded,
    least_loaded,
    power_of_two,
    round_robin,
    session_affinity,
)

REQUEST = RequestView("r", True, 100, 1000.0, 50.0)
MIXED = [InstanceView(name, Role.MIXED) for name in ("a", "b")]
SPLIT = [
    InstanceView("p0", Role.PREFILL),
    InstanceView("p1", Role.PREFILL),
    InstanceView("d0", Role.DECODE),
    InstanceView("d1", Role.DECODE),
]
NAMES = ("round_robin", "least_loaded", "power_of_two", "session", "kv_aware", "slo_aware")


def made(name: str) -> RoutingPolicy:
    return routing_of(RouterSection(routing=name))


def routes(
    policy: RoutingPolicy, instances: list[InstanceView], count: int = 1
) -> list[Route | None]:
    return [policy.route(REQUEST, instances, 0.0) for _ in range(count)]


def test_round_robin_takes_turns() -> None:
    assert routes(round_robin(), MIXED, 3) == [Route("a", "a"), Route("b", "b"), Route("a", "a")]
    assert routes(round_robin(), SPLIT, 3) == [
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
    assert routes(least_loaded(), instances) == [Route("b", "b")]


def test_least_loaded_decodes_where_fewest_requests_are() -> None:
    instances = [
        InstanceView("p", Role.PREFILL),
        InstanceView("d0", Role.DECODE, running=3),
        InstanceView("d1", Role.DECODE, running=2, waiting=1, kv_used=0.1),
    ]
    assert routes(least_loaded(), [*instances[:2]]) == [Route("p", "d0")]
    busier = instances[1]._replace(kv_used=0.5)
    assert routes(least_loaded(), [instances[0], busier, instances[2]]) == [Route("p", "d1")]


def test_power_of_two_never_takes_the_worst_and_spreads_over_the_rest() -> None:
    instances = [InstanceView(f"i{n}", Role.MIXED, waiting_tokens=n) for n in range(4)]
    found = Counter(route.prefill for route in routes(power_of_two(), instances, 400) if route)
    assert set(found) == {"i0", "i1", "i2"}
    assert found["i0"] > found["i1"] > found["i2"] > 20


def test_a_session_stays_and_moves_only_if_its_instance_goes() -> None:
    instances = [InstanceView(f"i{n}", Role.MIXED) for n in range(5)]
    policy = session_affinity()

    def at(session: str, among: list[InstanceView]) -> str:
        route = policy.route(REQUEST._replace(session=session), among, 0.0)
        assert route is not None
        return route.prefill

    before = {f"s{n}": at(f"s{n}", instances) for n in range(200)}
    assert len(set(before.values())) == 5
    after = {session: at(session, instances[1:]) for session in before}
    moved = [s for s in before if before[s] != after[s]]
    assert moved == [s for s in before if before[s] == "i0"]


def test_a_policy_that_raises_costs_no_request() -> None:
    class Broken(RoutingPolicy):
        reads_cached = True

        def route(
            self, request: RequestView, instances: Sequence[InstanceView], now_s: float
        ) -> Route | None:
            raise ZeroDivisionError

    told: list[Exception] = []
    guarded = Guarded(Broken(), told.append)
    assert routes(guarded, [MIXED[0]._replace(waiting_tokens=5), MIXED[1]]) == [Route("b", "b")]
    assert [type(error) for error in told] == [ZeroDivisionError]
    assert guarded.reads_cached


def test_all_names_are_offered() -> None:
    offered = {name for name in NAMES if registry().policy(ROUTING_KIND, name)}
    assert offered == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_accept_gets_nothing(name: str) -> None:
    gone = [i._replace(accepts=False) for i in MIXED]
    assert routes(made(name), gone) == [None]
    (route,) = routes(made(name), [gone[0], MIXED[1]])
    assert route is not None
    assert (route.prefill, route.decode) == ("b", "b")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_an_instance_left_alone_does_both(name: str, role: Role) -> None:
    (route,) = routes(made(name), [InstanceView("x", role)])
    assert route is not None
    assert (route.prefill, route.decode) == ("x", "x")

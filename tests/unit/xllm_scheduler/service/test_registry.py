"""Who is there and whether they are well; circuit breakers and waiting times."""

from __future__ import annotations

import random

import pytest

from xllm_plugins.errors import ConfigError
from xllm_scheduler.service.breaker import Backoff, Breaker, Circuit
from xllm_scheduler.service.registry import Health, Record, Registry
from xllm_scheduler.service.routing import Role

A = Record("a", "http://a:8000", ("m",), incarnation="1")


def health(registry: Registry) -> Health:
    return registry.members["a"].health


def test_an_instance_without_lease_serves_while_it_is_heard_of() -> None:
    registry = Registry()
    registry.joined(A, 0.0)
    assert registry.lease_lost("a", "1", 1.0)
    assert health(registry) is Health.UNLEASED
    assert registry.members["a"].accepts
    for now_s in (3.0, 5.0, 7.0):
        assert registry.heard("a", "1", now_s)
        assert registry.tick(now_s) == []
    assert health(registry) is Health.UNLEASED
    registry.joined(A, 8.0)
    assert health(registry) is Health.READY


def test_one_that_is_silent_is_suspect_then_gone() -> None:
    registry = Registry()
    registry.joined(A, 0.0)
    registry.lease_lost("a", "1", 1.0)
    registry.tick(4.5)
    assert health(registry) is Health.SUSPECT
    assert not registry.members["a"].accepts
    assert registry.tick(19.0) == []
    assert registry.tick(20.0) == ["a"]
    assert registry.members == {}


def test_a_suspect_that_answers_serves_again() -> None:
    registry = Registry()
    registry.joined(A, 0.0)
    registry.failed("a", 1.0)
    assert health(registry) is Health.SUSPECT
    registry.heard("a", "1", 2.0)
    assert health(registry) is Health.READY
    registry.lease_lost("a", "1", 3.0)
    registry.failed("a", 4.0)
    registry.heard("a", "1", 5.0)
    assert health(registry) is Health.UNLEASED
    assert registry.tick(20.0) == []  # it is suspect again, and has fifteen seconds anew
    assert health(registry) is Health.SUSPECT


def test_another_incarnation_is_another_instance() -> None:
    registry = Registry()
    assert registry.joined(A, 0.0) == ""
    assert registry.joined(A, 1.0) == ""
    registry.members["a"].draining = True
    newer = Record("a", "http://a:8000", ("m",), Role.PREFILL, "2")
    assert registry.joined(newer, 2.0) == "a"
    assert not registry.members["a"].draining
    assert registry.members["a"].role is Role.PREFILL
    assert not registry.heard("a", "1", 3.0)
    assert not registry.lease_lost("a", "1", 3.0)  # of the earlier one, told late


def test_a_record_travels_as_json() -> None:
    assert Record.parsed(A.document()) == Record.parsed(Record.parsed(A.document()).document())
    assert Record.parsed({**A.document(), "of a newer version": 1}).name == "a"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], r"is \[\]; allowed is an object"),
        ({"url": "http://a"}, "name None; allowed is a text"),
        ({"name": "a", "url": "a:8000"}, "url 'a:8000'; allowed is http"),
        ({"name": "a", "url": "http://a", "role": "boss"}, "role 'boss'; allowed are prefill"),
    ],
)
def test_a_record_that_cannot_be_is_refused(document: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Record.parsed(document)


def test_a_circuit_opens_tries_and_closes() -> None:
    breaker = Breaker(failures=3, successes=2, window_s=10.0, open_s=5.0)
    for now_s in (0.0, 1.0, 20.0, 21.0):
        breaker.failed(now_s)
    assert breaker.state(21.0) is Circuit.CLOSED  # never three within ten seconds
    breaker.failed(22.0)
    assert breaker.state(22.0) is Circuit.OPEN
    assert not breaker.passes(26.9)
    assert breaker.passes(27.0)
    breaker.sent(27.0)
    assert not breaker.passes(27.1)  # one at a time
    breaker.failed(27.2)
    assert breaker.state(28.0) is Circuit.OPEN
    for now_s in (33.0, 34.0):
        assert breaker.passes(now_s)
        breaker.sent(now_s)
        breaker.succeeded(now_s)
    assert breaker.state(34.0) is Circuit.CLOSED


def test_waiting_grows_to_its_bound_and_is_not_the_same_for_all() -> None:
    backoff = Backoff(first_s=0.1, factor=2.0, most_s=1.0, jitter=0.5)
    rng = random.Random(0)
    for attempt, longest in ((1, 0.1), (2, 0.2), (3, 0.4), (9, 1.0)):
        delays = [backoff.delay_s(attempt, rng) for _ in range(200)]
        assert longest / 2 <= min(delays) < max(delays) <= longest

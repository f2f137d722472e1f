"""Offline requests go where there is room."""

from __future__ import annotations

from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.routing import InstanceView, RequestView, Role
from xllm_scheduler.service.slack import room
from xllm_scheduler.service.staged import least_loaded

PACED = InstanceView("a", Role.MIXED, pace_ms=50.0)
PLAIN = InstanceView("b", Role.MIXED)


def test_an_engine_that_looks_after_online_requests_is_kept_from_idling() -> None:
    assert room(PACED, 16) == 16
    assert room(PACED._replace(waiting=9, running=200, offline=150), 16) == 7
    assert room(PACED._replace(waiting=40), 16) == 0


def test_another_one_gets_a_few_while_no_online_request_waits() -> None:
    assert room(PLAIN, 16) == 4
    assert room(PLAIN._replace(waiting=2, offline=3), 16) == 1
    assert room(PLAIN._replace(waiting=3, offline=2), 16) == 0
    assert room(PLAIN, 1) == 1


def test_one_that_accepts_nothing_has_no_room() -> None:
    assert room(PACED._replace(accepts=False), 16) == 0
    assert room(PLAIN._replace(accepts=False), 16) == 0


def test_offline_requests_wait_for_room_and_online_ones_do_not() -> None:
    fleet = Fleet(least_loaded(), most_offline=4)
    fleet.join(Record("a", "http://a", ("m",)), 0.0)
    placed = [fleet.place(RequestView(f"{n}", False, 10), 0.0) for n in range(2)]
    assert [route is not None for route in placed] == [True, False]
    assert fleet.place(RequestView("online", True, 10), 0.0) is not None
    fleet.finished(RequestView("0", False, 10), 5, 1.0)
    assert fleet.place(RequestView("late", False, 10), 1.0) is None  # an online one waits there
    fleet.first_token("online")
    assert fleet.place(RequestView("late", False, 10), 1.0) is not None

"""The queue with two lanes, held against vLLM's own queues, which it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import Request

from xllm_scheduler.engine.queues import ClassQueue, DeadlineLane

pytestmark = pytest.mark.vllm
POLICIES = (SchedulingPolicy.FCFS, SchedulingPolicy.PRIORITY)


def request(name: str, priority: int = 0, arrival: float = 0.0) -> Request:
    """A request whose name begins with ``on`` is online."""
    return Request(
        request_id=name,
        prompt_token_ids=[1, 2, 3],
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        arrival_time=arrival,
        priority=priority,
    )


def lanes(policy: SchedulingPolicy = SchedulingPolicy.FCFS) -> ClassQueue:
    online, offline = create_request_queue(policy), create_request_queue(policy)
    return ClassQueue(online, offline, lambda r: bool(r.request_id.startswith("on")))


def filled(*names: str, policy: SchedulingPolicy = SchedulingPolicy.FCFS) -> ClassQueue:
    queue = lanes(policy)
    for arrival, name in enumerate(names):
        queue.add_request(request(name, arrival=float(arrival)))
    return queue


def names(queue: Any) -> list[str]:
    return [r.request_id for r in queue]


def drained(queue: Any) -> list[str]:
    found = []
    while queue:
        head = queue.peek_request()
        assert queue.pop_request() is head
        found.append(head.request_id)
    return found


@pytest.mark.parametrize("policy", POLICIES)
def test_online_comes_before_offline_and_each_keeps_its_order(policy: SchedulingPolicy) -> None:
    order = ["on1", "on2", "off1", "off2"]
    queue = filled("off1", "on1", "off2", "on2", policy=policy)
    assert names(queue) == order
    assert drained(queue) == order


def test_priorities_order_each_lane_but_never_lift_offline_over_online() -> None:
    queue = lanes(SchedulingPolicy.PRIORITY)
    for name, priority in (("off-low", 9), ("on-low", 8), ("off-high", 0), ("on-high", 1)):
        queue.add_request(request(name, priority))
    assert drained(queue) == ["on-high", "on-low", "off-high", "off-low"]


Change = Callable[[Any, dict[str, Request]], None]
CHANGES: dict[str, Change] = {
    "add": lambda queue, r: queue.add_request(r["new"]),
    "pop": lambda queue, r: queue.pop_request(),
    "prepend": lambda queue, r: queue.prepend_request(r["new"]),
    "prepend several": lambda queue, r: queue.prepend_requests([r["new"], r["newer"]]),
    "prepend a queue": lambda queue, r: queue.prepend_requests(_own(r["new"], r["newer"])),
    "remove": lambda queue, r: queue.remove_request(r["b"]),
    "remove several": lambda queue, r: queue.remove_requests({r["a"], r["c"]}),
    "remove a list": lambda queue, r: queue.remove_requests([r["c"]]),
    "remove none": lambda queue, r: queue.remove_requests([]),
}


def _own(*requests: Request, policy: SchedulingPolicy = SchedulingPolicy.FCFS) -> Any:
    queue = create_request_queue(policy)
    for one in requests:
        queue.add_request(one)
    return queue


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("prefix", ["on", "off"])
@pytest.mark.parametrize("change", CHANGES)
def test_with_one_class_alone_it_is_vllms_own_queue(
    policy: SchedulingPolicy, prefix: str, change: str
) -> None:
    requests = {
        key: request(f"{prefix}-{key}", priority=len(key), arrival=float(arrival))
        for arrival, key in enumerate(("a", "b", "c", "new", "newer"))
    }
    ours, theirs = lanes(policy), create_request_queue(policy)
    for queue in (ours, theirs):
        for key in "abc":
            queue.add_request(requests[key])
        CHANGES[change](queue, requests)
    assert (len(ours), bool(ours)) == (len(theirs), bool(theirs))
    assert names(ours) == names(theirs)
    assert drained(ours) == drained(theirs)


def test_requests_put_back_together_return_to_their_lanes_as_extendleft_does() -> None:
    queue = filled("on1", "off1")
    queue.prepend_requests([request(n) for n in ("on2", "off2", "on3", "off3")])
    assert names(queue) == ["on3", "on2", "on1", "off3", "off2", "off1"]


def test_requests_of_both_classes_are_removed_together() -> None:
    queue = filled("on1", "off1", "on2", "off2")
    everything = {r.request_id: r for r in queue}
    queue.remove_requests([everything["on1"], everything["off2"]])
    queue.remove_request(everything["off1"])
    assert names(queue) == ["on2"]


def test_a_closed_gate_gives_out_online_requests_only() -> None:
    queue = filled("on1", "off1", "off2")
    queue.offline_open = False
    assert drained(queue) == ["on1"]
    with pytest.raises(IndexError):
        queue.pop_request()
    with pytest.raises(IndexError):
        queue.peek_request()
    queue.offline_open = True
    assert drained(queue) == ["off1", "off2"]


def test_behind_a_closed_gate_requests_still_count_and_come_and_go() -> None:
    queue = filled("off1")
    queue.offline_open = False
    late, early = request("off2"), request("off0")
    queue.add_request(late)
    queue.prepend_request(early)
    assert (bool(queue), len(queue)) == (False, 3)
    assert names(queue) == ["off0", "off1", "off2"], "an abort must find them"
    queue.remove_requests({late})
    assert [queue.count(online=True), queue.count(online=False)] == [0, 2]


def test_an_empty_queue_is_false_and_has_no_head() -> None:
    queue = lanes()
    assert (bool(queue), len(queue), queue.head(True, 4), queue.head(False, 4)) == (
        False,
        0,
        [],
        [],
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_the_heads_of_the_lanes_can_be_looked_at(policy: SchedulingPolicy) -> None:
    queue = filled("off1", "on1", "on2", "off2", "on3", "off3", policy=policy)
    assert names(queue.head(True, 2)) == ["on1", "on2"]
    assert names(queue.head(False, 2)) == ["off1", "off2"]
    assert queue.head(True, 0) == []
    assert queue[0].request_id == "on1"
    assert len(queue) == 6


def lane(*names: str, now_s: float = 0.0) -> DeadlineLane:
    """A lane of requests that are due at the number in their names."""
    found = DeadlineLane(lambda r: float(r.request_id.split("-")[0]))
    found.turn(now_s)
    for name in names:
        found.add_request(request(name))
    return found


def test_a_deadline_lane_gives_out_the_earliest_deadline_first() -> None:
    queue = lane("30-a", "10-a", "20-a", "10-b")
    assert names(queue) == ["10-a", "10-b", "20-a", "30-a"], "equals keep their order"
    assert drained(queue) == ["10-a", "10-b", "20-a", "30-a"]


def test_requests_that_are_late_step_back_behind_all_that_are_not() -> None:
    queue = lane("10-a", "20-a", "30-a", "40-a")
    queue.turn(25.0)
    assert names(queue) == ["30-a", "40-a", "10-a", "20-a"]
    queue.add_request(request("5-new"))
    queue.add_request(request("26-new"))
    assert names(queue) == ["26-new", "30-a", "40-a", "5-new", "10-a", "20-a"]


def test_every_fourth_admission_is_of_one_that_is_late() -> None:
    queue = lane("1-a", "2-a", "3-a", *(f"{due}-t" for due in range(50, 57)), now_s=25.0)
    timely = [f"{due}-t" for due in range(50, 57)]
    assert drained(queue) == [*timely[:3], "1-a", *timely[3:6], "2-a", *timely[6:], "3-a"]


def test_whoever_is_due_now_is_not_late_yet() -> None:
    queue = lane("25-a", "30-a")
    queue.turn(25.0)
    assert names(queue) == ["25-a", "30-a"]


def test_requests_are_taken_out_of_a_deadline_lane_late_or_not() -> None:
    queue = lane("1-a", "2-a", "30-a", "40-a", now_s=25.0)
    everything = {r.request_id: r for r in queue}
    queue.remove_request(everything["1-a"])
    queue.remove_requests({everything["40-a"]})
    queue.remove_requests([request("30-a")])
    assert names(queue) == ["30-a", "2-a"], "only those that are in it"


def test_what_is_put_back_into_a_deadline_lane_comes_before_its_equals_only() -> None:
    queue = lane("10-a", "20-a", "30-a")
    queue.prepend_request(request("20-b"))
    queue.prepend_requests([request("20-c"), request("5-b")])
    assert names(queue) == ["5-b", "10-a", "20-c", "20-b", "20-a", "30-a"]


def test_a_deadline_lane_is_counted_and_looked_at() -> None:
    queue = lane("10-a", "20-a", "30-a")
    queue.turn(15.0)
    assert (bool(queue), len(queue)) == (True, 3)
    assert names(queue) == ["20-a", "30-a", "10-a"]
    queue.turn(99.0)
    assert (bool(queue), len(queue)) == (True, 3)
    assert drained(queue) == ["10-a", "20-a", "30-a"]
    assert (bool(queue), len(queue)) == (False, 0)
    with pytest.raises(IndexError):
        queue.peek_request()


def test_a_class_queue_tells_its_deadline_lane_the_time() -> None:
    online, offline = lane("10-a", "20-a"), create_request_queue(SchedulingPolicy.FCFS)
    queue = ClassQueue(online, offline, lambda r: True)
    queue.turn(15.0)
    assert names(queue.head(online=True, most=1)) == ["20-a"]
    assert queue.peek_request().request_id == "20-a"

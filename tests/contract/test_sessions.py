"""Each part of a streaming session is a request with SLOs of its own."""

from __future__ import annotations

import pytest
from vllm.v1.request import Request

from tests.contract.engine import BOTH, Clock, Engine, build, request
from xllm_scheduler.engine.scheduler import elastic_class

pytestmark = pytest.mark.vllm


def _session_part(tokens: int, now_s: float, ttft_ms: float, *, more: bool = True) -> Request:
    xargs = {"xllm_ttft_ms": ttft_ms}
    return request(
        "session", [4] * tokens, max_tokens=3, xargs=xargs, arrival_s=now_s, resumable=more
    )


@BOTH
def test_each_part_of_a_streaming_session_has_slos_of_its_own(base: type, clock: Clock) -> None:
    engine = Engine(build(elastic_class(base)), clock)
    engine.add(_session_part(9, clock.now_s, 500.0))
    session = engine.scheduler.requests["session"]
    while session.status.name != "WAITING_FOR_STREAMING_REQ":
        engine.step()
    clock.now_s += 7.0
    began_s = clock.now_s
    engine.scheduler.add_request(_session_part(5, began_s, 800.0))
    assert session.xllm.arrival_s == pytest.approx(began_s)
    assert session.xllm.first_due_s == pytest.approx(began_s + 0.8)
    assert session.xllm.first_token_s is None
    given = len(engine.streams["session"])
    while len(engine.streams["session"]) == given:
        engine.step()
    assert session.xllm.first_token_s == engine.times_s["session"][given]
    while session.status.name != "WAITING_FOR_STREAMING_REQ":
        engine.step()
    engine.abort("session")
    engine.run()
    assert not engine.scheduler._first_token_pending


@BOTH
@pytest.mark.parametrize("more", [True, False], ids=["another part", "the end"])
def test_what_comes_during_a_part_of_a_session_changes_nothing_for_that_part(
    more: bool, base: type, clock: Clock
) -> None:
    engine = Engine(build(elastic_class(base)), clock)
    engine.add(_session_part(9, clock.now_s, 500.0))
    session = engine.scheduler.requests["session"]
    while not engine.streams["session"]:
        engine.step()
    first_token_s = session.xllm.first_token_s
    engine.scheduler.add_request(_session_part(1, clock.now_s, 800.0, more=more))
    assert session.xllm.first_token_s == first_token_s


@BOTH
def test_the_end_of_a_session_is_no_request(base: type, clock: Clock) -> None:
    engine = Engine(build(elastic_class(base)), clock)
    engine.add(_session_part(9, clock.now_s, 500.0))
    session = engine.scheduler.requests["session"]
    while session.status.name != "WAITING_FOR_STREAMING_REQ":
        engine.step()
    engine.scheduler.add_request(_session_part(1, clock.now_s, 500.0, more=False))
    samples = engine.scheduler.xllm_report().samples
    assert [s.value for s in samples if s.name == "scheduler_requests"] == [1, 0]

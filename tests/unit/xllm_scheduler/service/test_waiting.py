"""Waiting for a while loses neither a result nor a cancellation."""

from __future__ import annotations

import asyncio

import pytest

from xllm_scheduler.service.waiting import done_within, kept_up


async def test_whether_it_ended_in_time() -> None:
    event = asyncio.Event()
    assert not await done_within(0.01, event.wait())
    event.set()
    assert await done_within(10.0, event.wait())


async def test_what_it_raises_is_raised() -> None:
    async def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await done_within(10.0, fails())


async def test_what_comes_too_late_has_ended_when_it_returns() -> None:
    ended: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("slow")

    assert not await done_within(0.01, slow())
    assert ended == ["slow"]


async def test_a_cancellation_in_the_moment_of_the_end_is_not_lost() -> None:
    """With ``asyncio.wait_for`` of Python 3.11 this task goes round for ever."""
    event = asyncio.Event()

    async def rounds() -> None:
        while True:
            event.clear()
            await done_within(10.0, event.wait())

    task = asyncio.create_task(rounds())
    for hops in range(6):
        await asyncio.sleep(0.001)
        event.set()
        for _ in range(hops):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,), timeout=60.0)
        assert task.cancelled(), hops
        task = asyncio.create_task(rounds())
    task.cancel()


async def test_what_fails_is_begun_again_and_a_cancellation_ends_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xllm_scheduler.service.waiting._AGAIN_S", 0.0)
    begun: list[int] = []

    async def work() -> None:
        begun.append(1)
        if len(begun) < 3:
            raise KeyError("gone")
        await asyncio.Event().wait()

    task = asyncio.create_task(kept_up("the work", work))
    while len(begun) < 3:
        await asyncio.sleep(0)
    assert caplog.text.count("the work failed and begins again") == 2
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

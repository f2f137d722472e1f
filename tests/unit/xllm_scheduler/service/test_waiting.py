"""Waiting for a while loses neither a result nor a cancellation."""

from __future__ import annotations

import asyncio

import pytest

from xllm_scheduler.service.waiting import done_within


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
        await asyncio.wait((task,), timeout=1.0)
        assert task.cancelled(), hops
        task = asyncio.create_task(rounds())
    task.cancel()

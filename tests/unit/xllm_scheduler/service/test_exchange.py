"""What is done for a client ends when the client goes, and not when anything else happens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from xllm_scheduler.service.exchange import Exchange, Message, unless_gone


class Client:
    """The server's side of ASGI.

    Attributes:
        sent: to the client.
        goes: is set when it goes, and by the end of the answer, as uvicorn has it.
    """

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.goes = asyncio.Event()
        scope = {"method": "POST", "path": "/", "headers": []}
        self.exchange = Exchange(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        await self.goes.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message["more_body"]:
            self.goes.set()


async def test_what_ends_is_done() -> None:
    client = Client()

    async def work() -> None:
        await client.exchange.start(200, [])
        await client.exchange.end(b"x")
        await asyncio.sleep(0.01)  # the end of the answer is no leave

    assert await unless_gone(client.exchange, work())
    assert client.sent[-1]["body"] == b"x"
    assert not client.exchange.left


async def test_who_goes_ends_it() -> None:
    client = Client()
    ended: list[Any] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("work")

    asyncio.get_running_loop().call_later(0.01, client.goes.set)
    assert not await unless_gone(client.exchange, work())
    assert ended == ["work"]
    await asyncio.sleep(0)  # no cancellation is left over


async def test_what_it_raises_is_raised() -> None:
    async def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await unless_gone(Client().exchange, work())


async def test_another_cancellation_is_passed_on() -> None:
    serving = asyncio.ensure_future(unless_gone(Client().exchange, asyncio.sleep(60)))
    await asyncio.sleep(0.01)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert serving.cancelled()

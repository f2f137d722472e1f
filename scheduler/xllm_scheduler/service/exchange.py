"""One HTTP exchange with a client, in ASGI's own terms: what a relay needs and no more."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from xllm_scheduler.service.errors import ApiError, too_large

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

_JSON = (b"content-type", b"application/json")


class ClientGoneError(Exception):
    """The client has closed its connection; there is nobody to answer."""


class Exchange:
    """A request of a client and the answer to it.

    Args:
        scope, receive, send: ASGI's.

    Attributes:
        method: of HTTP.
        path: of the URL.
        headers: by name in lower case; of several of a name the last.
        started: whether the answer has begun.
        ended: whether all of it was sent.
        left: whether the client has gone before that.
    """

    def __init__(self, scope: Message, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope.get("query_string", b"")
        self.raw_headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.headers: dict[str, str] = {
            k.decode("latin-1"): v.decode("latin-1") for k, v in self.raw_headers
        }
        self.started = self.ended = self.left = False
        self._receive, self._send = receive, send

    async def body(self, limit: int) -> bytes:
        """The whole body.

        Raises:
            ApiError: it is longer than ``limit`` bytes.
            ClientGoneError: as it says.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_large(limit)
            if part:
                parts.append(part)
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def gone(self) -> None:
        """Return when the client has gone."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Headers) -> None:
        """Begin the answer."""
        self.started = True
        await self._sent(
            {"type": "http.response.start", "status": status, "headers": list(headers)}
        )

    async def write(self, data: bytes) -> None:
        """Send a part of it."""
        await self._sent({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Send the last part."""
        self.ended = True
        await self._sent({"type": "http.response.body", "body": data, "more_body": False})

    async def _sent(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError as error:
            raise ClientGoneError from error

    async def fail(self, error: ApiError) -> None:
        """Answer with an error; within an answer that has begun, as its last event."""
        if self.started:
            await self.end(error.event())
            return
        more = [(name.encode(), value.encode()) for name, value in error.headers.items()]
        await self.start(error.status, [_JSON, *more])
        await self.end(error.body())


async def unless_gone(exchange: Exchange, work: Awaitable[None]) -> bool:
    """Do something unless, or until, the client goes.

    Returns:
        Whether it was done to its end.
    """
    doing = asyncio.current_task()
    assert doing is not None
    watching = asyncio.ensure_future(_cancel_if_gone(exchange, doing))
    try:
        await work
    except asyncio.CancelledError:
        if not exchange.left:
            raise
        if sys.version_info >= (3, 11):
            doing.uncancel()
        return False
    finally:
        watching.cancel()
    return True


async def _cancel_if_gone(exchange: Exchange, doing: asyncio.Task[Any]) -> None:
    await exchange.gone()
    if not exchange.ended:
        exchange.left = True
        doing.cancel()


class Collected(Exchange):
    """An exchange without a client: the answer is kept.

    Args:
        path: where the request goes.
        body: of the request.

    Attributes:
        status: of the answer; 0 before it.
        answer: its body.
    """

    def __init__(self, path: str, body: bytes) -> None:
        self._body = body
        self.status, self.answer = 0, b""
        scope: Message = {"method": "POST", "path": path, "headers": [_JSON]}
        super().__init__(scope, self._nothing, self._kept)

    async def body(self, limit: int) -> bytes:
        """See :class:`Exchange`."""
        return self._body

    async def _nothing(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def _kept(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.answer += message["body"]

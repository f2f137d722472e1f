"""One connection to an instance: HTTP/1.1's POST and its answer, and no more of it.

All that generates passes here, so there are few steps. An answer's bytes are given on as they come,
and while too many wait to be taken no more are read.
"""

from __future__ import annotations

import asyncio
from typing import cast

import httptools

_MOST_HELD = 1 << 17  # bytes


class Connection(asyncio.Protocol):
    """One connection, and the answer that is on it. What begins with ``on_`` is httptools'.

    Args:
        url: of the instance.

    Attributes:
        url: as it says.
        status: of the answer; 0 before its head has come.
        headers: of the answer, names in lower case.
        heard: whether anything of an answer has come.
        idle_since_s: when it was last given back, by the loop's clock.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.heard = False
        self.idle_since_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._lost: ConnectionError | None = None
        self._parts: list[bytes] = []  # of the body, still to be taken
        self._held = 0  # their bytes
        self._whole = self._keeps = True

    @property
    def usable(self) -> bool:
        """Whether it can take a request: nothing is to come, and the other end has not closed."""
        if self._transport is None or self._lost is not None or self._transport.is_closing():
            return False
        return self._whole and self._keeps and not self._parts

    async def ask(self, request: bytes) -> None:
        """Send a request; returns when the head of its answer has come.

        Raises:
            ConnectionError: it does not come.
        """
        if self._transport is None or not self.usable:
            raise self._lost or ConnectionError("it closed the connection")
        self.status, self.heard, self._whole = 0, False, False
        try:
            self._transport.write(request)
            while not self.status:
                await self._more()
        except BaseException:
            self.close()
            raise

    async def part(self) -> bytes:
        """What has come of the answer's body, as soon as something has; empty at its end.

        Raises:
            ConnectionError: the rest does not come.
        """
        while not self._parts:
            if self._whole:
                return b""
            await self._more()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        if self._held > _MOST_HELD and self._transport is not None:
            self._transport.resume_reading()
        self._held = 0
        return data

    async def body(self) -> bytes:
        """The whole body; raises as :meth:`part` does."""
        parts = []
        while data := await self.part():
            parts.append(data)
        return b"".join(parts)

    def close(self) -> None:
        """Break it off, by which an instance knows to give up what it was asked."""
        if self._transport is not None:
            self._transport.abort()

    async def _more(self) -> None:
        if self._lost is not None:
            raise self._lost
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See :class:`asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        self.heard = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._lost = ConnectionError(f"what came is not HTTP's: {error}")
            self.close()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        sized = {b"content-length", b"transfer-encoding"} & {name for name, _ in self.headers}
        if self.status and not sized and error is None:
            self._whole = True  # such an answer ends where its connection does
        self._lost = self._lost or ConnectionError(str(error or "it closed the connection"))
        self._wake()

    def on_message_begin(self) -> None:
        """An answer begins."""
        if self._whole:
            raise ConnectionError("nothing was asked")
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its headers."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Its head is there."""
        status = self._parser.get_status_code()
        self.status = status if status >= 200 else 0  # an answer may follow 100, Continue
        self._keeps = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        """A part of its body."""
        self._parts.append(data)
        self._held += len(data)
        if self._held > _MOST_HELD and self._transport is not None:
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """It ends."""
        self._whole = self.status > 0

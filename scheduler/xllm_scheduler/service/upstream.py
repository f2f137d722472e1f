"""The connections to all instances, kept from one request to the next."""

from __future__ import annotations

import asyncio
import functools
import ssl
from collections import defaultdict, deque
from typing import NamedTuple
from urllib.parse import urlsplit

from xllm_scheduler.service.connection import Connection
from xllm_scheduler.service.waiting import done_within

_CONNECT_S = 5.0
_IDLE_S = 30.0


class Origin(NamedTuple):
    """Where an instance is.

    Attributes:
        host: to connect to.
        port: likewise.
        tls: whether to speak TLS.
        name: what the header ``host`` says.
        prefix: of all paths.
    """

    host: str
    port: int
    tls: bool
    name: bytes
    prefix: bytes


@functools.lru_cache(maxsize=1024)
def origin_of(url: str) -> Origin:
    """Where a URL leads.

    Raises:
        ConnectionError: nowhere.
    """
    try:
        parts = urlsplit(url)
        tls, host = parts.scheme == "https", (parts.hostname or "").encode("idna").decode()
        name, prefix = parts.netloc.rpartition("@")[2].encode("ascii"), parts.path.encode("ascii")
        port = parts.port or (443 if tls else 80)
    except ValueError as error:
        raise ConnectionError(f"{url!r} is no address: {error}") from error
    if not host:
        raise ConnectionError(f"{url!r} names no host")
    return Origin(host, port, tls, name, prefix.rstrip(b"/"))


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class Upstream:
    """The connections to all instances."""

    def __init__(self) -> None:
        self._idle: defaultdict[str, deque[Connection]] = defaultdict(deque)  # by URL
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(_IDLE_S, self._sweep)

    async def post(self, url: str, path: str, headers: bytes, body: bytes) -> Connection:
        """Send a request; returns when the head of its answer has come.

        Args:
            url: of the instance.
            path: with the query.
            headers: lines, beside those of host and length.
            body: of the request.

        Returns:
            To be given back by :meth:`release`.

        Raises:
            OSError: no answer comes.
        """
        origin = origin_of(url)
        target = origin.prefix + path.encode("latin-1")
        request = b"POST %b HTTP/1.1\r\nhost: %b\r\ncontent-length: %d\r\n%b\r\n%b" % (
            target, origin.name, len(body), headers, body)  # fmt: skip
        connection = self._kept(url)
        if connection is not None:
            try:
                await connection.ask(request)
                return connection
            except ConnectionError:
                if connection.heard:
                    raise
                # It was closed for having idled while the request was on its way.
        connection = await self._opened(url, origin)
        await connection.ask(request)
        return connection

    def release(self, connection: Connection) -> None:
        """Keep a connection for the next request, or close it if its answer was not read whole."""
        if not connection.usable:
            connection.close()
            return
        connection.idle_since_s = self._loop.time()
        self._idle[connection.url].append(connection)

    def close(self) -> None:
        """Close those that idle."""
        self._timer.cancel()
        for kept in self._idle.values():
            for connection in kept:
                connection.close()

    def _kept(self, url: str) -> Connection | None:
        kept = self._idle[url]
        while kept:
            connection = kept.pop()  # the last one given back, so that what is too many gets old
            if connection.usable:
                return connection
        return None

    async def _opened(self, url: str, origin: Origin) -> Connection:
        connection = Connection(url)
        tls = _tls() if origin.tls else None
        host, port = origin.host, origin.port
        opening = self._loop.create_connection(lambda: connection, host, port, ssl=tls)
        try:
            if await done_within(_CONNECT_S, opening):
                return connection
        except BaseException:
            connection.close()
            raise
        raise ConnectionError(f"no connection within {_CONNECT_S:g} s")

    def _sweep(self) -> None:
        """Close what has idled for long."""
        until_s = self._loop.time() - _IDLE_S
        for url, kept in list(self._idle.items()):
            while kept and (kept[0].idle_since_s < until_s or not kept[0].usable):
                kept.popleft().close()
            if not kept:
                del self._idle[url]
        self._timer = self._loop.call_later(_IDLE_S / 2, self._sweep)

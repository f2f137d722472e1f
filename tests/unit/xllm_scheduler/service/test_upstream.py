"""Requests to instances: which connection they take, and what is made of every kind of end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from xllm_scheduler.service import upstream as module
from xllm_scheduler.service.connection import Connection
from xllm_scheduler.service.upstream import Origin, Upstream, origin_of

Requests = Callable[[], Awaitable[None]]
Script = Callable[[Requests, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\n"
SIZED = OK + b"Content-Length: 2\r\n\r\nok"


class Instance:
    """Serves each connection by the next of its scripts.

    Attributes:
        requests: as they came.
        connections: how many were opened.
        ended: how many of them the router has closed.
    """

    def __init__(self, *scripts: Script) -> None:
        self.requests: list[bytes] = []
        self.connections = self.ended = 0
        self._scripts = iter(scripts)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def request() -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
            self.requests.append(head + await reader.readexactly(size))

        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await next(self._scripts)(request, writer)
            if not await reader.read(1):
                self.ended += 1
        writer.close()


def says(*answers: bytes, then_close: bool = False) -> Script:
    """One answer to each request, in order."""

    async def script(request: Requests, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await request()
            writer.write(answer)
            await writer.drain()
        if then_close:
            writer.close()

    return script


Serve = Callable[..., Awaitable[tuple[Instance, Callable[[], Awaitable[Connection]], Upstream]]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts an instance; gives what asks it."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*scripts: Script) -> Any:
            instance, pool = Instance(*scripts), Upstream()
            server = await asyncio.start_server(instance, "127.0.0.1", 0)
            stack.callback(server.close)
            stack.callback(pool.close)
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            return instance, lambda: pool.post(url, "/v1/x?a=1", b"x-own: 1\r\n", b"{}"), pool

        yield start


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), 60)


async def test_a_request_is_sent_as_it_stands_and_its_answer_read(serve: Serve) -> None:
    instance, ask, _ = await serve(says(OK + b"X-A: 1\r\nx-a: 2\r\nContent-Length: 2\r\n\r\nok"))
    answer = await ask()
    assert (answer.status, await answer.body()) == (200, b"ok")
    assert answer.headers == [(b"x-a", b"1"), (b"x-a", b"2"), (b"content-length", b"2")]
    (request,) = instance.requests
    lines = request.split(b"\r\n")
    assert lines[0] == b"POST /v1/x?a=1 HTTP/1.1"
    assert lines[1].startswith(b"host: 127.0.0.1:")
    assert lines[2:] == [b"content-length: 2", b"x-own: 1", b"", b"{}"]


@pytest.mark.parametrize(
    "answer",
    [
        SIZED,
        OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\nx-a: 1\r\n\r\n" + SIZED,
    ],
    ids=["sized", "chunked", "continued"],
)
async def test_a_connection_is_kept_once_its_answer_is_whole(serve: Serve, answer: bytes) -> None:
    instance, ask, pool = await serve(says(answer, answer, answer))
    for _ in range(3):
        got = await ask()
        assert (got.status, await got.body()) == (200, b"ok")
        pool.release(got)
    assert instance.connections == 1


@pytest.mark.parametrize(
    "first",
    [
        says(OK + b"\r\nok", then_close=True),
        says(OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nok"),
        says(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"),
        says(SIZED, then_close=True),
        says(SIZED + SIZED),
    ],
    ids=["until closed", "told to close", "HTTP/1.0", "half closed", "more than was asked"],
)
async def test_a_connection_that_is_of_no_more_use_is_not_kept(serve: Serve, first: Script) -> None:
    instance, ask, pool = await serve(first, says(SIZED))
    for _ in range(2):
        answer = await ask()
        assert (answer.status, await answer.body()) == (200, b"ok")
        pool.release(answer)
        await asyncio.sleep(0.02)
    assert instance.connections == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-",
        OK + b"Content-Length: 3\r\n\r\nok",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
        b"SSH-2.0\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
    ],
)
async def test_an_answer_that_breaks_off_is_an_error(serve: Serve, answer: bytes) -> None:
    _, ask, _ = await serve(says(answer, then_close=True))
    with pytest.raises(ConnectionError):
        await (await ask()).body()


async def test_a_request_that_meets_a_closing_connection_is_sent_anew(serve: Serve) -> None:
    instance, ask, pool = await serve(says(SIZED, b"", then_close=True), says(SIZED))
    for _ in range(2):
        answer = await ask()
        assert await answer.body() == b"ok"
        pool.release(answer)
    assert (instance.connections, len(instance.requests)) == (2, 3)


async def test_a_request_that_was_answered_in_part_is_not_sent_anew(serve: Serve) -> None:
    instance, ask, pool = await serve(says(SIZED, b"HTTP/1.1 200", then_close=True), says(SIZED))
    answer = await ask()
    await answer.body()
    pool.release(answer)
    with pytest.raises(ConnectionError):
        await ask()
    assert instance.connections == 1


async def test_who_is_cancelled_closes_the_connection(serve: Serve) -> None:
    instance, ask, _ = await serve(says(b""))
    asking = asyncio.ensure_future(ask())
    await until(lambda: len(instance.requests) == 1)
    asking.cancel()
    await until(lambda: instance.ended == 1)
    assert asking.cancelled()


async def test_an_answer_that_nobody_wants_whole_is_broken_off(serve: Serve) -> None:
    instance, ask, pool = await serve(says(OK + b"Content-Length: 3\r\n\r\nok"))
    answer = await ask()
    assert await answer.part() == b"ok"
    pool.release(answer)
    await until(lambda: instance.ended == 1)


async def test_no_more_is_read_than_can_be_given_on(serve: Serve) -> None:
    size, sent = 32 << 20, []

    async def script(request: Requests, writer: asyncio.StreamWriter) -> None:
        await request()
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent.append(1 << 16)

    _, ask, _ = await serve(script)
    answer = await ask()
    await asyncio.sleep(0.3)
    assert sum(sent) < size
    assert len(await answer.body()) == size
    assert answer.usable


async def test_what_idles_for_long_is_closed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IDLE_S", 0.05)
    instance, ask, pool = await serve(says(SIZED), says(SIZED))
    answers = [await ask(), await ask()]
    for answer in answers:
        await answer.body()
        pool.release(answer)
    await until(lambda: instance.ended == 2)


@pytest.mark.parametrize(
    ("url", "why", "patience_s"),
    [
        ("http://127.0.0.1:1", "Connect", 60.0),
        ("http://192.0.2.1", "Connect|no connection within 0.05 s|nreachable", 0.05),
        ("http://", "names no host", 60.0),
        ("http://h:p", "is no address: Port", 60.0),
        ("http://a..b", "is no address", 60.0),
    ],
)
async def test_an_instance_that_cannot_be_reached_is_an_error(
    monkeypatch: pytest.MonkeyPatch, url: str, why: str, patience_s: float
) -> None:
    monkeypatch.setattr(module, "_CONNECT_S", patience_s)
    with contextlib.closing(Upstream()) as pool, pytest.raises(OSError, match=why):
        await pool.post(url, "/", b"", b"")


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://h:80", Origin("h", 80, False, b"h:80", b"")),
        ("https://h", Origin("h", 443, True, b"h", b"")),
        ("http://[::1]:8000/", Origin("::1", 8000, False, b"[::1]:8000", b"")),
        ("http://user:key@h/base/", Origin("h", 80, False, b"h", b"/base")),
    ],
)
def test_where_an_address_leads(url: str, origin: Origin) -> None:
    assert origin_of(url) == origin

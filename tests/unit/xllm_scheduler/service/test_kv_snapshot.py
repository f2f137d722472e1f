"""A router asks an instance what it holds, and does without where there is no answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from xllm_kv.snapshot import Held, Snapshot
from xllm_scheduler.service.kv_snapshot import snapshot_of
from xllm_scheduler.service.registry import Record

SNAPSHOT = Snapshot("m", 4, 7, [Held(0, 1, [5, b"six"], bytes(32))])


@pytest.fixture
async def instance() -> AsyncIterator[str]:
    """Its rank 0 answers, 1 publishes nothing, 2 is broken, 3 talks of something else."""

    async def kv(request: web.Request) -> web.Response:
        if request.headers["authorization"] != "Bearer secret":
            return web.Response(status=401)
        statuses = {"0": 200, "1": 404, "2": 500, "3": 200}
        rank = request.query["rank"]
        body = SNAPSHOT.wire() if rank == "0" else b"something else"
        return web.Response(status=statuses[rank], body=body)

    app = web.Application()
    app.router.add_get("/xllm/v1/kv", kv)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize(
    ("token", "rank", "found"),
    [
        ("secret", 0, SNAPSHOT),
        ("secret", 1, None),
        ("secret", 2, None),
        ("secret", 3, None),
        ("wrong", 0, None),
        ("", 0, None),
    ],
)
async def test_what_an_instance_says_is_read(
    token: str, rank: int, found: Snapshot | None, instance: str
) -> None:
    async with aiohttp.ClientSession() as session:
        assert await snapshot_of(session, token, Record("a", instance), rank) == found


async def test_an_instance_that_is_gone_says_nothing() -> None:
    async with aiohttp.ClientSession() as session:
        record = Record("a", "http://127.0.0.1:9")
        assert await snapshot_of(session, "secret", record, 0) is None

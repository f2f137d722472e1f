"""Routers and stand-in engines on real sockets, in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import pytest
import uvicorn
from aiohttp import web

from benchmarks.lab.stub_engine import StubEngine
from xllm_eplb.balancer import Balancer
from xllm_eplb.phases import Prefill
from xllm_eplb.policy import Rules
from xllm_eplb.trace import Machine
from xllm_kv.prices import Prices
from xllm_kv.report import Room, _report
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.service.app import build
from xllm_scheduler.service.config import RouterSection
from xllm_scheduler.service.router import Service

TOKEN = "admin"
WAIT_S = 60.0  # for what takes a moment, on however busy a machine
MODEL = "stub"


@dataclass
class Stub:
    """A stand-in engine that answers."""

    engine: StubEngine
    url: str
    runner: web.AppRunner

    async def dies(self) -> None:
        """Break every connection and answer no more, as a killed process."""
        server = self.runner.server
        assert server is not None
        for connection in list(server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self.runner.cleanup()


@dataclass
class Router:
    """A router that answers, and a client of it."""

    url: str
    session: aiohttp.ClientSession
    service: Service

    async def ask(
        self, path: str, body: Any, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> Any:
        """The JSON that it answers with."""
        kind = {"data": body} if isinstance(body, bytes) else {"json": body}
        async with self.session.post(self.url + path, headers=headers, **kind) as answer:
            found = await answer.json(content_type=None)
            assert answer.status == status, found
            return found

    async def stream(self, path: str, body: dict[str, Any]) -> bytes:
        """The bytes of a streamed answer."""
        async with self.session.post(self.url + path, json={**body, "stream": True}) as answer:
            assert answer.status == 200
            return await answer.read()

    async def admin(self, method: str, path: str, *, status: int = 200, **more: Any) -> Any:
        """An admin call."""
        headers = {"authorization": f"Bearer {TOKEN}"}
        call = self.session.request(method, self.url + "/xllm/v1" + path, headers=headers, **more)
        async with call as answer:
            found = await answer.json(content_type=None)
            assert answer.status == status, found
            return found

    async def status(self) -> Any:
        """What everybody may see."""
        async with self.session.get(self.url + "/xllm/v1/status") as answer:
            return await answer.json()

    async def joined(self, count: int) -> None:
        """Wait for instances."""
        while len((await self.status())["instances"]) < count:
            await asyncio.sleep(0.02)


def told_loads() -> dict[str, Any]:
    """What a balancer tells after a plan: two layers with load, one without, on four devices."""
    balancer = Balancer(Rules(), Machine(100, 40e6, 40e6, 400e12, 3e12, 40e9, 1.0))
    load = 1e5 * np.array([[100, 90, 50, 40, 20, 20, 40, 40]] * 2 + [[0] * 8], float)
    balancer.counted([Prefill(load / 2, 0.25)])
    balancer.rebalance(load, 8, 1, 1, 4, np.tile(np.arange(8), (3, 1)))
    return balancer.loads()


def told_tiers() -> dict[str, Any]:
    """What an engine tells that fetched 2 GiB from host memory, and was let down by its disk."""
    prices = Prices({"host": (0.1, 5.0), "DiskTier": (1.0, 0.5)})
    prices.ended("host", 2 << 30, 4.0)
    prices.stored("host", 3 << 20, 0.1)
    prices.counts["host"].won_tokens, prices.counts["host"].missed_tokens = 12_345, 7
    prices.ended("DiskTier", 1 << 20, 0.1, ok=False)
    rooms = {"host": Room(1 << 30, 4 << 30), "DiskTier": Room(3 << 20, 0)}
    return {"kv": dict(_report(prices, rooms).facts)}


Stubs = Callable[..., Any]


@pytest.fixture
async def stub() -> AsyncIterator[Stubs]:
    """Starts stand-in engines."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            token_ms: float = 0.0, prompt_ms: float = 0.0, port: int = 0, key: str = ""
        ) -> Stub:
            engine = StubEngine(MODEL, token_ms, prompt_ms, key)
            runner = web.AppRunner(engine.app(), shutdown_timeout=0.1, handler_cancellation=True)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", port).start()
            return Stub(engine, f"http://127.0.0.1:{runner.addresses[0][1]}", runner)

        yield start


@pytest.fixture
async def router() -> AsyncIterator[Callable[..., Any]]:
    """Starts routers over instances."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(*stubs: Stub, wait: bool = True, **settings: Any) -> Router:
            urls = ",".join(stub.url for stub in stubs)
            usual = {"routing": "round_robin", "probe_s": 0.1, "admin_token": TOKEN}
            section = RouterSection(**{**usual, "instances": urls, **settings})
            app = build(section, SchedulerSection())
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
            task = asyncio.create_task(server.serve())

            async def stop() -> None:
                server.should_exit = True
                await task

            stack.push_async_callback(stop)
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            session = await stack.enter_async_context(aiohttp.ClientSession())
            made = Router(f"http://127.0.0.1:{port}", session, app.service)
            if wait:
                await asyncio.wait_for(made.joined(len(stubs)), WAIT_S)
            return made

        yield start

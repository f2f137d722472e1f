"""Sends online and offline chat requests to a server and records what its clients see."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from benchmarks.lab.results import Record, RequestClass, Run
from benchmarks.lab.workload import Ask, OfflineLoad, OnlineLoad, offline_backlog, online_asks

Json = Mapping[str, object]
Tick = Callable[[float, float, list[Record]], None]
"""Called each second with the seconds passed, the window's length and the records so far."""


@dataclass(frozen=True)
class Load:
    """What runs side by side in one measured window."""

    online: OnlineLoad
    offline: OfflineLoad | None
    settle_s: float = 10.0
    """How long the offline clients run before the window begins."""
    drain_s: float = 60.0
    """How long an online answer is waited for after the window; offline clients go on meanwhile."""


def run_load(
    url: str,
    model: str,
    load: Load,
    *,
    seed: int,
    offline_fields: Json | None = None,
    tick: Tick | None = None,
    prefill_url: str = "",
) -> Run:
    """Runs one load from start to end.

    The window begins after the offline clients have settled and ends one mean gap after the last
    online arrival, so the rate over it is the rate that was asked for.

    Args:
        url: the server's address.
        model: the name that it serves the model under.
        load: what to send.
        seed: decides prompts, lengths and arrival times.
        offline_fields: body fields that mark a request as offline.
        tick: told how it goes.
        prefill_url: of another server that computes the prompts first, if there is one.
    """
    return asyncio.run(_run(url, model, load, seed, offline_fields or {}, tick, prefill_url))


async def _run(
    url: str,
    model: str,
    load: Load,
    seed: int,
    offline_fields: Json,
    tick: Tick | None,
    prefill_url: str,
) -> Run:
    arrivals = online_asks(load.online, seed)
    window_s = arrivals[-1][0] + 1 / load.online.rate
    start = time.monotonic() + (load.settle_s if load.offline else 0.0)
    async with _client(url, model, start, prefill_url) as client, asyncio.TaskGroup() as group:
        background = [group.create_task(_report(client.records, start, window_s, tick))]
        if load.offline:
            backlog = offline_backlog(load.offline, seed)
            background += [
                group.create_task(_offline_client(client, backlog, offline_fields))
                for _ in range(load.offline.clients)
            ]
        online = [group.create_task(_online_request(client, *arrival)) for arrival in arrivals]
        await asyncio.sleep(start + window_s - time.monotonic())
        await asyncio.wait(online, timeout=load.drain_s)
        for task in [*background, *online]:
            task.cancel()
    return Run(tuple(client.records), window_s)


@dataclass
class _Client:
    session: aiohttp.ClientSession
    model: str
    start: float
    prefill_url: str = ""
    records: list[Record] = field(default_factory=list)

    def now_s(self) -> float:
        return time.monotonic() - self.start

    async def send(
        self, request_class: RequestClass, ask: Ask, arrival_s: float, fields: Json
    ) -> None:
        tokens: list[tuple[float, int]] = []
        usage: dict[str, object] = {}
        error: str | None = None
        finished = False
        try:
            async for usage in self._stream(ask, fields):
                produced = _count(usage, "completion_tokens")
                if produced > (tokens[-1][1] if tokens else 0):
                    tokens.append((self.now_s(), produced))
            finished = produced_all(tokens, ask)
            error = None if finished else f"the stream ended before {ask.max_tokens} tokens"
        except (aiohttp.ClientError, TimeoutError, RequestFailedError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        finally:  # also when cancelled because the run is over
            self.records.append(
                Record(
                    request_class=request_class,
                    arrival_s=arrival_s,
                    end_s=self.now_s(),
                    tokens=tuple(tokens),
                    prompt_tokens=_count(usage, "prompt_tokens"),
                    cached_tokens=_cached(usage),
                    finished=finished,
                    error=error,
                )
            )

    async def _stream(self, ask: Ask, fields: Json) -> AsyncIterator[dict[str, object]]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": ask.prompt}],
            "max_tokens": ask.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **fields,
        }
        if self.prefill_url:
            body["kv_transfer_params"] = await self._prefill(body)
        async with self.session.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise RequestFailedError(f"status {response.status}: {await response.text()}")
            async for line in response.content:
                data = line.removeprefix(b"data: ").strip()
                if not data or data == b"[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RequestFailedError(str(chunk["error"]))
                yield chunk["usage"]

    async def _prefill(self, body: Json) -> object:
        """Have the other server compute the prompt; what a server needs to fetch its KV."""
        names = ("remote_engine_id", "remote_block_ids", "remote_host", "remote_port")
        transfer = {"do_remote_decode": True, "do_remote_prefill": False, **dict.fromkeys(names)}
        first = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": transfer}
        del first["stream_options"]
        url = f"{self.prefill_url}/v1/chat/completions"
        async with self.session.post(url, json=first) as response:
            if response.status != 200:
                raise RequestFailedError(f"status {response.status}: {await response.text()}")
            return (await response.json())["kv_transfer_params"]


class RequestFailedError(Exception):
    """The server refused a request or ended it with an error."""


@asynccontextmanager
async def _client(url: str, model: str, start: float, prefill_url: str) -> AsyncIterator[_Client]:
    async with aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
    ) as session:
        yield _Client(session, model, start, prefill_url)


async def _online_request(client: _Client, arrival_s: float, ask: Ask) -> None:
    await asyncio.sleep(arrival_s - client.now_s())
    await client.send(RequestClass.ONLINE, ask, arrival_s, {})


async def _offline_client(client: _Client, backlog: Iterator[Ask], fields: Json) -> None:
    for ask in backlog:
        await client.send(RequestClass.OFFLINE, ask, client.now_s(), fields)
        if client.records[-1].error:
            await asyncio.sleep(1)  # do not flood a server that refuses


async def _report(records: list[Record], start: float, window_s: float, tick: Tick | None) -> None:
    while tick:
        tick(time.monotonic() - start, window_s, records)
        await asyncio.sleep(1)


def produced_all(tokens: list[tuple[float, int]], ask: Ask) -> bool:
    """True if the answer is as long as was asked for (end-of-text is ignored)."""
    return bool(tokens) and tokens[-1][1] == ask.max_tokens


def _count(usage: dict[str, object], name: str) -> int:
    value = usage.get(name) or 0
    assert isinstance(value, int)
    return value


def _cached(usage: dict[str, object]) -> int:
    details = usage.get("prompt_tokens_details")
    return _count(details, "cached_tokens") if isinstance(details, dict) else 0

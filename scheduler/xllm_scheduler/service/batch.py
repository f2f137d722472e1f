"""OpenAI's Batch API: offline requests by the file, asked when there is room for them.

A batch's requests are read and asked as instances have room: each has the class offline and no
deadline but the batch's window.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Form, Request, Response, UploadFile

from xllm_scheduler.classes import CLASS_KEY, ServiceClass
from xllm_scheduler.service.batch_store import OPEN, BatchStore, Item
from xllm_scheduler.service.errors import ApiError, too_large
from xllm_scheduler.service.openapi import json_body
from xllm_scheduler.service.routing import InstanceView
from xllm_scheduler.service.slack import room
from xllm_scheduler.service.waiting import done_within

_WINDOWS_S = {"24h": 86400}
_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
_READ_AHEAD = 256
_IDLE_S = 0.2
_MOST_ERRORS = 20
_MOST_UNDER_WAY = 10_000
_AGAIN_S = 1.0
Ask = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
"""Sends a request's body to a path; status and body of the answer."""
logger = logging.getLogger("xllm.router")


class Batches:
    """Runs the batches of a store.

    Args:
        store: keeps them.
        ask: sends a request.
        views: of the instances now.
        most: offline requests that may wait at an instance.
    """

    def __init__(
        self, store: BatchStore, ask: Ask, views: Callable[[], Sequence[InstanceView]], most: int
    ) -> None:
        self.store = store
        self._ask, self._views, self._most = ask, views, most
        self._under_way: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._room = asyncio.Event()
        self._ready: dict[str, deque[Item]] = {}
        self._read_to: dict[str, int] = {}

    async def run(self) -> None:
        """Ask what is to be asked, until cancelled; what was under way is then asked again."""
        try:
            while True:
                self._room.clear()
                await self._start_some()
                await done_within(_IDLE_S, self._room.wait())
        finally:
            tasks = list(self._under_way.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._ready.clear()
            self._read_to.clear()

    async def _start_some(self) -> None:
        """Start as many requests as there is room for."""
        free = sum(room(view, self._most) for view in self._views())
        free = min(free, _MOST_UNDER_WAY - len(self._under_way))
        for batch in await asyncio.to_thread(self.store.open_batches):
            name = batch["id"]
            if batch["status"] == "in_progress" and batch["expires_at"] <= time.time():
                await self._end(name, "expired")
                continue
            if batch["status"] == "cancelling":
                await self._end(name, "cancelled")
                continue
            if batch["status"] == "finalizing":  # the router ended in the middle of it
                await asyncio.to_thread(self.store.finish, name, "completed")
                continue
            ready = await self._more(name)
            while ready and free > 0:
                self._start(ready.popleft(), batch["endpoint"])
                free -= 1
            if not ready and not any(key[0] == name for key in self._under_way):
                await asyncio.to_thread(self.store.set_status, name, "finalizing")
                await asyncio.to_thread(self.store.finish, name, "completed")
                self._forget(name)

    async def _more(self, name: str) -> deque[Item]:
        ready = self._ready.setdefault(name, deque())
        if not ready:
            after = self._read_to.get(name, 0)
            items = await asyncio.to_thread(self.store.waiting, name, _READ_AHEAD, after)
            if items:
                self._read_to[name] = items[-1].line
                ready.extend(items)
        return ready

    def _start(self, item: Item, endpoint: str) -> None:
        key = item.batch_id, item.line
        task = asyncio.create_task(self._asked(item, endpoint))
        self._under_way[key] = task

        def done(_: asyncio.Task[None]) -> None:
            self._under_way.pop(key, None)
            self._room.set()

        task.add_done_callback(done)

    async def _asked(self, item: Item, endpoint: str) -> None:
        status, data = await self._ask(endpoint, offline_body(item.body))
        try:
            body = json.loads(data)
        except ValueError:
            body = {"error": {"message": data.decode(errors="replace")[:1000]}}
        answer = {
            "id": f"batch_req_{secrets.token_hex(12)}",
            "custom_id": item.custom_id,
            "response": {"status_code": status, "request_id": item.custom_id, "body": body},
            "error": None,
        }
        while True:
            try:
                await asyncio.to_thread(self.store.answered, item, answer, ok=status == 200)
                return
            except sqlite3.Error as error:  # a full disk: better to wait than to ask once more
                logger.error("an answer of batch %s cannot be kept yet: %s", item.batch_id, error)
                await asyncio.sleep(_AGAIN_S)

    async def _end(self, name: str, status: str) -> None:
        """Ask no more of a batch, let go of what is under way, and keep what was answered."""
        tasks = [task for key, task in self._under_way.items() if key[0] == name]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.store.finish, name, status)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._ready.pop(name, None)
        self._read_to.pop(name, None)


def offline_body(body: str) -> bytes:
    """A request of a batch as it is sent: of the class offline, not streamed."""
    asked = json.loads(body)
    asked["vllm_xargs"] = {**(asked.get("vllm_xargs") or {}), CLASS_KEY: ServiceClass.OFFLINE.value}
    asked["stream"] = False
    return json.dumps(asked).encode()


def parsed(content: bytes, endpoint: str) -> tuple[list[Item], list[dict[str, Any]]]:
    """The requests of an input file, and what is wrong with it, by line."""
    items: list[Item] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        problem = ""
        try:
            request = json.loads(line)
        except ValueError as error:
            request, problem = {}, f"it is not valid JSON: {error}"
        if not problem:
            problem = _problem(request, endpoint, seen)
        if problem:
            errors.append({"code": "invalid_request", "line": number, "message":
                           f"Line {number}: {problem}.", "param": None})  # fmt: skip
            if len(errors) >= _MOST_ERRORS:
                break
            continue
        seen.add(request["custom_id"])
        items.append(Item("", number, request["custom_id"], json.dumps(request["body"])))
    if not items and not errors:
        errors.append({"code": "empty_file", "line": None, "message": "The file holds no request.",
                       "param": None})  # fmt: skip
    return items, errors


def _problem(request: Any, endpoint: str, seen: set[str]) -> str:
    if not isinstance(request, dict):
        return "it is no JSON object"
    custom_id = request.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return f"custom_id is {custom_id!r}; allowed is a text"
    if custom_id in seen:
        return f"custom_id {custom_id!r} was there before"
    if request.get("method", "POST") != "POST":
        return f"method is {request['method']!r}; allowed is POST"
    if request.get("url") != endpoint:
        return f"url is {request.get('url')!r}; allowed is the batch's endpoint, {endpoint}"
    if not isinstance(request.get("body"), dict):
        return f"body is {request.get('body')!r}; allowed is an object"
    xargs = request["body"].get("vllm_xargs")
    if not isinstance(xargs, (dict, type(None))):
        return f"body.vllm_xargs is {xargs!r}; allowed is an object"
    return ""


def add_routes(app: FastAPI, batches: Batches, most_bytes: int) -> None:
    """``/v1/files`` and ``/v1/batches``; files of so many bytes at most."""
    store = batches.store

    async def file_of(name: str) -> dict[str, Any]:
        found = await asyncio.to_thread(store.file, name)
        if found is None:
            raise ApiError(404, f"There is no file {name!r}.", param="file_id")
        return found

    async def batch_of(name: str) -> dict[str, Any]:
        found = await asyncio.to_thread(store.batch, name)
        if found is None:
            raise ApiError(404, f"There is no batch {name!r}.", param="batch_id")
        return found

    @app.post("/v1/files")
    async def upload(file: UploadFile, purpose: Annotated[str, Form()]) -> dict[str, Any]:
        if purpose != "batch":
            raise ApiError(400, f"purpose is {purpose!r}; allowed is batch.", param="purpose")
        content = await file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise too_large(most_bytes)
        name = file.filename or "batch.jsonl"
        return await asyncio.to_thread(store.add_file, name, purpose, content)

    @app.get("/v1/files")
    async def files() -> dict[str, Any]:
        return {"object": "list", "data": await asyncio.to_thread(store.files), "has_more": False}

    @app.get("/v1/files/{name}")
    async def file(name: str) -> dict[str, Any]:
        return await file_of(name)

    @app.get("/v1/files/{name}/content", response_class=Response)
    async def content(name: str) -> Response:
        await file_of(name)
        data = await asyncio.to_thread(store.content, name)
        return Response(data, media_type="application/octet-stream")

    @app.delete("/v1/files/{name}")
    async def remove(name: str) -> dict[str, Any]:
        await file_of(name)
        for batch in await asyncio.to_thread(store.open_batches):
            if batch["input_file_id"] == name:
                raise ApiError(409, f"The batch {batch['id']} still uses file {name!r}.")
        await asyncio.to_thread(store.remove_file, name)
        return {"id": name, "object": "file", "deleted": True}

    wanted = json_body(
        {
            "input_file_id": {"type": "string"},
            "endpoint": {"type": "string", "enum": list(_ENDPOINTS)},
            "completion_window": {"type": "string", "enum": list(_WINDOWS_S)},
            "metadata": {"type": "object"},
        },
        "input_file_id",
        "endpoint",
    )

    @app.post("/v1/batches", openapi_extra=wanted)
    async def create(request: Request) -> dict[str, Any]:
        try:
            asked = await request.json()
        except ValueError as error:
            raise ApiError(400, f"The body is not valid JSON: {error}.") from error
        if not isinstance(asked, dict):
            raise ApiError(400, "The body is no JSON object.")
        endpoint, window = asked.get("endpoint"), asked.get("completion_window", "24h")
        if endpoint not in _ENDPOINTS:
            allowed = ", ".join(_ENDPOINTS)
            raise ApiError(
                400, f"endpoint is {endpoint!r}; allowed are {allowed}.", param="endpoint"
            )
        if not isinstance(window, str) or window not in _WINDOWS_S:
            raise ApiError(
                400, f"completion_window is {window!r}; allowed is 24h.", param="completion_window"
            )
        metadata = asked.get("metadata")
        if metadata is not None and not isinstance(metadata, dict):
            raise ApiError(
                400, f"metadata is {metadata!r}; allowed is an object.", param="metadata"
            )
        name = asked.get("input_file_id")
        await file_of(str(name))
        data = await asyncio.to_thread(store.content, str(name))
        items, errors = await asyncio.to_thread(parsed, data, endpoint)
        return await asyncio.to_thread(
            store.add_batch,
            endpoint,
            str(name),
            window,
            _WINDOWS_S[window],
            metadata,
            items,
            errors,
        )

    @app.get("/v1/batches")
    async def listed(limit: int = 20, after: str = "") -> dict[str, Any]:
        if not 1 <= limit <= 100:
            raise ApiError(400, f"limit is {limit}; allowed is 1 to 100.", param="limit")
        found = await asyncio.to_thread(store.batches, limit + 1, after)
        data = found[:limit]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return {"object": "list", "data": data, **ends, "has_more": len(found) > limit}

    @app.get("/v1/batches/{name}")
    async def batch(name: str) -> dict[str, Any]:
        return await batch_of(name)

    @app.post("/v1/batches/{name}/cancel")
    async def cancel(name: str) -> dict[str, Any]:
        found = await batch_of(name)
        if found["status"] not in OPEN:
            raise ApiError(409, f"The batch {name!r} is {found['status']} and cannot be cancelled.")
        await asyncio.to_thread(store.set_status, name, "cancelling")
        return await batch_of(name)

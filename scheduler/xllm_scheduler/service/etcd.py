"""What several routers share, in etcd: who is there, roles, and who of the routers decides on them.

Speaks etcd's JSON gateway, so no further library is needed. While etcd is away everybody serves on
with what was known last.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

_TTL_S = 3
_AGAIN_S = 1.0
_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
_FOREVER = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
_ERRORS = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)
Changed = Callable[[str, Mapping[str, Any] | None], None]
"""Told a key, without its prefix, and its new value; None if it is gone."""
logger = logging.getLogger("xllm.router")


class Etcd:
    """A connection to etcd and what is kept alive through it.

    Args:
        session: of HTTP.
        url: of any of its members.
        prefix: of all keys.

    Attributes:
        leads: whether this process is the one that decides.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, prefix: str) -> None:
        self._session, self._url, self._prefix = session, url.rstrip("/"), prefix.rstrip("/") + "/"
        self._lease = ""
        self._kept: dict[str, Mapping[str, Any]] = {}
        self.leads = False

    def keep(self, key: str, value: Mapping[str, Any]) -> None:
        """Have a key there for as long as this process lives; see :meth:`run`."""
        self._kept[key] = value
        self._lease = ""  # all are put again

    async def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Set a key that stays.

        Raises:
            aiohttp.ClientError: etcd is away.
        """
        await self._call("kv/put", {"key": self._named(key), "value": _coded(json.dumps(value))})

    async def delete(self, key: str) -> None:
        """Take a key away.

        Raises:
            aiohttp.ClientError: etcd is away.
        """
        await self._call("kv/deleterange", {"key": self._named(key)})

    async def run(self, lead_as: str = "") -> None:
        """Keep the lease, and everything that hangs on it.

        Args:
            lead_as: try to become the one that decides, under this name; "" for not.
        """
        away = False
        while True:
            try:
                await self._live(lead_as)
                away = False
            except _ERRORS as error:
                if not away:
                    logger.warning("etcd at %s does not answer: %s", self._url, error)
                away, self.leads = True, False
            await asyncio.sleep(_AGAIN_S)

    async def watch(self, prefix: str, changed: Changed) -> None:
        """Tell of all keys under a prefix, then of every change, until cancelled."""
        known: set[str] = set()
        while True:
            with contextlib.suppress(*_ERRORS):
                await self._watched(self._prefix + prefix, changed, known)
            await asyncio.sleep(_AGAIN_S)

    async def close(self) -> None:
        """Let go of what was kept, so that others see it at once."""
        if self._lease:
            with contextlib.suppress(*_ERRORS):
                await self._call("lease/revoke", {"ID": self._lease})

    async def _live(self, lead_as: str) -> None:
        if self._lease:
            answer = await self._call("lease/keepalive", {"ID": self._lease})
            if int(answer.get("result", answer).get("TTL", 0)) <= 0:
                self._lease = ""  # it has run out meanwhile
        if not self._lease:
            lease = (await self._call("lease/grant", {"TTL": _TTL_S}))["ID"]
            for key, value in self._kept.items():
                pair = {"key": self._named(key), "value": _coded(json.dumps(value))}
                await self._call("kv/put", {**pair, "lease": lease})
            self._lease = lease
        if lead_as:
            self.leads = await self._elected(lead_as)

    async def _elected(self, name: str) -> bool:
        key = self._named("leader")
        absent = {"key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0"}
        put = {"requestPut": {"key": key, "value": _coded(name), "lease": self._lease}}
        read = {"requestRange": {"key": key}}
        answer = await self._call(
            "kv/txn", {"compare": [absent], "success": [put], "failure": [read]}
        )
        if answer.get("succeeded"):
            return True
        pairs = answer["responses"][0]["response_range"].get("kvs", [])
        return bool(pairs) and _decoded(pairs[0]["value"]) == name

    async def _watched(self, prefix: str, changed: Changed, known: set[str]) -> None:
        span = {"key": _coded(prefix), "range_end": _coded(_after(prefix))}
        there = await self._call("kv/range", span)
        found = {_decoded(pair["key"])[len(prefix) :]: pair for pair in there.get("kvs", [])}
        for gone in sorted(known - found.keys()):
            changed(gone, None)
        for name, pair in found.items():
            changed(name, json.loads(_decoded(pair["value"])))
        known.clear()
        known.update(found)
        start = int(there["header"]["revision"]) + 1
        request = {"create_request": {**span, "start_revision": start}}
        url = f"{self._url}/v3/watch"
        async with self._session.post(url, json=request, timeout=_FOREVER) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                for event in json.loads(line).get("result", {}).get("events", ()):
                    name = _decoded(event["kv"]["key"])[len(prefix) :]
                    if event.get("type") == "DELETE":
                        known.discard(name)
                        changed(name, None)
                    else:
                        known.add(name)
                        changed(name, json.loads(_decoded(event["kv"]["value"])))

    async def _call(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        url = f"{self._url}/v3/{path}"
        async with self._session.post(url, json=body, timeout=_TIMEOUT) as answer:
            answer.raise_for_status()
            made: dict[str, Any] = json.loads(await answer.read())
            return made

    def _named(self, key: str) -> str:
        return _coded(self._prefix + key)


def _coded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode()


def _after(prefix: str) -> str:
    """The first key behind all that begin with the prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)

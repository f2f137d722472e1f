"""Looks after instances: probes those that are silent, asks what they are, and drops the lost."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.registry import Health, Record

# A server that imports something on its first request of a kind, or shares a core, answers late.
_TIMEOUT_S = 5.0
_LATE_S = 1.0  # beyond that time; more means that this process itself was held up
_TIMEOUT = aiohttp.ClientTimeout(total=_TIMEOUT_S)
_ATTEMPTS = 2  # probes in a row that have to fail
_ERRORS = (aiohttp.ClientError, asyncio.TimeoutError, OSError)
logger = logging.getLogger("xllm.router")


async def healthy(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether an instance says that its engine is alive."""
    try:
        async with session.get(url + "/health", timeout=_TIMEOUT) as response:
            return response.status == 200
    except _ERRORS:
        return False


async def asked(session: aiohttp.ClientSession, url: str, **known: Any) -> Record | None:
    """What an instance is, as far as it tells; None if it does not answer yet.

    Args:
        session: to it.
        url: its address.
        known: fields of its record that were given.
    """
    try:
        async with session.get(url + "/v1/models", timeout=_TIMEOUT) as response:
            if response.status != 200:
                return None
            listed: list[Mapping[str, Any]] = (await response.json())["data"]
    except (*_ERRORS, ValueError, KeyError, TypeError):
        return None
    if not listed:
        return None
    lengths = [one["max_model_len"] for one in listed if one.get("max_model_len")]
    fields: dict[str, Any] = {
        "name": url.partition("://")[2],
        "url": url,
        "models": [one["id"] for one in listed],
        "loras": [one["id"] for one in listed if one.get("parent")],
        "tokenizer": str(listed[0].get("root") or ""),
        "max_model_len": max(lengths, default=0),
    }
    return Record.parsed({**fields, **known})


class Watch:
    """See the module.

    Args:
        fleet: is told.
        session: to the instances.
        clock: seconds.
        every_s: how often it looks.
        suspected: is told the names of instances that do not answer.
        lost: is told the names of those that are gone.
    """

    def __init__(
        self,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        clock: Callable[[], float],
        every_s: float,
        suspected: Callable[[str], None],
        lost: Callable[[str], None],
    ) -> None:
        self._fleet, self._session, self._clock = fleet, session, clock
        self._every_s, self._suspected, self._lost = every_s, suspected, lost
        self._unanswered: Counter[str] = Counter()

    async def run(self) -> None:
        """Look again and again."""
        while True:
            await self.look()
            await asyncio.sleep(self._every_s)

    async def look(self) -> None:
        """Probe whoever has not been heard of lately, then let time pass."""
        now_s = self._clock()
        silent = {
            name: member.record.url
            for name, member in self._fleet.registry.members.items()
            if now_s - member.heard_s > self._every_s or member.health is not Health.READY
        }
        for name in self._unanswered.keys() - silent.keys():  # they have reported themselves
            self._is_well(name)
        answers = await asyncio.gather(*(healthy(self._session, url) for url in silent.values()))
        if (took_s := self._clock() - now_s) > _TIMEOUT_S + _LATE_S:
            logger.warning("this router stood still for %.1f s: nobody else is blamed", took_s)
            return
        for name, well in zip(silent, answers, strict=True):
            if well:
                self._is_well(name)
                self._fleet.answered(name, self._clock())
                continue
            self._unanswered[name] += 1
            if self._unanswered[name] == _ATTEMPTS:
                logger.warning("%s does not answer", name)
                self._fleet.unanswered(name, self._clock())
                self._suspected(name)
        for name in self._fleet.tick(self._clock()):
            logger.warning("%s is gone", name)
            del self._unanswered[name]
            self._lost(name)

    def _is_well(self, name: str) -> None:
        if self._unanswered.pop(name, 0) >= _ATTEMPTS:
            self._fleet.back(name)

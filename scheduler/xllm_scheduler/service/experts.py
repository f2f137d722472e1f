"""Loads of experts, from the instances that balance them; asked for when somebody looks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp

from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.registry import Health

_LOADS_PATH = "/xllm/v1/eplb/loads"
_TIMEOUT = aiohttp.ClientTimeout(total=2.0)
_KEPT_S = 5.0  # a worker answers between two steps, so not once for every console


class ExpertLoads:
    """See the module.

    Args:
        fleet: knows the instances.
        session: to them.
        clock: seconds, monotonic.
    """

    def __init__(
        self, fleet: Fleet, session: aiohttp.ClientSession, clock: Callable[[], float]
    ) -> None:
        self._fleet, self._session, self._clock = fleet, session, clock
        self._last: tuple[float, dict[str, Any]] | None = None
        self._asking = asyncio.Lock()

    async def look(self) -> dict[str, Any]:
        """What each instance tells, by its name; those that tell nothing are left out."""
        async with self._asking:
            if self._last is None or self._clock() - self._last[0] >= _KEPT_S:
                urls = {
                    name: member.record.url
                    for name, member in self._fleet.registry.members.items()
                    if member.health is not Health.SUSPECT
                }
                told = await asyncio.gather(*(self._asked(url) for url in urls.values()))
                found = dict(zip(urls, told, strict=True))
                self._last = (self._clock(), {name: one for name, one in found.items() if one})
            return self._last[1]

    async def _asked(self, url: str) -> Any:
        try:
            async with self._session.get(url + _LOADS_PATH, timeout=_TIMEOUT) as answer:
                found = await answer.json() if answer.status == 200 else None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "devices" in found else None

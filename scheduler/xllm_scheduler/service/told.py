"""What instances tell of themselves; asked for when somebody looks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import aiohttp

from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.registry import Health

_TIMEOUT = aiohttp.ClientTimeout(total=2.0)
_KEPT_S = 5.0  # a worker answers between two steps, so not once for every console


class Question(NamedTuple):
    """What is asked of each instance.

    Attributes:
        path: that it answers under.
        read: what its answer tells; None where that is nothing.
    """

    path: str
    read: Callable[[Mapping[str, Any]], Any]


def _loads(answer: Mapping[str, Any]) -> Any:
    return answer if "devices" in answer else None


def _tiers(answer: Mapping[str, Any]) -> Any:
    engines = [engine.get("kv", {}).get("tiers", {}) for engine in answer.get("engines", ())]
    return engines if any(engines) else None


EXPERT_LOADS = Question("/xllm/v1/eplb/loads", _loads)
"""The load of devices by layer, where experts are balanced."""
KV_TIERS = Question("/xllm/v1/status", _tiers)
"""For each engine what happened at its KV tiers, by their names."""


class Told:
    """See the module.

    Args:
        fleet: knows the instances.
        session: to them.
        clock: seconds, monotonic.
        question: what they are asked.
    """

    def __init__(
        self,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        clock: Callable[[], float],
        question: Question,
    ) -> None:
        self._fleet, self._session, self._clock = fleet, session, clock
        self._question = question
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
            async with self._session.get(url + self._question.path, timeout=_TIMEOUT) as answer:
                found = await answer.json() if answer.status == 200 else None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError):
            return None
        return self._question.read(found) if isinstance(found, dict) else None

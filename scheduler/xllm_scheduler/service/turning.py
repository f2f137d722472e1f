"""Gives an instance another role: tells its engine, checks that KV really moves, or puts it back.

A change that did nothing answers just as quickly as one that worked, so one real prompt is computed
at the instance that is to prefill, and its KV is used by one that generates.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from typing import Any

import aiohttp

from xllm_scheduler.service.call import prefill_body
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.member import ROLE_PATH
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.routing import Role

# Two instances that have never met take long to connect: a dozen seconds over UCX on CPUs.
_TIMEOUT = aiohttp.ClientTimeout(total=60.0)
_ERRORS = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)
# More than a block of any engine, so that there is something to move.
_WORDS = "the quick brown fox jumps over the lazy dog " * 24


class TurningError(Exception):
    """A role could not be changed; says why. Everything is as it was."""


class Turner:
    """See the module.

    Args:
        fleet: knows the instances.
        session: to them.
        token: the admin token, which they share.
        key: the API key that they want; "" for none.
    """

    def __init__(self, fleet: Fleet, session: aiohttp.ClientSession, token: str, key: str) -> None:
        self._fleet, self._session = fleet, session
        self._own = {"authorization": f"Bearer {token}"}
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    async def turn(self, name: str, role: Role) -> None:
        """Change what an instance's engine does; the fleet is told by the caller.

        Raises:
            KeyError: there is none of that name.
            TurningError: it did not take the role, or no KV moved.
        """
        member = self._fleet.registry.members[name]
        before = member.role
        await self._tell(member.record, role)
        peer = self._peer(name, role)
        if peer is None:
            return
        first, then = (member.record, peer) if role is Role.PREFILL else (peer, member.record)
        try:
            await self._moved(first, then)
        except TurningError:
            await self._tell(member.record, before)
            raise

    def _peer(self, name: str, role: Role) -> Record | None:
        """Who takes the other part of the check; None if there is nothing to check."""
        if role is Role.MIXED:
            return None
        model = self._fleet.registry.members[name].record.models[0]
        for other, member in self._fleet.registry.members.items():
            if other != name and member.accepts and model in member.record.models:
                return member.record
        return None

    async def _tell(self, record: Record, role: Role) -> None:
        try:
            async with self._session.put(
                record.url + ROLE_PATH,
                json={"role": role.value},
                headers=self._own,
                timeout=_TIMEOUT,
            ) as answer:
                # Without this package there is nothing to tell an engine; its role is routing's.
                if answer.status not in (200, 404, 405):
                    raise TurningError(f"{record.name} answered {answer.status} to its new role")
        except _ERRORS as error:
            raise TurningError(f"{record.name} did not answer: {error!r}") from error

    async def _moved(self, first: Record, then: Record) -> None:
        asked = {
            "model": first.models[0],
            "prompt": f"{uuid.uuid4().hex} {_WORDS}",
            "max_tokens": 1,
            "temperature": 0,
        }
        answer = await self._asked(first, prefill_body(asked))
        params = answer.get("kv_transfer_params")
        if not params:
            raise TurningError(f"{first.name} offers no KV to others")
        await self._asked(then, {**asked, "kv_transfer_params": params})

    async def _asked(self, record: Record, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            async with self._session.post(
                record.url + "/v1/completions",
                data=json.dumps(body),
                headers={**self._headers, "content-type": "application/json"},
                timeout=_TIMEOUT,
            ) as answer:
                data = await answer.read()
                if answer.status != 200:
                    raise TurningError(f"{record.name} answered {answer.status} to the check")
                made: dict[str, Any] = json.loads(data)
                return made
        except _ERRORS as error:
            raise TurningError(f"{record.name} did not answer the check: {error!r}") from error

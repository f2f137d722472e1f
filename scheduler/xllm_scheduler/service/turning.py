"""Gives an instance another role: tells its engine, checks that KV really moves, or puts it back.

A change that did nothing answers just as quickly as one that worked, so one real prompt is computed
at the instance that is to prefill, and its KV is used by one that generates.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

import aiohttp

from xllm_scheduler.service.call import prefill_body
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.member import ROLE_PATH
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.routing import Role

_TELL_TIMEOUT = aiohttp.ClientTimeout(total=10.0)
# Two instances that have never met take long to connect: a dozen seconds over UCX on CPUs.
_CHECK_TIMEOUT = aiohttp.ClientTimeout(total=30.0)
_COUNTED_S = 5.0  # for an engine's metrics to tell of a transfer
_LOOK_S = 0.1
_MOVED = re.compile(r"^vllm:nixl_bytes_transferred_sum\{[^}]*\} (\S+)", re.M)
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
    """

    def __init__(self, fleet: Fleet, session: aiohttp.ClientSession, token: str) -> None:
        self._fleet, self._session = fleet, session
        self._own = {"authorization": f"Bearer {token}"}
        self._one_at_a_time = asyncio.Lock()

    async def turn(self, name: str, role: Role) -> None:
        """Change what an instance's engine does; the fleet is told by the caller.

        Raises:
            KeyError: there is none of that name.
            TurningError: it did not take the role, or no KV moved.
        """
        async with self._one_at_a_time:
            member = self._fleet.registry.members[name]
            before, peer = member.role, self._peer(name, role)
            # Nothing new until it is what it is to be, as long as others take requests.
            member.turning = self._others_accept(name)
            try:
                await self._tell(member.record, role)
                if peer is not None:
                    first, then = member.record, peer
                    if role is Role.DECODE:
                        first, then = then, first
                    await self._check(first, then)
            except BaseException:
                # Also where it may have taken the role and only its answer was lost.
                with contextlib.suppress(TurningError):
                    await self._tell(member.record, before)
                raise
            finally:
                member.turning = False

    def _others_accept(self, name: str) -> bool:
        members = self._fleet.registry.members.items()
        return any(member.accepts for other, member in members if other != name)

    def _peer(self, name: str, role: Role) -> Record | None:
        """Who takes the other part of the check; None if there is nothing to check."""
        if role is Role.MIXED:
            return None
        model = self._fleet.registry.members[name].record.models[0]
        for other, member in self._fleet.registry.members.items():
            record = member.record
            if other != name and member.accepts and record.transfers and model in record.models:
                return record
        return None

    async def _tell(self, record: Record, role: Role) -> None:
        try:
            async with self._session.put(
                record.url + ROLE_PATH,
                json={"role": role.value},
                headers=self._own,
                timeout=_TELL_TIMEOUT,
            ) as answer:
                # Without this package there is nothing to tell an engine; its role is routing's.
                if answer.status not in (200, 404, 405):
                    raise TurningError(f"{record.name} answered {answer.status} to its new role")
        except _ERRORS as error:
            raise TurningError(f"{record.name} did not answer: {error!r}") from error

    async def _check(self, first: Record, then: Record) -> None:
        """Have a prompt computed at one instance and its KV used by another one."""
        before = await self._bytes_moved(then)
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
        # Where KV did not come the prompt was computed, and the answer looks the same.
        until_s = time.monotonic() + _COUNTED_S
        while before is not None and await self._bytes_moved(then) == before:
            if time.monotonic() > until_s:
                raise TurningError(f"{then.name} did not get the KV that {first.name} offered")
            await asyncio.sleep(_LOOK_S)

    async def _bytes_moved(self, record: Record) -> float | None:
        """What an instance has fetched over NIXL, by its own count; None if it does not count."""
        try:
            async with self._session.get(record.url + "/metrics", timeout=_TELL_TIMEOUT) as answer:
                found = _MOVED.findall(await answer.text())
        except _ERRORS:
            return None
        return sum(map(float, found)) if found else None

    async def _asked(self, record: Record, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            async with self._session.post(
                record.url + "/v1/completions",
                data=json.dumps(body),
                headers={"content-type": "application/json"},
                timeout=_CHECK_TIMEOUT,
            ) as answer:
                data = await answer.read()
                if answer.status != 200:
                    raise TurningError(f"{record.name} answered {answer.status} to the check")
                made: dict[str, Any] = json.loads(data)
                return made
        except _ERRORS as error:
            raise TurningError(f"{record.name} did not answer the check: {error!r}") from error

"""Asks an instance for all KV blocks that it holds."""

from __future__ import annotations

import asyncio
import logging

import aiohttp

from xllm_kv.snapshot import Snapshot
from xllm_scheduler.service.member import KV_PATH
from xllm_scheduler.service.registry import Record

# The engine answers between two steps.
_TIMEOUT = aiohttp.ClientTimeout(total=20.0)
_ERRORS = (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError)
_NOBODY = (404, 405)  # this package, or a publisher of events, is not there
logger = logging.getLogger("xllm.router")


async def snapshot_of(
    session: aiohttp.ClientSession, token: str, record: Record, rank: int
) -> Snapshot | None:
    """What a data-parallel rank of an instance holds; None if it does not say.

    Args:
        session: to instances.
        token: the admin token, which they share; without one nobody is asked.
        record: the instance.
        rank: of its data-parallel ranks.
    """
    if not token:
        return None
    try:
        async with session.get(
            record.url + KV_PATH,
            params={"rank": str(rank)},
            headers={"authorization": f"Bearer {token}"},
            timeout=_TIMEOUT,
        ) as answer:
            if answer.status == 200:
                return Snapshot.read(await answer.read())
            if answer.status not in _NOBODY:
                logger.warning("%s gives no KV snapshot: %d", record.name, answer.status)
    except _ERRORS as error:
        logger.warning("%s gives no KV snapshot: %r", record.name, error)
    return None

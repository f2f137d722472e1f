"""Waiting for at most a while, in a task that may be cancelled.

``asyncio.wait_for`` loses a cancellation that comes in the moment in which what it waits for is
done (Python before 3.12), and the task then runs on for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

_AGAIN_S = 1.0
logger = logging.getLogger("xllm.router")


async def kept_up(what: str, begin: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do something until it is cancelled; what fails is told in the log and begun again."""
    while True:
        try:
            await begin()
            return
        except Exception:
            logger.exception("%s failed and begins again", what)
        await asyncio.sleep(_AGAIN_S)


async def done_within(seconds: float, awaited: Coroutine[Any, Any, object]) -> bool:
    """Whether something ends in time; if it does not, it is cancelled.

    Raises:
        Exception: whatever it raised in time.
    """
    task = asyncio.ensure_future(awaited)
    try:
        done, _ = await asyncio.wait((task,), timeout=seconds)
        for one in done:
            one.result()
        return bool(done)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))

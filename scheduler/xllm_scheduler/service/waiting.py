"""Waiting for at most a while, in a task that may be cancelled.

``asyncio.wait_for`` loses a cancellation that comes in the moment in which what it waits for is
done (Python before 3.12), and the task then runs on for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


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

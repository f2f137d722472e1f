"""Where offline requests may go: they are pulled by instances that have room, never pushed; pure.

An engine that looks after its online requests is kept from idling by a few that wait there; what
waits here instead can still go to whichever instance has room first. An engine that does not look
would let online requests wait behind them, so it gets a few, and only while none waits.
"""

from __future__ import annotations

import math

from xllm_scheduler.service.routing import InstanceView


def room(view: InstanceView, most: int) -> int:
    """How many more offline requests an instance may get now.

    Args:
        view: the instance.
        most: requests that may wait at an engine that keeps a pace for its online ones; a quarter
            of it may be under way at another one.
    """
    if not view.accepts:
        return 0
    if math.isfinite(view.pace_ms):
        return max(0, most - view.waiting)
    others_wait = view.waiting > view.offline
    return 0 if others_wait else max(0, max(1, most // 4) - view.offline)

"""Seam: stand before a scheduler's publisher of KV events, from the first event on.

A publisher of our own kind cannot be configured, and plugins are loaded in an engine's process
when its core is already being made: the scheduler is the first that can still be reached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target, patch
from xllm_plugins.compat.lazy import when_imported

WHY = "What an engine holds is nowhere written but in its KV events, all of them from the first on."
WITHOUT = "xllm.service is off."
HOLDS_FOR = ">=0.23,<0.33"
_SCHEDULER, _EVENTS = "vllm.v1.core.sched.scheduler", "vllm.distributed.kv_events"
SEAM = (
    Target(f"{_SCHEDULER}:Scheduler.__init__", ("self", "vllm_config", "kv_cache_config")),
    Target(f"{_EVENTS}:EventPublisher.publish", ("self", "events")),
    Target(f"{_EVENTS}:EventPublisher.shutdown", ("self",)),
    Target(f"{_EVENTS}:EventPublisherFactory.create", ("config", "data_parallel_rank")),
)


def install(follow: Callable[[Any], Any]) -> None:
    """Have every scheduler that is made publish by what ``follow(scheduler)`` returns."""

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is its name
            original(self, *args, **kwargs)
            self.kv_event_publisher = follow(self)

        return __init__

    def patch_scheduler(module: ModuleType) -> None:
        patch(module.Scheduler, "__init__", wrap, "kv_events")

    when_imported(_SCHEDULER, patch_scheduler)

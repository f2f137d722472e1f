"""Seam: let an API server ask the engine core process for the features' facts and metrics."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target
from xllm_plugins.compat.lazy import when_imported

WHY = "The engine's counters live in another process than /metrics; utility calls reach it."
HOLDS_FOR = ">=0.26,<0.33"
SEAM = (
    Target("vllm.v1.engine.core:EngineCore"),
    Target(
        "vllm.v1.engine.core_client:AsyncMPClient.call_utility_async", ("self", "method", "args")
    ),
    Target("vllm.plugins.endpoint_plugins.interface:EndpointPlugin"),
)
METHOD = "xllm_status"


def install(status: Callable[[], dict[str, Any]]) -> None:
    """Make ``status()`` callable as a utility of the engine core."""

    def add(module: ModuleType) -> None:
        setattr(module.EngineCore, METHOD, lambda _engine_core: status())

    when_imported("vllm.v1.engine.core", add)


async def ask_engines(engine_client: Any) -> list[dict[str, Any]]:
    """The status of every engine core behind an API server's client, in engine order."""
    core = engine_client.engine_core
    call_all = getattr(core, "call_utility_all_async", None)
    if call_all is not None:
        return list(await call_all(METHOD))
    return [await core.call_utility_async(METHOD)]


def server_index(engine_client: Any) -> int:
    """Which of the API servers of this instance the client belongs to."""
    return int(getattr(engine_client.engine_core, "client_index", 0))

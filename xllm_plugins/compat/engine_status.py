"""Seam: let an API server ask the engine core process for features' facts, and command them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target
from xllm_plugins.compat.lazy import when_imported

WHY = "Engine counters and schedulers live in another process than HTTP; utility calls reach it."
WITHOUT = "xllm.service is off; no metrics, no /xllm/v1/status."
HOLDS_FOR = ">=0.26,<0.33"
SEAM = (
    Target("vllm.v1.engine.core:EngineCore"),
    Target(
        "vllm.v1.engine.core_client:AsyncMPClient.call_utility_async", ("self", "method", "args")
    ),
    Target("vllm.plugins.endpoint_plugins.interface:EndpointPlugin"),
)
METHOD, TELL = "xllm_status", "xllm_tell"
Tell = Callable[[Any, str, Mapping[str, Any]], Mapping[str, Any]]
"""Given the engine core, a feature's name and a command, its answer."""


def install(status: Callable[[Any], dict[str, Any]], tell: Tell) -> None:
    """Make both callable as utilities of the engine core."""

    def add(module: ModuleType) -> None:
        setattr(module.EngineCore, METHOD, status)
        setattr(module.EngineCore, TELL, tell)

    when_imported("vllm.v1.engine.core", add)


async def ask_engines(engine_client: Any) -> list[dict[str, Any]]:
    """The status of every engine core behind an API server's client, in engine order."""
    return await _called(engine_client, METHOD)


async def tell_engines(
    engine_client: Any, feature: str, command: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Give every engine core a feature's command; their answers, in engine order."""
    return await _called(engine_client, TELL, feature, dict(command))


async def _called(engine_client: Any, method: str, *args: Any) -> list[dict[str, Any]]:
    core = engine_client.engine_core
    call_all = getattr(core, "call_utility_all_async", None)
    if call_all is not None:
        return list(await call_all(method, *args))
    return [await core.call_utility_async(method, *args)]


def server_index(engine_client: Any) -> int:
    """Which of the API servers of this instance the client belongs to."""
    return int(getattr(engine_client.engine_core, "client_index", 0))

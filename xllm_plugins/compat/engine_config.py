"""Seam: see and steer vLLM's configuration when it has just been built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target, patch
from xllm_plugins.compat.lazy import when_imported

WHY = "Features choose scheduler, connector and proposer from the finished configuration."
HOLDS_FOR = ">=0.23,<0.33"
SEAM = (
    Target("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("usage_context", "headless")),
    Target("vllm.config:VllmConfig"),
)


def install(attach: Callable[[Any, Any], None]) -> None:
    """Call ``attach(engine_args, vllm_config)`` on every configuration that vLLM builds."""

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            vllm_config = original(self, *args, **kwargs)
            attach(self, vllm_config)
            return vllm_config

        return create_engine_config

    def wrap(module: ModuleType) -> None:
        patch(module.EngineArgs, "create_engine_config", make, "engine_config")

    when_imported("vllm.engine.arg_utils", wrap)

"""Seam: see and steer vLLM's configuration when it has just been built."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target, patch
from xllm_plugins.compat.lazy import when_imported

WHY = "Features choose scheduler, connector and proposer from the finished configuration."
WITHOUT = "Nothing attaches: vLLM serves as without plugins."
HOLDS_FOR = ">=0.23,<0.33"
SEAM = (
    Target("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("usage_context", "headless")),
    Target("vllm.config:VllmConfig"),
)


def install(
    prepare: Callable[[Any], Mapping[str, Any]], attach: Callable[[Any, Any], None]
) -> None:
    """Take part in every configuration that vLLM builds.

    Args:
        prepare: given the engine arguments, those to build from instead, by name.
        attach: given the engine arguments as the user gave them, and the finished configuration.
    """

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            changes = prepare(self)
            given = {name: getattr(self, name) for name in changes}
            vars(self).update(changes)
            try:
                vllm_config = original(self, *args, **kwargs)
            finally:
                vars(self).update(given)
            attach(self, vllm_config)
            return vllm_config

        return create_engine_config

    def wrap(module: ModuleType) -> None:
        patch(module.EngineArgs, "create_engine_config", make, "engine_config")

    when_imported("vllm.engine.arg_utils", wrap)

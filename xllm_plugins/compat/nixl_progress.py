"""Seam: NIXL's progress thread, in a process that computes on the cores it would take.

NIXL's thread waits for UCX's events, for at most ``pthrDelay``, which its Python package sets to 0:
it then asks without end. On a GPU's host that is a core of many; on vLLM's CPU platform it is one
that computes, of which it takes half.
"""

from __future__ import annotations

import importlib
from typing import Any

from xllm_plugins.compat import NIXL, Target, patch

WHY = "NIXL's progress thread polls without a pause, on cores that compute where the device is one."
WITHOUT = "With kv.transfer nixl a server on a CPU has up to a core less."
HOLDS_FOR = ">=1,<2"
UPSTREAM = NIXL
SEAM = (
    Target("nixl._api:nixlBind.nixlAgentConfig.pthrDelay"),
    Target("nixl._api:nixl_agent"),
)
_WAIT_US = 1000  # the least that makes it wait for events, which wake it before


def wait_for_events() -> None:
    """Have the agents that this process makes from now on wait for events, if this is a CPU."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        bindings = importlib.import_module("nixl._api").nixlBind
        patch(bindings, "nixlAgentConfig", _patient, "nixl_progress")


def _patient(config: Any) -> Any:
    """NIXL's class of configurations, in which nothing polls without a pause."""

    class PatientConfig(config):  # type: ignore[misc]
        @property
        def pthrDelay(self) -> int:  # noqa: N802 - NIXL's name
            return int(config.pthrDelay.fget(self))

        @pthrDelay.setter
        def pthrDelay(self, delay_us: int) -> None:  # noqa: N802
            config.pthrDelay.fset(self, max(delay_us, _WAIT_US))

    return PatientConfig

"""The class of a request, online or offline, and the SLOs it carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from xllm_plugins.errors import ConfigError
from xllm_scheduler.config import SchedulerSection

CLASS_KEY = "xllm_class"
TTFT_KEY = "xllm_ttft_ms"
TPOT_KEY = "xllm_tpot_ms"
FLEX, PRIORITY, DEFAULT = "flex", "priority", "default"
_TIERS = ("auto", DEFAULT, FLEX, PRIORITY, "scale", "standard_only")  # the last is Anthropic's


class ServiceClass(str, Enum):
    """Online requests have SLOs; offline requests take what is left."""

    ONLINE = "online"
    OFFLINE = "offline"


@dataclass(frozen=True)
class Service:
    """What one request is owed. The SLOs are in ms; offline requests have none."""

    kind: ServiceClass
    ttft_ms: float
    tpot_ms: float

    @property
    def online(self) -> bool:
        """Whether the SLOs count."""
        return self.kind is ServiceClass.ONLINE


def classify(xargs: Mapping[str, Any], priority: int, section: SchedulerSection) -> Service:
    """The class and SLOs of a request.

    Args:
        xargs: the request's ``vllm_xargs``; ``xllm_class``, ``xllm_ttft_ms`` and ``xllm_tpot_ms``
            win over everything else.
        priority: vLLM's request priority, lower is earlier.
        section: the defaults.

    Raises:
        ConfigError: one of the three has a value that it cannot have.
    """
    kind = xargs.get(CLASS_KEY)
    if kind is None:
        late = priority > section.offline_above_priority
        kind = ServiceClass.OFFLINE if late else ServiceClass.ONLINE
    elif kind not in [c.value for c in ServiceClass]:
        raise ConfigError(f"{CLASS_KEY} is {kind!r}; allowed is online or offline.")
    return Service(
        ServiceClass(kind),
        _slo_ms(xargs, TTFT_KEY, section.ttft_ms),
        _slo_ms(xargs, TPOT_KEY, section.tpot_ms),
    )


def complete_xargs(
    xargs: Mapping[str, Any], service_tier: str | None, section: SchedulerSection
) -> tuple[dict[str, Any], str | None]:
    """What the engine shall see of a request that names an OpenAI service tier.

    Returns:
        The request's ``vllm_xargs`` with the tier's class and SLOs filled in where the request said
        nothing itself, and the tier to answer with (None if the request named none).

    Raises:
        ConfigError: the tier or one of our keys has a value that it cannot have.
    """
    filled = dict(xargs)
    served = service_tier
    if service_tier is not None and service_tier not in _TIERS:
        raise ConfigError(f"service_tier is {service_tier!r}; allowed is {', '.join(_TIERS)}.")
    if service_tier == FLEX:
        filled.setdefault(CLASS_KEY, ServiceClass.OFFLINE.value)
    elif service_tier == PRIORITY:
        filled.setdefault(CLASS_KEY, ServiceClass.ONLINE.value)
        filled.setdefault(TTFT_KEY, section.ttft_ms * section.priority_tier_factor)
        filled.setdefault(TPOT_KEY, section.tpot_ms * section.priority_tier_factor)
    elif service_tier is not None:
        served = DEFAULT
    classify(filled, 0, section)
    return filled, served


def _slo_ms(xargs: Mapping[str, Any], key: str, default: float) -> float:
    value = xargs.get(key, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not 0.0 < number < float("inf"):
        raise ConfigError(f"{key} is {value!r}; allowed is a number of milliseconds above 0.")
    return number

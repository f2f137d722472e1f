"""The class of a request, online or offline, and the SLOs it carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from xllm_plugins.compat.request_class import RefusalError, Said
from xllm_scheduler.config import SchedulerSection

CLASS_KEY = "xllm_class"
TTFT_KEY = "xllm_ttft_ms"
TPOT_KEY = "xllm_tpot_ms"
FLEX, PRIORITY, DEFAULT = "flex", "priority", "default"
# What llm-d's router sends, and the older spelling after it.
_OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
_SLO_HEADERS = {
    TTFT_KEY: ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"),
    TPOT_KEY: ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms"),
}
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
        RefusalError: one of the three has a value that it cannot have.
    """
    kind = xargs.get(CLASS_KEY)
    if kind is None:
        late = priority > section.offline_above_priority
        kind = ServiceClass.OFFLINE if late else ServiceClass.ONLINE
    elif kind not in [c.value for c in ServiceClass]:
        raise RefusalError(f"{CLASS_KEY} is {kind!r}; allowed is online or offline.")
    return Service(
        ServiceClass(kind),
        _slo_ms(xargs, TTFT_KEY, section.ttft_ms),
        _slo_ms(xargs, TPOT_KEY, section.tpot_ms),
    )


def complete_xargs(said: Said, section: SchedulerSection) -> tuple[dict[str, Any], str | None]:
    """What the engine shall see of a request, value by value from the first source that has it.

    Returns:
        The request's ``vllm_xargs``, with class and SLOs filled in from the headers, then from the
        service tier, and the tier to answer with (None if the request named none).

    Raises:
        RefusalError: something has a value that it cannot have, or cannot reach the engine.
    """
    filled, tier = dict(said.xargs), said.service_tier
    if tier is not None and tier not in _TIERS:
        raise RefusalError(
            f"service_tier is {tier!r}; allowed is {', '.join(_TIERS)}.", "service_tier"
        )
    for key, value in _from_headers(said.headers, section).items():
        filled.setdefault(key, value)
    if tier == FLEX:
        filled.setdefault(CLASS_KEY, ServiceClass.OFFLINE.value)
    elif tier == PRIORITY:
        filled.setdefault(CLASS_KEY, ServiceClass.ONLINE.value)
        filled.setdefault(TTFT_KEY, section.ttft_ms * section.priority_tier_factor)
        filled.setdefault(TPOT_KEY, section.tpot_ms * section.priority_tier_factor)
    if filled:
        classify(filled, 0, section)
    offline = filled.get(CLASS_KEY) == ServiceClass.OFFLINE.value
    if said.beam_search and (offline or TTFT_KEY in filled or TPOT_KEY in filled):
        raise RefusalError(
            "use_beam_search is True, and vLLM carries no class and no SLO to beam search; "
            "allowed is an online request with the default SLOs.",
            "use_beam_search",
        )
    if tier is None:
        return filled, None
    # OpenAI's answer names the tier that was used, not the one that was asked for.
    return filled, FLEX if offline else PRIORITY if tier == PRIORITY else DEFAULT


def _from_headers(headers: Mapping[str, str], section: SchedulerSection) -> dict[str, Any]:
    found: dict[str, Any] = {}
    objective = next(filter(None, map(headers.get, _OBJECTIVE_HEADERS)), None)
    if objective is not None:
        found[CLASS_KEY] = section.objectives.get(objective, ServiceClass.ONLINE.value)
    for key, names in _SLO_HEADERS.items():
        for name in names:
            if name in headers:
                found.setdefault(key, _slo_ms(headers, name, 0.0, name))
    return found


def _slo_ms(
    values: Mapping[str, Any], key: str, default: float, param: str = "vllm_xargs"
) -> float:
    value = values.get(key, default)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = 0.0
    if isinstance(value, bool) or not 0.0 < number < float("inf"):
        raise RefusalError(
            f"{key} is {value!r}; allowed is a number of milliseconds above 0.", param
        )
    return number

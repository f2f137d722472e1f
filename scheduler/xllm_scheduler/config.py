"""Settings of the elastic scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_plugins.config import Section, option


@dataclass(frozen=True)
class SchedulerSection(Section):
    """The ``scheduler`` section."""

    policy: str = option("elastic", "the step policy, by the name under which a plugin offers it")
    ttft_ms: float = option(2000.0, "online SLO: time to first token, ms", above=0.0)
    tpot_ms: float = option(100.0, "online SLO: mean time per output token, ms", above=0.0)
    offline_above_priority: int = option(
        1, "a request with a priority above this is offline; vLLM serves lower values first"
    )
    priority_tier_factor: float = option(
        0.5, "service_tier priority multiplies the default SLOs by this", above=0.0, at_most=1.0
    )
    online_share: float = option(
        0.9,
        "share of the TPOT SLO that a step with offline work may take; the rest is margin",
        above=0.0,
        at_most=1.0,
    )
    idle_step_share: float = option(
        0.25,
        "share of the TTFT SLO that a step without online work may take, since an online request "
        "may arrive during it",
        above=0.0,
        at_most=1.0,
    )
    offline_hold_ms: float = option(
        2000.0, "the longest that all offline work is held at a stretch, ms", above=0.0
    )

"""Settings of the elastic scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from xllm_plugins.config import Section, option

ClassName = Literal["online", "offline"]


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
    objectives: Mapping[str, ClassName] = option(
        {}, "class by the name in the inference objective header; other names are online"
    )
    online_share: float = option(
        0.9,
        "share of the TPOT SLO that a step with offline work may take while the margin builds up",
        above=0.0,
        at_most=1.0,
    )
    margin_steps: float = option(
        0.6,
        "how long before an online token is due a step with offline work shall end, in TPOT SLOs; "
        "more while the latency model errs",
        at_least=0.0,
        at_most=2.0,
    )
    idle_step_share: float = option(
        0.33,
        "share of the TTFT SLO that a step without online work may take, since an online request "
        "may arrive during it",
        above=0.0,
        at_most=1.0,
    )
    offline_floor: float = option(
        0.005,
        "share of the time that offline work gets even where online work needs it all",
        at_least=0.0,
        at_most=1.0,
    )
    offline_ageing_s: float = option(
        30.0, "after so long without any, that share has doubled; it goes on growing", above=0.0
    )
    profile: str = option("", "a step-time profile to start from; empty for the one saved last")
    profile_dir: str = option(
        "~/.cache/xllm/profiles",
        "where step-time profiles are saved, one per model and hardware; empty for nowhere",
    )

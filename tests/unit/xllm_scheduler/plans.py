"""Makes step views of few words, and plans them, with times that a reader can add up."""

from __future__ import annotations

import math
from typing import Any

from xllm_plugins.latency import StepShape, StepTime
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine.elastic import ElasticPolicy
from xllm_scheduler.engine.policy import (
    OfflineDecodes,
    OnlineDecodes,
    PrefillView,
    StepPlan,
    StepView,
)

# A step takes 10 ms, and 0.5 ms for each prefill token, and 1 ms for each decode.
TIME = StepTime(base=10.0, token=0.5, decode=1.0, error=0.0, ready=True, most_prefill_tokens=4096)
COLD = StepTime()
# The margin is 50 ms, half a TPOT; a step without online work lasts at most 500 ms.
SECTION = SchedulerSection(
    ttft_ms=2000.0,
    tpot_ms=100.0,
    online_share=0.9,
    margin_steps=0.5,
    idle_step_share=0.25,
    offline_floor=0.02,
    offline_ageing_s=30.0,
)
MARGIN_MS = 50.0
NOW_S = 50.0


def online(*due_ms: float, produced: int = 1000, tpot_ms: float = 100.0) -> OnlineDecodes:
    """Online requests that generate; so long already that their margin has built up."""
    count = len(due_ms)
    return OnlineDecodes(
        due_s=[NOW_S + due / 1e3 for due in due_ms],
        produced=[produced] * count,
        tpot_ms=[tpot_ms] * count,
        shape=StepShape(decodes=count),
        tokens=count,
    )


def offline(*new_tokens: int) -> OfflineDecodes:
    """Offline requests that generate, ``off0``, ``off1`` and so on."""
    count = len(new_tokens)
    return OfflineDecodes([f"off{i}" for i in range(count)], [0] * count, new_tokens)


def prompt(name: str, tokens: int, due_ms: float = math.inf, **changes: Any) -> PrefillView:
    """A running request in prefill. A finite ``due_ms`` makes it online."""
    return PrefillView(
        name,
        online=math.isfinite(due_ms),
        running=True,
        due_s=NOW_S + due_ms / 1e3,
        new_tokens=tokens,
    )._replace(**changes)


def new_prompt(name: str, tokens: int, due_ms: float = math.inf, **changes: Any) -> PrefillView:
    """A waiting request."""
    return prompt(name, tokens, due_ms, **{"running": False, **changes})


def plan(section: SchedulerSection = SECTION, **view: Any) -> StepPlan:
    values = {"start_s": NOW_S, "max_tokens": 4096, "step_time": TIME, **view}
    return ElasticPolicy(section).plan(StepView(**values))


def target_ms(**view: Any) -> float:
    """How long a step may take into which an endless offline prompt would like to go."""
    return plan(prefills=[prompt("off", 4000)], **view).target_ms


def step_ms(**view: Any) -> float:
    """How long such a step takes."""
    return plan(prefills=[prompt("off", 4000)], **view).planned_ms

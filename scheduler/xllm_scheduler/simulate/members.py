"""What a virtual cluster is made of, and what its instances and clients say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xllm_plugins.latency import COEFFICIENTS
from xllm_scheduler.classes import CLASS_KEY, TPOT_KEY, TTFT_KEY, ServiceClass
from xllm_scheduler.service.registry import Record
from xllm_scheduler.service.routing import Role
from xllm_scheduler.simulate.engine import ELASTIC, Engine
from xllm_scheduler.simulate.hardware import Link
from xllm_scheduler.simulate.instance import Instance
from xllm_scheduler.simulate.outcomes import Outcome
from xllm_scheduler.simulate.profiles import Profile

MODEL = "m"  # all instances serve one


@dataclass(frozen=True)
class Failure:
    """An instance is lost, and comes back.

    Attributes:
        instance: which.
        at_s: when it is lost.
        back_s: when it is there again, empty; infinite for never.
    """

    instance: str
    at_s: float
    back_s: float


@dataclass(frozen=True)
class ClusterSpec:
    """What the cluster is.

    Attributes:
        roles: the role of each instance at the beginning; one entry per instance.
        link: what KV travels by.
        drain: whether an instance finishes what it has before its role changes; without, it takes
            requests of the new kind at once and finishes the others beside them.
        role_change_ms: how long a change of role takes once the instance has drained.
        roles_every_s: how often the role policy is asked.
        beat_s: how often instances report their load to the router.
        failures: which instances are lost, and when.
        sample_s: how often the instances are looked at for the report.
    """

    roles: Sequence[Role]
    link: Link
    drain: bool = True
    role_change_ms: float = 100.0
    roles_every_s: float = 5.0
    beat_s: float = 0.25
    failures: Sequence[Failure] = ()
    sample_s: float = 1.0


def record_of(instance: Instance, engine: Engine, profile: Profile, link: Link) -> Record:
    """What an instance says of itself when it joins."""
    times = profile.step_time
    keeps_pace = engine.spec.scheduler == ELASTIC
    return Record(
        name=instance.instance_id,
        url="",
        models=(MODEL,),
        role=instance.role,
        block_tokens=engine.block_tokens if engine.spec.kv_events else 0,
        kv_tokens=engine.kv_tokens,
        step_tokens=engine.step_tokens,
        step_time={name: getattr(times, name) for name in COEFFICIENTS},
        pace_ms=float(engine.spec.settings.get("tpot_ms", 0.0)) if keeps_pace else 0.0,
        transfers=True,
        transfer_ms=link.latency_ms,
        transfer_token_ms=engine.kv_token_bytes / link.bytes_s * 1e3,
    )


def xargs_of(outcome: Outcome) -> dict[str, Any]:
    """As a client says a request's class and SLOs."""
    if not outcome.online:
        return {CLASS_KEY: ServiceClass.OFFLINE.value}
    return {
        CLASS_KEY: ServiceClass.ONLINE.value,
        TTFT_KEY: outcome.slo.ttft_ms,
        TPOT_KEY: outcome.slo.tpot_ms,
    }

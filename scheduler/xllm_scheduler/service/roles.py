"""Which instances prefill, which generate, and which do both, as the load moves.

Each division of the instances is judged by its pressure: the share that the present demand is of
the largest demand like it under which the SLOs would hold, 1 where they just do. What a step takes
whatever it computes is no demand. With prefills that take ``P`` of one instance's time, requests
that generate and add ``L`` ms to a step of all of them together, ``n`` instances and a TPOT SLO
that leaves ``F`` of its ``T`` ms beside what a step takes anyway:

    apart, k prefill:   max(P / k, L / (n - k) / F)
    all of them mixed:  (P T + L) / n / F               where the engine keeps a pace;
                        x^2, F x^2 = (P T + L) / n + 1.3 x sqrt(m) w / a      where it does not

Without a pace an answer of ``a`` tokens is interrupted by the prompts that come meanwhile, ``w`` ms
each: about Poisson, ``m = P / n * a T / w`` of them, and one answer in ten has 1.3 deviations more.

The division with the lowest pressure is taken if it is lower by a margin, for several looks in a
row, not soon after the last change, and not while there is little to do. Source: the pools and the
check by simulated redistribution are those of xLLM's and llm-d's controllers (arXiv 2510.14686;
WVA); the pressure is ours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from xllm_scheduler.service.routing import InstanceView, Role, RolePolicy

if TYPE_CHECKING:
    from xllm_scheduler.service.config import RouterSection

_BACKLOG_S = 2.0  # in which prompts that wait have to be computed beside those to come
_TAIL = 1.3  # standard deviations that one in ten is beyond
_LITTLE = 0.25  # a pressure below which any division will do
_LEAST_LEFT = 0.02  # of a TPOT SLO, to divide by where a step takes more than that anyway


class Demand(NamedTuple):
    """What the instances are asked for, in all.

    Attributes:
        prefills: of one instance's time, 1.0 for all of it.
        running: requests that generate.
        context_tokens: what they have for context.
        prompt_ms: what one prompt takes of an instance's time.
        answer_tokens: what an answer has.
    """

    prefills: float
    running: float
    context_tokens: float
    prompt_ms: float = 1.0
    answer_tokens: float = 1.0


@dataclass
class _Looks:
    """What the last looks at some instances have found: how many agree on which division."""

    agreed: int = 0
    wanted: int = -1
    changed_s: float = -math.inf


class DynamicRoles(RolePolicy):
    """See the module.

    Args:
        ttft_ms: the SLO of most requests.
        tpot_ms: the SLO of most requests.
        margin: by how much of it the pressure has to fall for a change.
        patience: how many looks in a row have to agree.
        cool_down_s: the time between two changes.
        overload: a pressure at which neither patience nor cool-down is kept.
    """

    def __init__(
        self,
        ttft_ms: float,
        tpot_ms: float,
        *,
        margin: float = 0.1,
        patience: int = 2,
        cool_down_s: float = 10.0,
        overload: float = 1.2,
    ) -> None:
        self._ttft_ms, self._tpot_ms = ttft_ms, tpot_ms
        self._margin, self._patience = margin, patience
        self._cool_down_s, self._overload = cool_down_s, overload
        self._groups: defaultdict[str, _Looks] = defaultdict(_Looks)  # by model

    @classmethod
    def of(cls, section: RouterSection) -> DynamicRoles:
        """As settings say."""
        return cls(
            section.ttft_ms,
            section.tpot_ms,
            margin=section.role_margin,
            patience=section.role_patience,
            cool_down_s=section.role_cool_down_s,
        )

    def roles(self, instances: Sequence[InstanceView], now_s: float) -> Mapping[str, Role]:
        """See :class:`RolePolicy`; instances that serve one model are divided among themselves."""
        there: defaultdict[str, list[InstanceView]] = defaultdict(list)
        for instance in instances:
            if instance.accepts and instance.transfers:
                there[instance.model].append(instance)
        wanted: dict[str, Role] = {}
        for model, group in there.items():
            wanted |= self._divided(group, self._groups[model], now_s)
        return wanted

    def _divided(
        self, there: Sequence[InstanceView], looks: _Looks, now_s: float
    ) -> Mapping[str, Role]:
        if len(there) < 2:
            return {i.instance_id: Role.MIXED for i in there if i.role is not Role.MIXED}
        demand = demand_of(there)
        count = len(there)
        present = sum(i.role is Role.PREFILL for i in there)
        mixed = any(i.role is Role.MIXED for i in there)
        now = 0 if mixed else present
        pressures = [self.pressure(there, demand, k) for k in range(count)]
        best = min(range(count), key=pressures.__getitem__)
        gains = pressures[best] < pressures[now] * (1.0 - self._margin)
        if not gains or pressures[now] < _LITTLE:
            looks.agreed = 0
            return {}
        looks.agreed = looks.agreed + 1 if best == looks.wanted else 1
        looks.wanted = best
        pressed = pressures[now] > self._overload
        waits = looks.agreed < self._patience or now_s - looks.changed_s < self._cool_down_s
        if waits and not pressed:
            return {}
        looks.changed_s, looks.agreed = now_s, 0
        return _assigned(there, best)

    def pressure(self, there: Sequence[InstanceView], demand: Demand, prefills: int) -> float:
        """The pressure with so many prefill instances, the rest for decode; with 0, all mixed."""
        count, slo_ms, times = len(there), self._tpot_ms, there[0].step_time
        decodes = count - prefills
        anyway_ms = times.base + times.experts_ms(max(1, round(demand.running / decodes)))
        left_ms = max(slo_ms - anyway_ms, _LEAST_LEFT * slo_ms)
        added_ms = (times.decode * demand.running + times.context * demand.context_tokens) / decodes
        if prefills:
            return max(demand.prefills / prefills, added_ms / left_ms)
        share, spread_ms = demand.prefills / count, 0.0
        if not math.isfinite(there[0].pace_ms):
            prompts = share * demand.answer_tokens * slo_ms / demand.prompt_ms
            spread_ms = _TAIL * math.sqrt(prompts) * demand.prompt_ms / demand.answer_tokens
        mean_ms = share * slo_ms + added_ms
        root = (spread_ms + math.sqrt(spread_ms**2 + 4.0 * mean_ms * left_ms)) / (2.0 * left_ms)
        return root**2


def demand_of(instances: Sequence[InstanceView]) -> Demand:
    """What is asked of these instances now and what waits there."""
    backlog_s = sum(i.waiting_ms for i in instances) / 1e3
    prompts_ms = [i.prompt_ms for i in instances if i.prompt_ms > 0.0]
    return Demand(
        prefills=sum(i.prefill_share for i in instances) + backlog_s / _BACKLOG_S,
        running=sum(i.running for i in instances),
        context_tokens=sum(i.context_tokens for i in instances),
        prompt_ms=sum(prompts_ms) / len(prompts_ms) if prompts_ms else 1.0,
        answer_tokens=max(1.0, instances[0].answer_tokens),
    )


def _assigned(there: Sequence[InstanceView], prefills: int) -> dict[str, Role]:
    """So many prefill instances: those that are it already, then those that generate least."""
    if not prefills:
        return {i.instance_id: Role.MIXED for i in there if i.role is not Role.MIXED}
    order = sorted(there, key=lambda i: (i.role is not Role.PREFILL, i.running, i.instance_id))
    chosen = {i.instance_id for i in order[:prefills]}
    wanted = {
        i.instance_id: Role.PREFILL if i.instance_id in chosen else Role.DECODE for i in there
    }
    return {
        i.instance_id: wanted[i.instance_id] for i in there if i.role is not wanted[i.instance_id]
    }

"""Others' published routing rules, as policies to compare with; for benchmarks only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xllm_scheduler.service.forecast import step_ms
from xllm_scheduler.service.routing import (
    InstanceView,
    RequestView,
    Role,
    RolePolicy,
    Route,
    RoutingPolicy,
)


class VllmRouterKvAware(RoutingPolicy):
    """The ``kv_aware`` policy of vLLM's router: the longest match, whatever waits there.

    Without any match the fewest requests count. (vllm-project/router at 71af9941,
    src/policies/kv_aware.rs; of equal matches it takes the last. It also takes prompts that were
    just sent for cached, for two seconds, as ours does for all policies.)
    """

    reads_cached = True

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """See :class:`RoutingPolicy`."""
        there = [i for i in instances if i.accepts]
        if not there:
            return None
        matches = [request.cached.get(i.instance_id, 0.0) for i in there]
        longest = max(matches)
        if longest:
            best = next(
                i for i, m in zip(reversed(there), reversed(matches), strict=True) if m == longest
            )
        else:
            best = min(there, key=lambda i: i.waiting + i.running)
        return Route(best.instance_id, best.instance_id)


class XllmSloAware(RoutingPolicy, RolePolicy):
    """XLLM's SLO-aware choice of a pair of instances, which also turns them.

    (``slo_aware_policy`` of xllm-service; arXiv 2510.14686, section 3.2.) The prefill instance with
    least predicted work; the first decode instance that keeps the TPOT SLO, else the one with the
    lowest TPOT. A prompt goes to a decode instance if no prefill instance can keep the TTFT SLO and
    one of those has time. Without a decode instance that keeps the TPOT SLO, the chosen prefill
    instance becomes one, if prefills have time or there are fewer; a decode instance with nothing
    to generate becomes one for prefills. At least one of each stays.

    Args:
        names: of the instances.
        prefills: how many of them begin as prefill instances.
        ttft_ms, tpot_ms: the SLOs.
        as_coded: leave out what the code leaves out: instances of both kinds never turn from
            prefill to decode.
    """

    def __init__(
        self,
        names: Sequence[str],
        prefills: int,
        ttft_ms: float,
        tpot_ms: float,
        *,
        as_coded: bool,
    ) -> None:
        self._prefills, self._decodes = list(names[:prefills]), list(names[prefills:])
        self._ttft_ms, self._tpot_ms, self._as_coded = ttft_ms, tpot_ms, as_coded

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """See :class:`RoutingPolicy`."""
        views = {i.instance_id: i for i in instances if i.accepts}
        self._turn_idle(views)
        prefills = [views[name] for name in self._prefills if name in views]
        decodes = [views[name] for name in self._decodes if name in views]
        if not prefills or not decodes:
            return None
        first = min(prefills, key=lambda i: i.waiting_ms)
        average_ms = sum(i.waiting_ms for i in prefills) / len(prefills)
        tpots = [step_ms(i, 1, request.prompt_tokens) for i in decodes]
        fitting = next((i for i, t in zip(decodes, tpots, strict=True) if t <= self._tpot_ms), None)
        lowest_ms, lowest = min((t, n) for n, t in enumerate(tpots))
        decode = fitting or decodes[lowest]
        spare = self._tpot_ms * (len(decodes) - 1) / len(decodes)
        overflow = (
            first.waiting_ms > self._ttft_ms
            and fitting is not decodes[lowest]
            and lowest_ms < spare
            and decodes[lowest].waiting_ms < first.waiting_ms
        )
        if overflow:
            name = decodes[lowest].instance_id
            return Route(name, name)
        calm_ms = self._ttft_ms * (len(prefills) - 1) / len(prefills)
        if fitting is None and (average_ms < calm_ms or len(decodes) < len(prefills)):
            self._to_decode(first.instance_id)
        return Route(first.instance_id, decode.instance_id)

    def roles(self, instances: Sequence[InstanceView], now_s: float) -> Mapping[str, Role]:
        """See :class:`RolePolicy`."""
        wanted = dict.fromkeys(self._prefills, Role.PREFILL)
        wanted |= dict.fromkeys(self._decodes, Role.DECODE)
        return {i.instance_id: wanted[i.instance_id] for i in instances if i.instance_id in wanted}

    def _turn_idle(self, views: Mapping[str, InstanceView]) -> None:
        for name in list(self._decodes):
            if len(self._decodes) > 1 and name in views and not views[name].running:
                self._decodes.remove(name)
                self._prefills.append(name)

    def _to_decode(self, name: str) -> None:
        if len(self._prefills) > 1 and not self._as_coded:
            self._prefills.remove(name)
            self._decodes.append(name)

"""Routing by prediction: where KV lies, what waits, what generates, in ms of each instance's own.

``KvAware`` serves a request as a whole at one instance. ``SloAware`` also weighs to compute its
prompt at one instance and to generate at another one, by both SLOs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from xllm_scheduler.service.forecast import (
    Forecast,
    decode_tpot_ms,
    prefill,
    step_ms,
    transfer_ms,
    whole,
)
from xllm_scheduler.service.routing import (
    InstanceView,
    RequestView,
    Role,
    Route,
    RoutingPolicy,
)

_CARE = 0.8  # the share of an SLO that a prediction may use up without being thought late
_WORK = 2.0  # weight of what a prompt takes: those that come next wait for it, too
_TAKEN = 0.2  # weight of the same for each that generates there, and may have time to spare
_LATE_MS = 10_000.0  # what being late by one SLO costs
_FULL = 0.95  # used share of the KV cache beyond which a request would wait for blocks


class KvAware(RoutingPolicy):
    """The instance where a request is predicted to begin first and takes least, all in time.

    ``cost = TTFT + (2 + running / 5) * work + lateness``: work is the time that its prompt takes
    there, running how many generate there, lateness what it would be late by its SLOs. How fast an
    answer is that is in time does not count; without an SLO ``n * TPOT`` does, n the tokens that it
    is expected to have.
    """

    reads_cached = True

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """See :class:`RoutingPolicy`."""
        accepting = [i for i in instances if i.accepts]
        if not accepting:
            return None
        costs = [(i.instance_id, _whole_cost(request, i, whole(request, i))) for i in accepting]
        best, _ = min(costs, key=lambda pair: pair[1])
        return Route(best, best, "lowest predicted cost", costs)


class SloAware(RoutingPolicy):
    """Whole at one instance, or prefilled at one and generated at another one.

    Both are costed alike: predicted completion, what it takes from others, and a penalty for what
    the request would be late by either SLO.
    """

    reads_cached = True

    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """See :class:`RoutingPolicy`."""
        accepting = [i for i in instances if i.accepts]
        if not accepting:
            return None
        prefills = [i for i in accepting if i.role is Role.PREFILL and i.transfers]
        others = [i for i in accepting if i.role is not Role.PREFILL] or accepting
        costs: list[tuple[str, float]] = []
        routes: list[Route] = []
        for instance in others:
            cost = _whole_cost(request, instance, whole(request, instance))
            costs.append((instance.instance_id, cost))
            routes.append(Route(instance.instance_id, instance.instance_id, "whole"))
        if prefills and request.output_tokens > 1.0:
            first, first_ms, work_ms = _earliest(request, prefills)
            for instance in (i for i in others if i is not first and i.transfers):
                cost = _split_cost(request, first_ms, work_ms, instance)
                costs.append((f"{first.instance_id}>{instance.instance_id}", cost))
                routes.append(Route(first.instance_id, instance.instance_id, "apart"))
        best = min(range(len(costs)), key=lambda index: costs[index][1])
        return routes[best]._replace(costs=costs)


def _earliest(
    request: RequestView, among: Sequence[InstanceView]
) -> tuple[InstanceView, float, float]:
    """Who would be done with the prompt first and with least work, when, and with how much."""
    times = [(*prefill(request, i), index) for index, i in enumerate(among)]
    first_ms, work_ms, index = min(times, key=lambda time: time[0] + _WORK * time[1])
    return among[index], first_ms, work_ms


def _whole_cost(request: RequestView, instance: InstanceView, found: Forecast) -> float:
    cost = _cost(request, instance, found.ttft_ms, found.tpot_ms) + _WORK * found.work_ms
    if math.isfinite(instance.pace_ms):
        return cost  # its engine keeps others from being late
    return cost + _TAKEN * instance.running * found.work_ms


def _split_cost(
    request: RequestView, first_ms: float, work_ms: float, instance: InstanceView
) -> float:
    # The first token is generated where the KV arrives.
    first_ms += transfer_ms(request, instance) + step_ms(instance)
    tpot_ms = decode_tpot_ms(request, instance)
    return _cost(request, instance, first_ms, tpot_ms) + _WORK * work_ms


def _cost(request: RequestView, instance: InstanceView, ttft_ms: float, tpot_ms: float) -> float:
    cost = ttft_ms
    if request.online:
        cost += _LATE_MS * (_excess(ttft_ms, request.ttft_ms) + _excess(tpot_ms, request.tpot_ms))
    else:
        cost += request.output_tokens * tpot_ms
    if instance.kv_used > _FULL:
        cost += _LATE_MS * (instance.kv_used - _FULL) / (1.0 - _FULL)
    return cost


def _excess(predicted_ms: float, slo_ms: float) -> float:
    return max(0.0, predicted_ms / slo_ms - _CARE)

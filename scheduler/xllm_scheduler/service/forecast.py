"""What a request would meet at an instance: predicted TTFT and TPOT, from its own step times.

An engine that keeps a pace (the elastic scheduler) gives prefills what its decodes leave of each
step; another one takes as large a chunk as a step holds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from xllm_scheduler.service.routing import InstanceView, RequestView

_LEAST_ROOM = 0.05  # of a pace: what prefills get where decodes use it up
_MOST_SHARE = 0.95  # of the time that prefills take


class Forecast(NamedTuple):
    """What is predicted.

    Attributes:
        ttft_ms: from now to the first token.
        tpot_ms: of the tokens after it.
        work_ms: what of the instance's time the prompt takes.
    """

    ttft_ms: float
    tpot_ms: float
    work_ms: float


def whole(request: RequestView, instance: InstanceView) -> Forecast:
    """Prompt and answer at one instance."""
    ttft_ms, work_ms = prefill(request, instance)
    return Forecast(ttft_ms, decode_tpot_ms(request, instance, prefills_too=True), work_ms)


def prefill(request: RequestView, instance: InstanceView) -> tuple[float, float]:
    """Time to the first token, and what of the instance's time the prompt itself takes; ms."""
    times = instance.step_time
    cached = request.cached.get(instance.instance_id, 0.0)
    new_tokens = max(1.0, request.prompt_tokens - cached)
    work_ms = new_tokens * (times.token + times.cross * cached + times.square * new_tokens)
    decode_ms = step_ms(instance)
    room_ms = times.token * instance.step_tokens
    if instance.running:
        left_ms = max(instance.pace_ms - decode_ms, _LEAST_ROOM * instance.pace_ms)
        room_ms = min(room_ms, left_ms) if math.isfinite(instance.pace_ms) else room_ms
    before_ms = instance.waiting_ms + work_ms
    steps = math.ceil(before_ms / room_ms) if room_ms > 0.0 else 1
    # It arrives in the middle of a step, if there is one.
    started = 0.5 if instance.running or instance.waiting else 0.0
    return before_ms + (steps + started) * decode_ms, work_ms


def decode_tpot_ms(
    request: RequestView, instance: InstanceView, *, prefills_too: bool = False
) -> float:
    """Time per output token with this request among those that generate.

    Args:
        request: the one more.
        instance: where.
        prefills_too: whether those that wait there come to generate beside it.
    """
    more = 1 + (instance.waiting if prefills_too else 0)
    context = request.prompt_tokens + request.output_tokens / 2.0
    if prefills_too:
        context += instance.waiting_tokens
    step = step_ms(instance, more, context)
    slowed = step / (1.0 - min(instance.prefill_share, _MOST_SHARE))
    return max(step, min(slowed, instance.pace_ms))


def step_ms(instance: InstanceView, more: int = 0, context_tokens: float = 0.0) -> float:
    """How long a step without prefills takes there, with so many more requests."""
    times = instance.step_time
    decodes = instance.running + more
    return (
        times.base
        + times.decode * decodes
        + times.context * (instance.context_tokens + context_tokens)
        + times.experts_ms(max(1, decodes))
    )


def transfer_ms(request: RequestView, instance: InstanceView) -> float:
    """How long it takes to fetch the KV of the prompt, beside what is there."""
    there = request.cached.get(instance.instance_id, 0.0)
    missing = max(0.0, request.prompt_tokens - there)
    return instance.transfer_ms + instance.transfer_token_ms * missing

"""What an engine's scheduler is, and is busy with, for those who route requests to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_plugins.latency import COEFFICIENTS
from xllm_plugins.status import Report
from xllm_scheduler.service.load import Beat

_FULL_ATTENTION = ("FullAttentionSpec", "MLAAttentionSpec")


def beat_of(scheduler: Any) -> Beat:
    """Read vLLM's queues; O(requests).

    Args:
        scheduler: vLLM's, of whatever class.
    """
    from vllm.v1.request import RequestStatus

    waiting = running = waiting_tokens = context_tokens = 0
    for request in (*scheduler.waiting, *getattr(scheduler, "kv_holding_waiting", ())):
        params = request.kv_transfer_params or {}
        fetches = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        if fetches or params.get("do_remote_prefill"):
            # Its prompt is computed elsewhere, so all that it needs here is to generate.
            running += 1
            context_tokens += request.num_tokens
        else:
            waiting += 1
            waiting_tokens += request.num_tokens - request.num_computed_tokens
    for request in scheduler.running:
        if request.is_prefill_chunk:
            waiting += 1
            waiting_tokens += request.num_tokens - request.num_computed_tokens
        else:
            running += 1
            context_tokens += request.num_tokens
    return Beat(waiting, running, waiting_tokens, context_tokens, scheduler.kv_cache_manager.usage)


def report_of(engine_core: Any) -> Report:
    """What routers may know of an engine, in its own process."""
    scheduler = engine_core.scheduler
    groups = scheduler.kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    full = [index for index, kind in enumerate(kinds) if kind in _FULL_ATTENTION]
    facts: dict[str, Any] = {"load": beat_of(scheduler)._asdict(), "full_groups": full}
    facts["role"] = getattr(scheduler, "role", "")
    if full:
        block_tokens = groups[full[0]].kv_cache_spec.block_size
        blocks = scheduler.kv_cache_config.num_blocks - 1
        facts["block_tokens"] = block_tokens
        facts["kv_tokens"] = blocks * block_tokens // len(groups)
    learned = getattr(scheduler, "step_time", None)
    if learned is not None and learned.ready:
        facts["step_time"] = {name: getattr(learned, name) for name in COEFFICIENTS}
    return Report(facts=facts)


def take_role(scheduler: Any, command: Mapping[str, Any]) -> Mapping[str, Any]:
    """Have a scheduler do what a router gives it to do.

    Args:
        scheduler: vLLM's; only the elastic one looks at its role.
        command: has ``role``.
    """
    heeds = hasattr(scheduler, "role")
    if heeds:
        scheduler.role = command["role"]
    return {"role": command["role"], "heeded": heeds}

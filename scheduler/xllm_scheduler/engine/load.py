"""What an engine's scheduler is, and is busy with, for those who route requests to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_kv.ledger import Ledger
from xllm_plugins.activation import active_features
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
    full, block_tokens = _cache_of(scheduler)
    facts: dict[str, Any] = {"load": beat_of(scheduler)._asdict(), "full_groups": full}
    facts["role"] = getattr(scheduler, "role", "")
    if full:
        config = scheduler.kv_cache_config
        facts["block_tokens"] = block_tokens
        facts["kv_tokens"] = (config.num_blocks - 1) * block_tokens // len(config.kv_cache_groups)
    learned = getattr(scheduler, "step_time", None)
    if learned is not None and learned.ready:
        facts["step_time"] = {name: getattr(learned, name) for name in COEFFICIENTS}
    return Report(facts=facts)


def _cache_of(scheduler: Any) -> tuple[list[int], int]:
    """The KV cache groups with full attention, and the tokens of their blocks."""
    groups = scheduler.kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    full = [index for index, kind in enumerate(kinds) if kind in _FULL_ATTENTION]
    return full, groups[full[0]].kv_cache_spec.block_size if full else 0


def followed(scheduler: Any) -> Any:
    """What a scheduler that has just been made shall publish its KV events by."""
    publisher, config = scheduler.kv_event_publisher, scheduler.vllm_config
    full, block_tokens = _cache_of(scheduler)
    events = config.kv_events_config
    active = "service" in [feature.name for feature in active_features(config)]
    if not (active and full and events and events.enable_kv_cache_events):
        return publisher
    names = config.model_config.served_model_name
    model = names if isinstance(names, str) else names[0]
    return Ledger(publisher, model, block_tokens, full)


def snapshot_of(scheduler: Any, rank: int) -> Mapping[str, Any]:
    """What the engine holds, if it is of that data-parallel rank and follows its own events.

    Args:
        scheduler: vLLM's.
        rank: of its data-parallel ranks.
    """
    ledger = scheduler.kv_event_publisher
    if rank != scheduler.vllm_config.parallel_config.data_parallel_index:
        return {}
    held = ledger.snapshot() if isinstance(ledger, Ledger) else None
    return {} if held is None else {"snapshot": held}


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

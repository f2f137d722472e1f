"""Seam: the levers by which a step of vLLM's scheduler is shaped without copying it.

A subclass shapes the step, calls ``super().schedule()`` and restores. This file knows how each
lever is called in each version, and which of them a given base class really reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from types import SimpleNamespace
from typing import Any

from xllm_plugins.compat import Target

WHY = "vLLM's scheduler has no hook for a step's order, budget, or for holding a request."
WITHOUT = "xllm.scheduler is off: vLLM's own plans steps."
HOLDS_FOR = ">=0.23,<0.33"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
SEAM = (
    Target(f"{_SCHEDULER}.schedule", ("self",)),
    Target(f"{_SCHEDULER}.add_request", ("self", "request")),
    Target(f"{_SCHEDULER}.update_from_output", ("self", "scheduler_output", "model_runner_output")),
    Target(f"{_SCHEDULER}._preempt_request", ("self", "request", "timestamp")),
    Target(f"{_SCHEDULER}._free_request", ("self", "request")),
    Target(f"{_SCHEDULER}._update_request_as_session", ("self", "session", "update")),
    Target(
        f"{_SCHEDULER}._reserve_prefill_lookahead",
        ("self", "request", "num_computed_tokens", "num_new_tokens"),
        versions=">=0.28",
    ),
    Target("vllm.v1.core.sched.async_scheduler:AsyncScheduler"),
    Target("vllm.v1.core.sched.request_queue:RequestQueue"),
    Target("vllm.v1.core.sched.request_queue:create_request_queue", ("policy",)),
)


class Lever(Enum):
    """A way to shape a step; the value is the attribute that ``schedule()`` reads for it."""

    HOLD = "next_decode_eligible_step"
    BUDGET = "max_num_scheduled_tokens"
    CHUNK = "_reserve_prefill_lookahead"


def effective_levers(base: type) -> frozenset[Lever]:
    """The levers that every body of ``schedule()`` of ``base`` reads.

    Some schedulers of other platforms carry their own copy of the body and ignore some levers. A
    ``schedule()`` that reads none and calls ``super()`` counts as the one that it calls.
    """
    return frozenset.intersection(*_bodies(base))


def possible_levers(base: type) -> frozenset[Lever]:
    """The levers that some body of ``schedule()`` of ``base`` reads.

    A ``schedule()`` with a body of its own that calls ``super()`` besides has two of them.
    """
    return frozenset.union(*_bodies(base))


def _bodies(base: type) -> list[frozenset[Lever]]:
    found = []
    for cls in base.__mro__:
        schedule = vars(cls).get("schedule")
        if schedule is None:
            continue
        read = frozenset(lever for lever in Lever if lever.value in schedule.__code__.co_names)
        calls_super = "__class__" in schedule.__code__.co_freevars
        if read or not calls_super:
            found.append(read)
        if not calls_super:
            break
    return found or [frozenset()]


def hold(scheduler: Any, request: Any) -> None:
    """Keep a running request out of the step that is about to be scheduled; its KV stays."""
    request.next_decode_eligible_step = max(
        request.next_decode_eligible_step, scheduler.current_step + 2
    )


@contextmanager
def token_budget(scheduler: Any, tokens: int) -> Iterator[None]:
    """Let one step schedule at most ``tokens`` tokens, never more than vLLM's own budget."""
    full = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = max(0, min(full, tokens))
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = full


def preempt(scheduler: Any, requests: Iterable[Any], timestamp_s: float) -> None:
    """Take running requests' KV blocks and put them back to wait, before a step is scheduled.

    They must not be admitted again by the step that follows: output of theirs may be in flight.
    """
    for request in requests:
        scheduler.running.remove(request)
        if hasattr(request, "drop_stale_output"):
            drop = scheduler.requires_kv_delivery
            scheduler._preempt_request(request, timestamp_s, drop_stale_output=drop)
        else:  # up to 0.25: as vLLM does it inside schedule()
            scheduler._preempt_request(request, timestamp_s)


def can_preempt(scheduler: Any, request: Any) -> bool:
    """Whether preempting a running request frees its blocks at once and loses no token."""
    may_free = getattr(scheduler, "_request_blocks_can_be_freed", None)
    if may_free is None:  # up to 0.25: nothing marks output that is in flight as stale
        return not request.num_output_placeholders
    return bool(may_free(request))


def free_slots(scheduler: Any) -> int:
    """How many more requests may run."""
    most = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
    return int(most - len(scheduler.running) - scheduler.num_waiting_for_streaming_input)


def free_blocks(scheduler: Any) -> int:
    """How many KV blocks are free, cached ones without a user among them."""
    return int(scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def own_blocks(scheduler: Any, request: Any) -> int:
    """How many KV blocks become free when this request gives up its own."""
    groups = scheduler.kv_cache_manager.get_blocks(request.request_id).blocks
    return sum(block.ref_cnt == 1 for group in groups for block in group)


def missing_blocks(scheduler: Any, request: Any) -> int:
    """How many KV blocks a waiting request needs at most, were nothing of its prompt cached."""
    if holds_blocks(scheduler, request):
        return 0
    groups = len(scheduler.kv_cache_config.kv_cache_groups)
    blocks = -(-request.num_tokens // scheduler.block_size) * groups
    # Groups of a sliding window or a state need less; it must not look as if it could never fit.
    return int(min(blocks, scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1))


def holds_blocks(scheduler: Any, request: Any) -> bool:
    """Whether a waiting request holds KV blocks: loaded ones, or those of its session."""
    return request in kv_holding(scheduler)


def kv_holding(scheduler: Any) -> Any:
    """The waiting requests that hold KV blocks; up to 0.31 vLLM has no queue of their own."""
    return getattr(scheduler, "kv_holding_waiting", ())


def idle_experts(vllm_config: Any) -> float:
    """The share of a layer's experts that one token leaves idle; 1 for a dense model."""
    config = vllm_config.model_config
    experts = config.get_num_experts()
    chosen = getattr(config.hf_text_config, "num_experts_per_tok", None)
    if not experts or not isinstance(chosen, int) or not 0 < chosen <= experts:
        return 1.0
    return 1.0 - chosen / float(experts)


def most_step_tokens(scheduler: Any) -> int:
    """The most tokens of one prompt that vLLM computes in a step."""
    budget: int = scheduler.max_num_scheduled_tokens
    threshold: int = scheduler.scheduler_config.long_prefill_token_threshold
    requests = len(scheduler.running) + len(scheduler.waiting)
    if threshold <= 0 or requests <= 1:
        return budget
    if getattr(scheduler, "adaptive_long_prefill_threshold", False):
        threshold = max(threshold, scheduler.scheduler_config.max_num_batched_tokens // requests)
    return min(budget, threshold)


def is_remote(request: Any) -> bool:
    """Whether another instance has computed the prompt, so that its KV is fetched."""
    return bool((request.kv_transfer_params or {}).get("do_remote_prefill"))


def is_ready(scheduler: Any, request: Any) -> bool:
    """Whether a waiting request waits for nothing but its admission."""
    status = request.status.name
    if status.startswith("WAITING_FOR_") and status.endswith("GRAMMAR"):
        asked = request.structured_output_request
        return asked is not None and asked.grammar is not None
    if status == "WAITING_FOR_REMOTE_KVS":
        return request.request_id in scheduler.finished_recving_kv_req_ids
    return status in ("WAITING", "PREEMPTED")


def by_priority(scheduler: Any) -> bool:
    """Whether vLLM orders and preempts requests by their priority."""
    return bool(scheduler.policy.value == "priority")


def is_paused(scheduler: Any) -> bool:
    """Whether requests that wait are kept waiting."""
    return scheduler.pause_state is not type(scheduler.pause_state).UNPAUSED


def reserved_loras(scheduler: Any, sits_out: Callable[[Any], bool]) -> AbstractContextManager[None]:
    """Keep the LoRA slots of running requests that sit a step out.

    vLLM admits waiting requests beside the adapters of those that it schedules in the step, and
    fails in a later one when more of them run than there are slots.
    """
    return nullcontext() if scheduler.lora_config is None else _fewer_loras(scheduler, sits_out)


@contextmanager
def _fewer_loras(scheduler: Any, sits_out: Callable[[Any], bool]) -> Iterator[None]:
    full = scheduler.lora_config
    adapters: dict[bool, set[int]] = {True: set(), False: set()}
    for request in scheduler.running:
        if request.lora_request is not None:
            adapters[bool(sits_out(request))].add(request.lora_request.lora_int_id)
    kept = len(adapters[True] - adapters[False])
    scheduler.lora_config = SimpleNamespace(max_loras=full.max_loras - kept) if kept else full
    try:
        yield
    finally:
        scheduler.lora_config = full


def replace_waiting_queues(scheduler: Any, make: Callable[[Callable[[], Any]], Any]) -> list[Any]:
    """Put queues of ours where the scheduler keeps requests that wait.

    Args:
        scheduler: a scheduler that has no request yet.
        make: given a function that creates one of vLLM's own queues for the configured policy,
            returns the replacement.

    Returns:
        The queues of requests that hold no KV blocks yet.
    """
    from vllm.v1.core.sched.request_queue import create_request_queue

    # Blocked requests: skipped_waiting up to 0.31, in waiting itself from 0.32 on.
    names = [name for name in ("waiting", "skipped_waiting") if hasattr(scheduler, name)]
    queues = []
    for name in names:
        setattr(scheduler, name, make(lambda: create_request_queue(scheduler.policy)))
        queues.append(getattr(scheduler, name))
    return queues

"""Seam: the levers by which a step of vLLM's scheduler is shaped without copying it.

A subclass shapes the step, calls ``super().schedule()`` and restores. This file knows how each
lever is called in each version, and which of them a given base class really reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from xllm_plugins.compat import Target

WHY = "vLLM's scheduler has no hook for a step's order, budget, or for holding a request."
HOLDS_FOR = ">=0.23,<0.33"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
SEAM = (
    Target(f"{_SCHEDULER}.schedule", ("self",)),
    Target(f"{_SCHEDULER}.add_request", ("self", "request")),
    Target(f"{_SCHEDULER}.update_from_output", ("self", "scheduler_output", "model_runner_output")),
    Target(f"{_SCHEDULER}._preempt_request", ("self", "request", "timestamp")),
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
    """The levers that the ``schedule()`` of ``base`` really reads.

    Some schedulers of other platforms carry their own copy of the body and ignore some levers. A
    ``schedule()`` that calls ``super()`` counts together with the one that it calls.
    """
    names: set[str] = set()
    for cls in base.__mro__:
        schedule = vars(cls).get("schedule")
        if schedule is None:
            continue
        names.update(schedule.__code__.co_names)
        if "__class__" not in schedule.__code__.co_freevars:
            break
    return frozenset(lever for lever in Lever if lever.value in names)


def hold(scheduler: Any, request: Any) -> None:
    """Keep a running request out of the step that is about to be scheduled; its KV stays."""
    request.next_decode_eligible_step = max(
        request.next_decode_eligible_step, scheduler.current_step + 2
    )


@contextmanager
def token_budget(scheduler: Any, tokens: int) -> Iterator[None]:
    """Let one step schedule at most ``tokens`` tokens, never more than vLLM's own budget."""
    full = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = min(full, tokens)
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = full


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

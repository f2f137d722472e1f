"""Seam: how many tokens vLLM's own drafting models draft in a step.

With a speculative config that has ``num_speculative_tokens_per_batch_size`` the scheduler looks the
number up in a list by the batch's size, once in each step that is not empty. The list is replaced
by an object that is asked the same and may answer as it likes, and which is told of every step that
has been computed. Both of vLLM's runners read the number from the step's plan. With 0 they still
compute one pass of the drafter, which keeps its KV; the V2 runner's ``draft_model`` and MTP of
several modules compute all passes whatever it is, so that only verification is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target, patch, unread
from xllm_plugins.compat.lazy import when_imported

WHY = "vLLM knows a draft's length by the batch's size alone, whatever is accepted or takes time."
WITHOUT = "Drafting models draft as far as the user says in all steps."
HOLDS_FOR = ">=0.32,<0.33"
_MODULE = "vllm.v1.core.sched.scheduler"
_BASE = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
SEAM = (
    Target(
        f"{_MODULE}:Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Target(
        "vllm.v1.spec_decode.dynamic.utils:build_dynamic_sd_schedule_lookup",
        ("num_speculative_tokens_per_batch_size",),
    ),
    Target(f"{_BASE}.propose", ("self", "num_speculative_tokens", "target_token_ids")),
    Target(
        "vllm.v1.worker.gpu.spec_decode.speculator:BaseSpeculator.propose",
        ("self", "num_speculative_tokens"),
    ),
)
SCHEDULE = "num_speculative_tokens_per_batch_size"
_LOOKUP = "dynamic_sd_lookup"


def check() -> str:
    """Whether the scheduler reads the list in each step, and the V2 runner the number."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    v2 = (GPUModelRunner.execute_model, GPUModelRunner.sample_tokens)
    problems = [unread(method, "num_spec_tokens_to_schedule") for method in v2]
    return next(filter(None, [unread(Scheduler.schedule, _LOOKUP), *problems]), "")


class _Kept(list[int]):
    """vLLM's own list, where nothing is to take its place."""


def install(make: Callable[[Any], Any]) -> None:
    """After a scheduler's first step, put what ``make`` makes in the list's place.

    Args:
        make: given vLLM's configuration; what it makes has ``__getitem__`` for the number and
            ``xllm_see`` for steps. None to leave the list.
    """

    def patch_scheduler(module: ModuleType) -> None:
        patch(
            module.Scheduler, "update_from_output", lambda update: _tell(update, make), "spec_width"
        )

    when_imported(_MODULE, patch_scheduler)


def steered(scheduler: Any) -> Any:
    """What stands in the list's place; None where it is vLLM's or there is none."""
    found = getattr(scheduler, _LOOKUP, None)
    return found if hasattr(found, "xllm_see") else None


def whole_schedule(tokens: int) -> list[list[int]]:
    """The same number for all batches: it makes vLLM look one up in each step."""
    return [[1, 1 << 20, tokens]]


def _tell(original: Any, make: Callable[[Any], Any]) -> Any:
    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        lookup = getattr(self, _LOOKUP, None)
        if type(lookup) is list:
            setattr(self, _LOOKUP, make(self.vllm_config) or _Kept(lookup))
        found = steered(self)
        if found is not None:
            found.xllm_see(scheduler_output, model_runner_output)
        return original(self, scheduler_output, model_runner_output)

    return update_from_output

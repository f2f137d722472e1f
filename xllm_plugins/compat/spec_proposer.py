"""Seam: tell a proposer of the user's class which requests it proposes for.

vLLM's ``custom_class`` proposer is given texts and no more. The runner's method that calls it is
wrapped: a proposer that has ``xllm_see`` is told what the step computed just before. A request's
cache salt does not reach the worker at all, so it is put beside what the scheduler sends of a new
request. And vLLM 0.32 samples by rejection also where nothing was drafted, which costs time and, on
a CPU, ends the engine at a request with ``top_k``: such a step is sampled as without a proposer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from xllm_plugins.compat import Target, patch
from xllm_plugins.compat.lazy import when_imported
from xllm_plugins.compat.spec_beside import BESIDE, drafted_beside

WHY = (
    "A custom_class proposer learns neither request ids nor what was drafted, accepted or salted, "
    "and steps without drafts are sampled by rejection."
)
WITHOUT = "xllm.spec_decode is off."
HOLDS_FOR = ">=0.23,<0.33"
_RUNNER, _OUTPUT = "vllm.v1.worker.gpu_model_runner", "vllm.v1.core.sched.output"
SEAM = (
    Target(
        f"{_RUNNER}:GPUModelRunner.propose_draft_token_ids",
        ("self", "scheduler_output", "sampled_token_ids"),
    ),
    Target(f"{_RUNNER}:GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata")),
    Target("vllm.v1.spec_decode.metadata:SpecDecodeMetadata.__post_init__", ("self",)),
    Target(f"{_OUTPUT}:NewRequestData.from_request", ("request", "block_ids")),
    Target("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", ("vllm_config",)),
    Target("vllm.v1.executor.abstract:Executor.collective_rpc", ("self", "method")),
)
SALT = "xllm_cache_salt"


def install() -> None:
    """Wrap them in this process, when vLLM imports them."""

    def patch_runner(module: ModuleType) -> None:
        patch(module.GPUModelRunner, "propose_draft_token_ids", _tell, "spec_proposer")
        patch(module.GPUModelRunner, "_sample", _plainly, "spec_proposer")

    def patch_output(module: ModuleType) -> None:
        patch(module.NewRequestData, "from_request", _salt, "spec_proposer")

    when_imported(_RUNNER, patch_runner)
    when_imported(_OUTPUT, patch_output)


def _tell(original: Any) -> Any:
    @functools.wraps(original)
    def propose_draft_token_ids(
        self: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        draft = functools.partial(
            original, self, scheduler_output, sampled_token_ids, *args, **kwargs
        )
        beside = getattr(self.drafter, BESIDE, None)
        if beside is not None:
            return drafted_beside(beside, self, scheduler_output, sampled_token_ids, draft)
        see = getattr(self.drafter, "xllm_see", None)
        if see is not None:
            see(scheduler_output, self.input_batch)
        return draft()

    return propose_draft_token_ids


def _plainly(original: Any) -> Any:
    @functools.wraps(original)
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        drafted, drafter = spec_decode_metadata, getattr(self, "drafter", None)
        ours = hasattr(drafter, "xllm_see") or getattr(drafter, BESIDE, None) is not None
        if drafted is not None and not drafted.max_spec_len and ours:
            drafted = None
        return original(self, logits, drafted)

    return _sample


def _salt(original: Any) -> Any:
    @functools.wraps(original)
    def from_request(cls: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(cls, request, *args, **kwargs)
        setattr(made, SALT, request.cache_salt)
        return made

    return from_request


def ask_worker(engine_core: Any, ask: Callable[[Any], Any]) -> Any:
    """What ``ask`` finds in the last worker process of an engine, the one that drafts."""
    return engine_core.model_executor.collective_rpc(ask)[-1]

"""Seam: drafts from texts beside a drafting model of vLLM's.

vLLM's runner has one proposer. Where that is a model, an object set on it is told what the step
computed and said, says how far the model drafts, and has the last word on whose drafts are used.
vLLM drafts before it keeps the books of a step, so the tokens said are put into the runner's texts
first, where vLLM puts the same ones right after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from xllm_plugins.compat import Target, patch, unread
from xllm_plugins.compat.lazy import when_imported

WHY = "vLLM's runner has one proposer, and a drafting model none from texts beside it."
WITHOUT = "Beside a drafting model nothing is drafted from texts."
HOLDS_FOR = ">=0.32,<0.33"
_MODULE = "vllm.v1.spec_decode.llm_base_proposer"
_RUNNER = "vllm.v1.worker.gpu_model_runner"
SEAM = (
    Target(f"{_MODULE}:SpecDecodeBaseProposer.load_model", ("self", "target_model")),
    Target(
        f"{_RUNNER}:GPUModelRunner.propose_draft_token_ids",
        ("self", "scheduler_output", "sampled_token_ids"),
    ),
    Target(
        "vllm.v1.sample.rejection_sampler:RejectionSampler.parse_output",
        ("output_token_ids", "vocab_size", "discard_req_indices"),
    ),
)
BESIDE = "xllm_beside"
NO_PASS = -1
"""What is said in place of a length where the model is not to compute anything."""


def check() -> str:
    """Whether the runner reads how far to draft from the step's plan, and keeps books as we do."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    books = ("discard_request_mask", "parse_output", "num_tokens_no_spec")
    drafting = unread(GPUModelRunner.propose_draft_token_ids, "num_spec_tokens_to_schedule")
    return drafting or unread(GPUModelRunner._bookkeeping_sync, *books)


def install(make: Callable[[Any], Any]) -> None:
    """When a drafting model is loaded, set beside it what ``make`` makes.

    Args:
        make: given vLLM's configuration; what it makes has ``xllm_see`` for steps, ``begin`` for
            what they said and ``finish`` for the model's drafts. None for nothing.
    """

    def patch_proposer(module: ModuleType) -> None:
        patch(
            module.SpecDecodeBaseProposer,
            "load_model",
            lambda load: _beside(load, make),
            "spec_beside",
        )

    when_imported(_MODULE, patch_proposer)


def _beside(original: Any, make: Callable[[Any], Any]) -> Any:
    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(self, *args, **kwargs)
        setattr(self, BESIDE, make(self.vllm_config))
        return loaded

    return load_model


def drafted_beside(
    beside: Any, runner: Any, scheduler_output: Any, sampled: Any, draft: Callable[[], Any]
) -> Any:
    """The drafts for a runner's next step.

    Args:
        beside: what stands beside the model.
        runner: vLLM's.
        scheduler_output: the step's plan.
        sampled: what it said: a tensor before the books of it were kept, lists afterwards.
        draft: has vLLM's model draft.
    """
    batch = runner.input_batch
    beside.xllm_see(scheduler_output, batch)
    said, lengths = sampled, batch.num_tokens_no_spec[: len(batch.req_ids)].copy()
    if not isinstance(sampled, list):
        from vllm.v1.sample.rejection_sampler import RejectionSampler

        discarded = np.flatnonzero(runner.discard_request_mask.np[: len(lengths)])
        said, _ = RejectionSampler.parse_output(sampled, batch.vocab_size, discarded)
        for row, tokens in enumerate(said):
            begin = lengths[row]
            lengths[row] += len(tokens)
            batch.token_ids_cpu[row, begin : lengths[row]] = tokens
    width = beside.begin(said, lengths, batch.token_ids_cpu)
    if width == NO_PASS:
        return beside.finish() or [[] for _ in said]
    if width is not None:
        scheduler_output.num_spec_tokens_to_schedule = width
    return beside.finish(draft())

"""Seam: let vllm-ascend's runner draft with a proposer of another's class.

Its runner takes vLLM's ``custom_class`` for unknown and calls a proposer by the class that it is
of. So the function that makes proposers is wrapped, and what a ``custom_class`` names is put behind
the n-gram proposer's class. As in ``spec_proposer``, a proposer that has ``xllm_see`` is told what
the step computed just before.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from xllm_plugins.compat import ASCEND, Target, patch
from xllm_plugins.compat.lazy import when_imported

UPSTREAM = ASCEND
WHY = "vllm-ascend's runner knows no custom_class proposer."
WITHOUT = "xllm.spec_decode is off on NPUs."
HOLDS_FOR = ">=0.23,<0.24"
_RUNNER = "vllm_ascend.worker.model_runner_v1"
_NGRAM = "vllm_ascend.spec_decode.ngram_proposer:AscendNgramProposer"
SEAM = (
    Target("vllm_ascend.ops:fused_moe"),  # first: without it the others import themselves in a ring
    Target(f"{_RUNNER}:get_spec_decode_method", ("method", "vllm_config", "device", "runner")),
    Target(
        f"{_RUNNER}:NPUModelRunner.propose_draft_token_ids",
        ("self", "valid_sampled_token_ids", "sampling_metadata", "scheduler_output"),
    ),
    Target(f"{_NGRAM}.propose", ("self", "sampled_token_ids")),
    Target(f"{_NGRAM}.dummy_run", ("self", "num_tokens")),
    Target("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", ("vllm_config",)),
)


def install() -> None:
    """Wrap them in this process, when vllm-ascend's worker imports its runner."""

    def patch_runner(module: ModuleType) -> None:
        patch(module, "get_spec_decode_method", _make, "ascend_proposer")
        patch(module.NPUModelRunner, "propose_draft_token_ids", _tell, "ascend_proposer")

    when_imported(_RUNNER, patch_runner)


def _make(original: Any) -> Any:
    @functools.wraps(original)
    def get_spec_decode_method(method: str, vllm_config: Any, device: Any, runner: Any) -> Any:
        if method != "custom_class":
            return original(method, vllm_config, device, runner)
        from vllm.v1.spec_decode.custom_class_proposer import create_custom_proposer

        return _as_ngram(create_custom_proposer(vllm_config), runner)

    return get_spec_decode_method


def _tell(original: Any) -> Any:
    @functools.wraps(original)
    def propose_draft_token_ids(
        self: Any, sampled: Any, metadata: Any, scheduler_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        see = getattr(self.drafter, "xllm_see", None)
        if see is not None:
            see(scheduler_output, self.input_batch)
        return original(self, sampled, metadata, scheduler_output, *args, **kwargs)

    return propose_draft_token_ids


def _as_ngram(proposer: Any, runner: Any) -> Any:
    from vllm_ascend.spec_decode.ngram_proposer import AscendNgramProposer

    class CustomProposer(AscendNgramProposer):  # type: ignore[misc]
        """Somebody's proposer; of the n-gram one only the class and the dummy run are used."""

        def __init__(self) -> None:
            self.load_model = proposer.load_model
            self.xllm_see = getattr(proposer, "xllm_see", None)

        def propose(self, sampled_token_ids: Any, *args: Any, **kwargs: Any) -> Any:
            batch = runner.input_batch
            return proposer.propose(
                sampled_token_ids, batch.num_tokens_no_spec, batch.token_ids_cpu
            )

    return CustomProposer()

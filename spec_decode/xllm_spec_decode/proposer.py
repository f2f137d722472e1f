"""The class that vLLM makes its drafts with, told by our seam what they are for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xllm_plugins.compat import spec_sampling
from xllm_plugins.compat.scheduler_levers import idle_experts
from xllm_plugins.compat.spec_proposer import SALT
from xllm_spec_decode.config import Choice
from xllm_spec_decode.drafters import Drafter, PromptLookup
from xllm_spec_decode.owed import settings
from xllm_spec_decode.recent import RecentOutputs
from xllm_spec_decode.slots import Request
from xllm_spec_decode.speculator import Speculator, Step

logger = logging.getLogger("vllm.xllm_spec_decode")

_ABSENT = 2  # times the requests of a step that are remembered, for those preempted or held back
_WINDOW = 8192  # tokens of a text that prompt lookup remembers
_proposer: XllmProposer | None = None  # of this worker process


class XllmProposer:
    """Drafts for a whole step; made by vLLM with its configuration, once in a worker process.

    Whatever goes wrong in here costs drafts and never a request.

    Args:
        vllm_config: vLLM's.
        model: the method of vLLM's drafting model, if that is what drafts.

    Attributes:
        choice: whose drafts are used.
    """

    choice = Choice.BEST

    def __init__(self, vllm_config: Any, model: str = "") -> None:
        global _proposer
        spec_sampling.mend()
        section, self._tpot_ms = settings(vllm_config)
        most = vllm_config.speculative_config.num_speculative_tokens
        slots = _ABSENT * vllm_config.scheduler_config.max_num_seqs
        choice = section.drafter if model else self.choice
        drafters = _drafters(choice, slots, int(section.shared_mib * (1 << 20)))
        self._speculator = Speculator(drafters, slots, most, idle_experts(vllm_config), model)
        self._length = vllm_config.model_config.max_model_len
        self._step: Step | None = None
        self._begun = False  # and not yet finished
        self._failed = ""
        _proposer = self

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """There is none; what loops over tokens is compiled now and not in a request's time."""
        tokens = np.zeros((2, self._length), np.int32)
        ids = ["xllm-warm-up-1", "xllm-warm-up-2"]
        prompts, lengths = np.full(2, 4, np.int64), np.full(2, 12, np.int64)
        step = Step(ids, {one: Request(None) for one in ids}, (), {}, 2, prompts)
        self._safely(lambda: self._speculator.warm_up(step, [[0], [0]], lengths, tokens), None)

    def xllm_see(self, scheduler_output: Any, input_batch: Any) -> None:
        """Called by the seam before :meth:`propose`, with what vLLM has just computed."""
        ids = input_batch.req_ids
        self._step = Step(
            ids=list(ids),
            new={
                one.req_id: Request(_tenant(one), self._tpot_ms(one), one.num_computed_tokens)
                for one in scheduler_output.scheduled_new_reqs
            },
            finished=list(scheduler_output.finished_req_ids),
            drafted={
                request_id: len(tokens)
                for request_id, tokens in scheduler_output.scheduled_spec_decode_tokens.items()
            },
            computed_tokens=scheduler_output.total_num_scheduled_tokens,
            prompts=input_batch.num_prompt_tokens[: len(ids)].astype(np.int64),
        )

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """By vLLM's contract: a draft for each request, empty for none."""
        lengths = num_tokens_no_spec[: len(sampled_token_ids)]
        self.begin(sampled_token_ids, lengths, token_ids_cpu)
        found: Any = self.finish()
        return [[] for _ in sampled_token_ids] if found is None else found

    def begin(self, said: Sequence[Sequence[int]], lengths: Any, token_ids_cpu: Any) -> int | None:
        """Draft from texts; how far the model is to draft, ``NO_PASS``, or None to leave that."""
        step, self._step = self._step, None
        self._begun = step is not None and not self._failed
        if step is None or self._failed:
            return None
        places, now_s = lengths.astype(np.int64), time.monotonic()
        passes: int | None = self._safely(
            lambda: self._speculator.begin(step, said, places, token_ids_cpu, now_s), None
        )
        return passes

    def finish(self, modelled: Any = None) -> Any:
        """The drafts for the next step; the model's own tensor of drafts where we failed."""
        if not self._begun or self._failed:
            return modelled
        tokens = None if modelled is None else modelled.cpu().numpy()
        return self._safely(lambda: self._speculator.finish(tokens), modelled)

    def _safely(self, call: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return call()
        except Exception as error:
            logger.exception("Speculation failed and is switched off")
            self._failed = f"{type(error).__name__}: {error}"
            return otherwise

    def facts(self) -> dict[str, Any]:
        """What was done and is expected, in plain types."""
        return {**self._speculator.facts(), "stands_back": self._failed}


class NgramProposer(XllmProposer):
    """Drafts from the request's own text alone."""

    choice = Choice.NGRAM


class SuffixProposer(XllmProposer):
    """Drafts from recent outputs alone."""

    choice = Choice.SUFFIX


def current() -> XllmProposer | None:
    """The one of this process."""
    return _proposer


def _tenant(request: Any) -> tuple[Any, ...] | None:
    if not hasattr(request, SALT):
        return None  # nobody's but its own
    lora = request.lora_request
    return (getattr(request, SALT), None if lora is None else lora.lora_int_id)


def _drafters(choice: Choice, slots: int, shared_bytes: int) -> dict[str, Drafter]:
    drafters: dict[str, Drafter] = {}
    if choice is not Choice.SUFFIX:
        drafters["ngram"] = PromptLookup(slots, _WINDOW)
    if choice is not Choice.NGRAM:
        drafters["suffix"] = RecentOutputs(slots, shared_bytes)
    return drafters

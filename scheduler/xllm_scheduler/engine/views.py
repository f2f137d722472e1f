"""Turns vLLM's requests into the plain data that a step policy looks at."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from operator import attrgetter
from typing import Any

from xllm_plugins.compat import scheduler_levers as levers
from xllm_plugins.latency import StepShape
from xllm_scheduler.engine.books import due_s, is_online
from xllm_scheduler.engine.policy import OfflineDecodes, OnlineDecodes, PrefillView, Victim

_MOST_VICTIMS = 16
_NO_DECODES = OnlineDecodes()
_NO_OFFLINE_DECODES = OfflineDecodes()


def online_decodes(requests: Sequence[Any], start_s: float) -> OnlineDecodes:
    """Those of the online requests that generate."""
    dues, produced, tpots = [], [], []
    context = drafted = 0
    shape = StepShape()
    for request in requests:
        if request.is_prefill_chunk:
            continue
        record = request.xllm
        computed = request.num_computed_tokens
        # All but the last token are computed, or will be when the steps in flight have ended.
        outputs = computed + 1 - request.num_prompt_tokens
        drafts = len(request.spec_token_ids)
        if drafts:  # of the tokens in flight so many may yet be rejected
            outputs -= request.num_output_placeholders * drafts // (1 + drafts)
        tpot_s = record.tpot_s
        # A first token in flight comes when its step ends, which is when this one starts.
        dues.append((record.first_token_s or start_s) + outputs * tpot_s)
        produced.append(outputs)
        tpots.append(tpot_s * 1e3)
        if drafts:
            drafted += 1
            shape = shape.with_chunk(1 + drafts, computed)
        else:
            context += computed
    if not dues:
        return _NO_DECODES
    shape = shape.with_decodes(len(dues) - drafted, context)
    return OnlineDecodes(dues, produced, tpots, shape, shape.tokens)


def offline_decodes(requests: Sequence[Any]) -> OfflineDecodes:
    """Those of the offline requests that generate, in order."""
    decodes = [r for r in requests if not r.is_prefill_chunk]
    if not decodes:
        return _NO_OFFLINE_DECODES
    return OfflineDecodes(
        [r.request_id for r in decodes],
        [r.num_computed_tokens for r in decodes],
        [1 + len(r.spec_token_ids) for r in decodes],
    )


def running_prefill(scheduler: Any, request: Any) -> PrefillView:
    """A running request whose prompt is not computed yet."""
    computed = request.num_computed_tokens
    return PrefillView(
        request_id=request.request_id,
        online=is_online(request),
        running=True,
        due_s=due_s(request),
        new_tokens=request.num_tokens_with_spec + request.num_output_placeholders - computed,
        context_tokens=computed,
        step_tokens=levers.most_step_tokens(scheduler),
        splittable=_splittable(scheduler, request),
    )


def waiting_prefill(scheduler: Any, request: Any) -> PrefillView:
    """A request that waits; what the prefix cache holds of it is not known yet."""
    computed = request.num_computed_tokens
    remote = levers.is_remote(request)
    new_tokens = 1 if remote else max(1, request.num_tokens - computed)
    if new_tokens == 1:
        new_tokens += scheduler.num_spec_tokens  # vLLM pads such a request or does not admit it
    return PrefillView(
        request_id=request.request_id,
        online=is_online(request),
        running=False,
        due_s=due_s(request),
        new_tokens=new_tokens,
        context_tokens=computed,
        step_tokens=levers.most_step_tokens(scheduler),
        splittable=_splittable(scheduler, request),
        blocks=levers.missing_blocks(scheduler, request),
    )


def victims(scheduler: Any, offline: Sequence[Any]) -> list[Victim]:
    """The offline requests that could be preempted, those with the least to compute again."""
    candidates = [r for r in offline if levers.can_preempt(scheduler, r)]
    return [
        Victim(r.request_id, r.num_computed_tokens, levers.own_blocks(scheduler, r))
        for r in nsmallest(_MOST_VICTIMS, candidates, key=attrgetter("num_computed_tokens"))
    ]


def _splittable(scheduler: Any, request: Any) -> bool:
    return bool(
        scheduler.scheduler_config.enable_chunked_prefill
        # Their chunks have borders of their own, which a cap of ours would not respect.
        and not request.has_encoder_inputs
        and not getattr(scheduler, "need_mamba_block_aligned_split", False)
    )

"""Turns vLLM's requests into the plain data that a step policy looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import nsmallest
from operator import attrgetter
from typing import Any, NamedTuple

from xllm_plugins.compat import scheduler_levers as levers
from xllm_plugins.latency import StepShape
from xllm_scheduler.engine.books import Served, due_s, is_online
from xllm_scheduler.engine.policy import OfflineDecodes, OnlineDecodes, PrefillView, Victim

_MOST_VICTIMS = 16


class Running(NamedTuple):
    """The running requests, sorted by what they do.

    Attributes:
        online: those with SLOs that generate.
        offline: the others that generate.
        prefills: the requests whose prompt is not computed yet.
        any_offline: whether there are offline ones, in whichever phase.
        in_order: whether all with SLOs come before all others.
        decodes: the shape of a step of all that runs, if each computes a single token; else None.
    """

    online: OnlineDecodes
    offline: OfflineDecodes
    prefills: Sequence[Any]
    any_offline: bool
    in_order: bool
    decodes: StepShape | None


def running(requests: Sequence[Any], start_s: float, take_in: Callable[[Any], Served]) -> Running:
    """Sort them in one pass: this is most of what planning a step costs.

    Args:
        requests: all that run, in vLLM's order.
        start_s: when the step that is planned will start.
        take_in: makes the record of a request that has none yet.
    """
    dues: list[float] = []
    produced: list[int] = []
    tpots_ms: list[float] = []
    ids: list[str] = []
    contexts: list[int] = []
    new_tokens: list[int] = []
    prefills: list[Any] = []
    any_offline, in_order = False, True
    context = drafted = 0
    shape = StepShape()
    for request in requests:
        record = getattr(request, "xllm", None) or take_in(request)
        if record.online:
            in_order = in_order and not any_offline
        else:
            any_offline = True
        if request.is_prefill_chunk:
            prefills.append(request)
            continue
        computed = request.num_computed_tokens
        drafts = request.spec_token_ids
        if not record.online:
            ids.append(request.request_id)
            contexts.append(computed)
            new_tokens.append(1 + len(drafts))
            continue
        tpot_s = record.tpot_s
        # All but the last token are computed, or will be when the steps in flight have ended.
        outputs = computed + 1 - request.num_prompt_tokens
        if drafts:  # of the tokens in flight so many may yet be rejected
            outputs -= request.num_output_placeholders * len(drafts) // (1 + len(drafts))
            drafted += 1
            shape = shape.with_chunk(1 + len(drafts), computed)
        else:
            context += computed
        # A first token in flight comes when its step ends, which is when this one starts.
        dues.append((record.first_token_s or start_s) + outputs * tpot_s)
        produced.append(outputs)
        tpots_ms.append(tpot_s * 1e3)
    shape = shape.with_decodes(len(dues) - drafted, context)
    online = OnlineDecodes(dues, produced, tpots_ms, shape, shape.tokens)
    single = not (prefills or drafted) and sum(new_tokens) == len(ids)
    decodes = shape.with_decodes(len(ids), sum(contexts)) if single else None
    offline = OfflineDecodes(ids, contexts, new_tokens)
    return Running(online, offline, prefills, any_offline, in_order, decodes)


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


def victims(scheduler: Any) -> list[Victim]:
    """The offline requests that could be preempted, those with the least to compute again."""
    offline = [r for r in scheduler.running if not is_online(r)]
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

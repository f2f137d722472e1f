"""The step policy: which requests take part in the next engine step, and with how many tokens.

A step is as long as its work. The policy predicts that length, lets online work in first, and adds
offline work while the step still ends before the next online token is due.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from xllm_plugins.latency import StepShape, StepTime
from xllm_scheduler.config import SchedulerSection

_COLD_TOKENS = 256  # of offline prefill in a step while the model has seen too few to predict
_MIN_CHUNK = 16  # smaller chunks cost more in overhead than they bring
_LEAST_CHUNK = 64  # the least progress of the most urgent prefill
_MAX_RESERVE = 2.0  # in steps at the pace of the TPOT SLO
_MIN_MARGIN, _MAX_MARGIN = 0.05, 0.4


@dataclass(frozen=True)
class RequestView:
    """One request as the policy sees it.

    Attributes:
        request_id: vLLM's id.
        online: whether it has SLOs.
        running: whether it holds KV and is in the running batch; else it waits.
        due_s: when its next token is due, in seconds of the clock of ``StepView.start_s``;
            infinite for offline requests.
        new_tokens: how many tokens it would compute in this step if nothing bound it.
        context_tokens: how many it has computed.
        decoding: whether its prompt is computed and it generates; else it is in prefill.
        tpot_ms: its SLO.
        splittable: whether its prefill may be cut into chunks of any size.
    """

    request_id: str
    online: bool
    running: bool
    due_s: float
    new_tokens: int
    context_tokens: int
    decoding: bool
    tpot_ms: float = math.inf
    splittable: bool = True


@dataclass(frozen=True)
class StepView:
    """All that a policy may look at.

    Attributes:
        start_s: when the planned step will start: now, or the predicted end of the step in flight.
        max_tokens: vLLM's token budget for a step.
        step_time: the current latency model.
        running: requests in service order.
        waiting: the head of the waiting requests, online before offline.
        can_cap: whether one request's chunk can be capped; else it is held as a whole.
        online_prompt_tokens: the mean prompt length of recent online requests, in tokens.
    """

    start_s: float
    max_tokens: int
    step_time: StepTime
    running: tuple[RequestView, ...] = ()
    waiting: tuple[RequestView, ...] = ()
    can_cap: bool = True
    online_prompt_tokens: float = 0.0


@dataclass(frozen=True)
class StepPlan:
    """What the driver applies to one step.

    Attributes:
        max_tokens: the step's token budget.
        held: running requests that sit this step out and keep their KV.
        chunk_tokens: the most tokens that a request may compute in this step, by id.
        admit_offline: whether offline requests may leave the waiting queue.
        target_ms: how long the step may take; infinite if nothing bounds it.
    """

    max_tokens: int
    held: frozenset[str] = frozenset()
    chunk_tokens: Mapping[str, int] = field(default_factory=dict)
    admit_offline: bool = True
    target_ms: float = math.inf


class StepPolicy(ABC):
    """The interface of kind ``scheduler.step``."""

    @abstractmethod
    def plan(self, view: StepView) -> StepPlan:
        """Decide one step. Must not keep references to the view."""


def _least_tokens(request: RequestView) -> int:
    return min(_LEAST_CHUNK, request.new_tokens) if request.splittable else request.new_tokens


class _Step:
    """A step under construction: its shape, what is left of the budget, and the caps."""

    def __init__(self, time: StepTime, max_tokens: int) -> None:
        self.time = time
        self.shape = StepShape()
        self.tokens_left = max_tokens
        self.used = 0
        self.added: set[str] = set()
        self.chunks: dict[str, int] = {}

    def ms(self) -> float:
        return self.time.step_ms(self.shape)

    def add(self, request: RequestView, tokens: int) -> None:
        tokens = min(tokens, self.tokens_left)
        self.shape = self.shape.with_chunk(tokens, request.context_tokens)
        self.tokens_left -= tokens
        self.used += tokens
        if tokens:
            self.added.add(request.request_id)
        # A waiting request without tokens needs no cap: what is left of the budget is not its.
        if tokens < request.new_tokens and (tokens or request.running):
            self.chunks[request.request_id] = tokens

    def force(self, request: RequestView) -> None:
        """Add a request whatever it costs: the least chunk, or all where it may not be cut."""
        tokens = _least_tokens(request)
        if request.splittable or tokens <= self.tokens_left:
            self.add(request, tokens)

    def fits(self, request: RequestView, target_ms: float) -> bool:
        added = self.time.added_ms(request.new_tokens, request.context_tokens)
        return self.tokens_left >= request.new_tokens and self.ms() + added <= target_ms

    def room(self, request: RequestView, target_ms: float) -> int:
        """How many tokens of a prefill fit; a small rest of it or at least a minimal chunk."""
        if request.new_tokens == 1:
            return int(self.fits(request, target_ms))
        spare_ms = target_ms - self.ms()
        fitting = self.time.prefill_tokens_within(spare_ms, request.context_tokens)
        tokens = int(min(fitting, self.tokens_left, request.new_tokens))
        least = min(_MIN_CHUNK, request.new_tokens) if request.splittable else request.new_tokens
        return tokens if tokens >= least else 0


class ElasticPolicy(StepPolicy):
    """Online first; offline only into what the tightest online deadline leaves.

    With ``slack`` the time until the next token of the tightest decoding online request is due,
    less a margin that grows with the latency model's error, a step with offline work lasts at most
    ``min(slack - reserve, online_share * tpot)``. The reserve is the time that the prefill of the
    next online arrival will take from the decodes; it is built up by holding offline work. Online
    prefills may use all slack, most urgent first. While one is under way, offline work takes only
    what the prefill's own deadline leaves. Without online work a step lasts at most
    ``idle_step_share * ttft``.

    The method is that of xLLM's co-location (arXiv 2511.21862), with token-level deadlines in the
    place of one step limit for all.
    """

    def __init__(self, section: SchedulerSection) -> None:
        self._section = section
        self._holding_since_s: float | None = None

    def plan(self, view: StepView) -> StepPlan:
        """Decide one step."""
        online = [r for r in (*view.running, *view.waiting) if r.online]
        offline = [r for r in view.running if not r.online]
        queued = [r for r in view.waiting if not r.online]
        if not offline and not queued:
            # Online alone is vLLM's own business: nothing is gained by shaping the step.
            self._holding_since_s = None
            return StepPlan(view.max_tokens)
        first = [*offline, *queued][0]
        step = _Step(view.step_time, view.max_tokens)
        for request in online:
            if request.decoding:
                step.add(request, request.new_tokens)
        overdue = bool(online) and self._held_too_long(view.start_s)
        if overdue:
            step.force(first)
        target_ms = self._add_online_prefills(step, view, online)
        if overdue:
            pace_ms = self._section.online_share * min(r.tpot_ms for r in online)
            target_ms = max(target_ms, step.ms() + pace_ms)
        if not view.step_time.ready:
            decode_tokens = sum(r.new_tokens for r in offline if r.decoding)
            step.tokens_left = min(step.tokens_left, decode_tokens + _COLD_TOKENS)
        held = _add_offline_decodes(step, offline, target_ms if online else math.inf)
        if not view.can_cap and any(not r.running for r in online):
            # Running requests are served before waiting ones: only holding reserves their tokens.
            held |= {r.request_id for r in offline if not r.decoding} - step.added
        held |= _add_offline_prefills(step, offline, target_ms, held)
        _add_queued(step, queued, target_ms)
        if step.shape.is_empty:
            # A step is never empty, however slow the model says that it is.
            step.tokens_left = view.max_tokens
            step.force(first)
            held.discard(first.request_id)
        if any(r.request_id in step.added for r in (*offline, *queued)) or not online:
            self._holding_since_s = None
        elif self._holding_since_s is None:
            self._holding_since_s = view.start_s
        return StepPlan(
            max_tokens=step.used,
            held=frozenset(held),
            chunk_tokens=step.chunks,
            admit_offline=any(r.request_id in step.added for r in queued),
            target_ms=target_ms,
        )

    def _held_too_long(self, now_s: float) -> bool:
        since_s = self._holding_since_s
        return since_s is not None and (now_s - since_s) * 1e3 >= self._section.offline_hold_ms

    def _add_online_prefills(self, step: _Step, view: StepView, online: list[RequestView]) -> float:
        """Add them, most urgent first; return how long offline work may make the step, in ms."""
        if not online:
            return self._section.idle_step_share * self._section.ttft_ms
        margin = 1.0 - min(_MAX_MARGIN, max(_MIN_MARGIN, view.step_time.error))

        def slack_ms(request: RequestView) -> float:
            return (request.due_s - view.start_s) * 1e3 * margin

        decodes = [r for r in online if r.decoding]
        saved_ms = min(map(slack_ms, decodes), default=math.inf)
        pace_ms = self._section.online_share * min((r.tpot_ms for r in decodes), default=math.inf)
        reserve_ms = min(
            view.step_time.added_ms(int(view.online_prompt_tokens), 0), _MAX_RESERVE * pace_ms
        )
        target_ms = min(saved_ms - reserve_ms, pace_ms)
        prefills = [r for r in online if not r.decoding and r.new_tokens]
        prefills.sort(key=lambda r: r.due_s)
        for index, request in enumerate(prefills):
            tokens = step.room(request, max(saved_ms, pace_ms))
            if index == 0:
                tokens = max(tokens, _least_tokens(request))
            tokens = min(tokens, step.tokens_left)
            if not request.splittable and tokens < request.new_tokens:
                tokens = 0
            rest = request.new_tokens - tokens
            steps = 1.0 + (rest / tokens if tokens else math.inf)
            # Every further step that the prefill needs is as long as this one.
            target_ms = min(target_ms, slack_ms(request) / steps)
            step.add(request, tokens)
        return target_ms


def _add_offline_decodes(step: _Step, offline: list[RequestView], target_ms: float) -> set[str]:
    """Add decodes in order while they fit; return the others, to be held."""
    held = set()
    for request in offline:
        if not request.decoding or request.request_id in step.added:
            continue
        if step.fits(request, target_ms):
            step.add(request, request.new_tokens)
        else:
            held.add(request.request_id)
    return held


def _add_offline_prefills(
    step: _Step, offline: list[RequestView], target_ms: float, held: set[str]
) -> set[str]:
    """Add chunks in order while they fit; return the others, to be held."""
    left_out = set()
    for request in offline:
        if request.decoding or request.request_id in held | step.added:
            continue
        tokens = step.room(request, target_ms)
        if tokens:
            step.add(request, tokens)
        else:
            left_out.add(request.request_id)
    return left_out


def _add_queued(step: _Step, queued: list[RequestView], target_ms: float) -> None:
    """Add waiting offline requests, head first, while they fit."""
    for request in queued:
        if request.request_id in step.added:
            continue
        tokens = step.room(request, target_ms)
        if not tokens:
            break
        step.add(request, tokens)

"""The step policy: which requests take part in the next engine step, and with how many tokens.

A step is as long as its work. The policy predicts that length, lets online work in first, and adds
offline work while the step still ends before the next online token is due.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from xllm_plugins.latency import StepShape, StepTime
from xllm_scheduler.config import SchedulerSection

_COLD_TOKENS = 64  # of offline prefill in a step of which the model has seen nothing alike
_MIN_CHUNK = 16  # smaller chunks cost more in overhead than they bring
_GROWTH = 2  # how far beyond the largest prefill seen so far a prediction is relied on
_SURE_ERROR = 0.05  # an error of the model up to which the margin is as configured
_ERROR_WEIGHT = 4.0  # by how much a larger error widens it
_MAX_MARGIN_STEPS = 2.0
_RESERVE_GROWTH = 1.0  # of the TPOT SLO by which a reserve grows with each token
_EASY_TTFT = 0.5  # the part of the TTFT SLO in which a prefill shall be done at the decodes' pace
_FEW = 2  # prefills for which decodes may be late
_DEBT = 0.3  # of the tokens of a mean answer; so many are left at least of most answers
_HASTE = 0.5  # the part of the time until a first token is due in which its prefill is planned
_PATIENCE = 0.5  # the part of the TTFT SLO that is left when others are preempted for a request
_MAX_PACE = 2.0  # the longest step beside online decodes, in TPOT SLOs


class Late(str, Enum):
    """Why a step may end after the next online token is due."""

    ONLINE = "online_alone"  # online work alone takes that long
    FIRST_TOKEN = "first_token"  # noqa: S105 - a prefill needs the time to meet its own deadline
    FLOOR = "offline_floor"  # offline work had waited too long


class PrefillView(NamedTuple):
    """A request whose prompt is not computed yet, running or waiting.

    Attributes:
        request_id: vLLM's id.
        online: whether it has SLOs.
        running: whether it holds KV and is in the running batch; else it waits.
        due_s: when its first token is due, in seconds of the clock of ``StepView.start_s``;
            infinite for offline requests.
        new_tokens: how many tokens are left to compute.
        context_tokens: how many it has computed.
        splittable: whether they may be cut into chunks of any size.
        blocks: how many KV blocks it needs to be admitted; 0 for a running request.
    """

    request_id: str
    online: bool
    running: bool
    due_s: float
    new_tokens: int
    context_tokens: int = 0
    splittable: bool = True
    blocks: int = 0


class OnlineDecodes(NamedTuple):
    """The running online requests that generate; they are never held.

    Attributes:
        due_s: when the next token of each is due, shape ``[n]``.
        produced: how many tokens each has produced, those in flight included, shape ``[n]``.
        tpot_ms: the SLO of each, shape ``[n]``.
        shape: what they compute in a step, all together.
        tokens: how many tokens that is.
    """

    due_s: Sequence[float] = ()
    produced: Sequence[int] = ()
    tpot_ms: Sequence[float] = ()
    shape: StepShape = StepShape()
    tokens: int = 0


class OfflineDecodes(NamedTuple):
    """The running offline requests that generate, in service order.

    Attributes:
        ids: of each, shape ``[n]``.
        context_tokens: of each, shape ``[n]``.
        new_tokens: of each, shape ``[n]``; more than 1 with speculative decoding.
    """

    ids: Sequence[str] = ()
    context_tokens: Sequence[int] = ()
    new_tokens: Sequence[int] = ()


class Victim(NamedTuple):
    """An offline request that could be preempted.

    Attributes:
        request_id: vLLM's id.
        recompute_tokens: what would have to be computed again.
        blocks: how many KV blocks it would free at once.
    """

    request_id: str
    recompute_tokens: int
    blocks: int


class StepView(NamedTuple):
    """All that a policy may look at.

    Attributes:
        start_s: when the planned step will start: now, or the predicted end of the step in flight.
        max_tokens: vLLM's token budget for a step.
        step_time: the current latency model.
        online: running online requests that generate.
        offline: running offline requests that generate.
        prefills: running requests in prefill, in service order.
        waiting: the head of the waiting requests, online before offline.
        can_cap: whether one request's chunk can be capped; else it is held as a whole.
        in_flight: whether a step is in flight, so that a wrong plan is noticed one step later.
        offline_idle_s: how long offline work has been there and none of it was computed.
        free_slots: how many more requests may run.
        free_blocks: how many KV blocks are free.
        headroom_blocks: how many of them are kept for the growth of online requests.
        online_prompt_tokens: the mean prompt length of recent online requests, in tokens.
        online_output_tokens: the mean answer length of recent online requests, in tokens.
        online_rate: how many online requests arrive per second.
        victims: offline requests to choose from where the first waiting online request finds no
            slot or too few blocks; empty otherwise.
    """

    start_s: float
    max_tokens: int
    step_time: StepTime
    online: OnlineDecodes = OnlineDecodes()
    offline: OfflineDecodes = OfflineDecodes()
    prefills: Sequence[PrefillView] = ()
    waiting: Sequence[PrefillView] = ()
    can_cap: bool = True
    in_flight: bool = False
    offline_idle_s: float = 0.0
    free_slots: int = 1
    free_blocks: int = 1 << 30
    headroom_blocks: int = 0
    online_prompt_tokens: float = 0.0
    online_output_tokens: float = 0.0
    online_rate: float = 0.0
    victims: Sequence[Victim] = ()


class StepPlan(NamedTuple):
    """What the driver applies to one step.

    Attributes:
        max_tokens: the step's token budget.
        held: running requests that sit this step out and keep their KV.
        chunk_tokens: the most tokens that a request may compute in this step, by id.
        admit_offline: whether offline requests may leave the waiting queue.
        preempt: running offline requests that lose their KV before the step.
        target_ms: how long the step may take by the online deadlines; infinite without a bound.
        planned_ms: how long it will take as planned; 0 where nothing needed to be predicted.
        late: why ``planned_ms`` is above ``target_ms``, if it is.
    """

    max_tokens: int
    held: frozenset[str] = frozenset()
    chunk_tokens: Mapping[str, int] = MappingProxyType({})
    admit_offline: bool = True
    preempt: Sequence[str] = ()
    target_ms: float = math.inf
    planned_ms: float = 0.0
    late: Late | None = None


class StepPolicy(ABC):
    """The interface of kind ``scheduler.step``."""

    @abstractmethod
    def plan(self, view: StepView) -> StepPlan:
        """Decide one step. Must not keep references to the view."""

    def is_urgent(self, request: PrefillView, start_s: float, step_time: StepTime) -> bool:
        """Whether to look for requests to preempt for a waiting online one that finds no room."""
        return False


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

    def add(self, request: PrefillView, tokens: int) -> None:
        tokens = min(tokens, self.tokens_left)
        self.shape = self.shape.with_chunk(tokens, request.context_tokens)
        self.tokens_left -= tokens
        self.used += tokens
        if tokens:
            self.added.add(request.request_id)
        # A waiting request without tokens needs no cap: what is left of the budget is not its.
        if tokens < request.new_tokens and (tokens or request.running):
            self.chunks[request.request_id] = tokens

    def room(self, request: PrefillView, target_ms: float) -> int:
        """How many tokens of a prefill fit; a small rest of it or at least a minimal chunk."""
        time = self.time
        spare_ms = target_ms - self.ms()
        if time.experts:
            # A chunk of any size may touch the experts that nothing else in the step does.
            spare_ms -= time.experts - time.experts_ms(self.shape.tokens)
        fitting = time.prefill_tokens_within(spare_ms, request.context_tokens)
        tokens = int(min(fitting, self.tokens_left, request.new_tokens))
        return tokens if tokens >= _least_tokens(request) else 0


def _least_tokens(request: PrefillView) -> int:
    return min(_MIN_CHUNK, request.new_tokens) if request.splittable else request.new_tokens


class ElasticPolicy(StepPolicy):
    """Online first; offline only into what the tightest online deadline leaves.

    The n-th token after the first is due at ``first + n * tpot``. A step ends, as predicted, a
    margin before the next token of every decoding online request is due, or it takes no offline
    work. The margin grows from token to token, by ``1 - online_share`` of the TPOT SLO, to
    ``margin_steps`` times the TPOT SLO, more while the latency model errs much. Since deadlines are
    absolute, time that was not used carries over and time that was lost is made up for.

    Online prefills come before offline work, earliest deadline first. They keep to the same end of
    the step unless that would make their first token late; then they may use the margin, too.
    Without online work a step lasts at most ``idle_step_share * ttft``, since an online request may
    arrive during it. Offline work that was left out for long takes part whatever it costs: it gets
    ``offline_floor`` of the time, more the longer it waits.

    Deadlines with slack that carries over are those of xLLM (arXiv 2510.14686) and of SLO-aware
    chunking as in Sarathi-Serve (arXiv 2403.02310).
    """

    def __init__(self, section: SchedulerSection) -> None:
        self._section = section

    def plan(self, view: StepView) -> StepPlan:
        """Decide one step."""
        waiting = view.waiting
        prefills = [r for r in view.prefills if r.online and r.new_tokens]
        prefills += [r for r in waiting if r.online and r.new_tokens]
        offline = [r for r in view.prefills if not r.online]
        queued = [r for r in waiting if not r.online and r.new_tokens]
        decodes = view.offline
        nothing_offline = not (offline or queued or decodes.ids)
        if nothing_offline and not prefills:
            return StepPlan(view.max_tokens)

        margin_ms = self._margin_ms(view)
        reserve_ms = self._reserve_ms(view)
        everyone = self._everyone(view, max(margin_ms, reserve_ms))
        if everyone is not None:
            return everyone
        preempt = self._victims(view)
        step = _Step(view.step_time, view.max_tokens)
        step.shape = view.online.shape
        step.tokens_left -= view.online.tokens
        step.used = view.online.tokens
        busy = bool(view.online.due_s or prefills)
        due_ms = self._due_ms(view, margin_ms, 1.0 - self._section.online_share)
        late = None
        if view.step_time.ready and due_ms < step.ms():
            late = Late.ONLINE
        overdue = self._overdue(view, [*offline, *queued], prefills) if busy else None
        if overdue is not None:
            late = late or Late.FLOOR
            if not isinstance(overdue, str):
                step.add(overdue, _least_tokens(overdue))
        target_ms, hurried = self._add_online_prefills(step, view, prefills, due_ms)
        if reserve_ms > margin_ms:
            target_ms = min(target_ms, self._due_ms(view, reserve_ms, _RESERVE_GROWTH))
        if hurried:
            late = late or Late.FIRST_TOKEN
        if nothing_offline and not step.chunks:
            planned_ms = step.ms()
            late = late if planned_ms > target_ms else None
            return StepPlan(view.max_tokens, target_ms=target_ms, planned_ms=planned_ms, late=late)

        gone = {*preempt, *step.added}
        limit_ms = target_ms if busy else math.inf
        held = self._add_offline_decodes(step, view, limit_ms, overdue, gone)
        cold = not view.step_time.ready
        wait_for_online = not view.can_cap and any(not r.running for r in prefills)
        offline_tokens = self._offline_prefill_tokens(view, busy)
        for request in offline:
            if request.request_id in gone:
                continue
            tokens = 0 if cold and busy else min(step.room(request, target_ms), offline_tokens)
            tokens = tokens if tokens >= _least_tokens(request) else 0
            if tokens and (view.can_cap or tokens == request.new_tokens):
                step.add(request, tokens)
                offline_tokens -= tokens
            elif wait_for_online or not view.can_cap:
                # Running requests are served before waiting ones: only holding keeps their tokens.
                held.add(request.request_id)
            else:
                step.chunks[request.request_id] = 0
        free_blocks = view.free_blocks - view.headroom_blocks
        free_blocks -= sum(r.blocks for r in prefills if not r.running)
        for request in queued:
            if preempt or (cold and busy) or request.blocks > free_blocks:
                break
            if request.request_id in step.added:
                continue
            tokens = min(step.room(request, target_ms), offline_tokens)
            if tokens < _least_tokens(request):
                break
            step.add(request, tokens)
            offline_tokens -= tokens
            free_blocks -= request.blocks
        if not step.used:
            self._force_something(step, view, [*offline, *queued], held)
        planned_ms = step.ms()
        return StepPlan(
            max_tokens=step.used,
            held=frozenset(held),
            chunk_tokens=step.chunks,
            admit_offline=any(r.request_id in step.added for r in queued),
            preempt=preempt,
            target_ms=target_ms,
            planned_ms=planned_ms,
            late=late if planned_ms > target_ms else None,
        )

    def is_urgent(self, request: PrefillView, start_s: float, step_time: StepTime) -> bool:
        """Not as long as a slot or blocks may come free in time without anything recomputed."""
        prefill_ms = step_time.added_ms(request.new_tokens, 0)
        slack_ms = (request.due_s - start_s) * 1e3
        return slack_ms <= _PATIENCE * self._section.ttft_ms + 2.0 * prefill_ms

    def _margin_ms(self, view: StepView) -> float:
        """How long before the next online token is due a step shall end."""
        section = self._section
        error = max(0.0, view.step_time.error - _SURE_ERROR) * _ERROR_WEIGHT
        steps = section.margin_steps * (1.0 + error)
        if view.in_flight:
            steps = max(1.0, steps)
        return min(_MAX_MARGIN_STEPS, steps) * min(view.online.tpot_ms, default=section.tpot_ms)

    def _reserve_ms(self, view: StepView) -> float:
        """The time that decodes must be ahead so that coming online prefills can be in time.

        A prefill that keeps to the pace of the decodes gets a part of each step. What it does not
        get done so in its TTFT, it must take from the decodes at once.
        """
        ttft_ms = self._section.ttft_ms
        arrivals = 2.0 * max(1.0, view.online_rate * ttft_ms / 1e3)
        prefill_ms = arrivals * view.step_time.added_ms(int(view.online_prompt_tokens), 0)
        pace_ms = min(view.online.tpot_ms, default=self._section.tpot_ms)
        decodes_ms = view.step_time.step_ms(view.online.shape)
        share = max(0.0, 1.0 - decodes_ms / pace_ms)
        return min(prefill_ms, prefill_ms - _EASY_TTFT * share * ttft_ms)

    def _everyone(self, view: StepView, margin_ms: float) -> StepPlan | None:
        """The plan for a step of decodes only that all fit into, the most common one; or None."""
        online, offline = view.online, view.offline
        admits = view.waiting and view.free_slots > 0
        if admits or view.prefills or view.victims or not view.step_time.ready:
            return None
        shape = online.shape.with_decodes(len(offline.ids), sum(offline.context_tokens))
        planned_ms = view.step_time.step_ms(shape)
        target_ms = (min(online.due_s, default=math.inf) - view.start_s) * 1e3 - margin_ms
        pace_ms = min(online.tpot_ms, default=math.inf)
        if planned_ms > min(target_ms, _MAX_PACE * pace_ms):
            return None
        drafted = sum(offline.new_tokens) > len(offline.ids)
        if drafted or online.tokens + len(offline.ids) > view.max_tokens:
            return None
        return StepPlan(view.max_tokens, target_ms=target_ms, planned_ms=planned_ms)

    def _recoverable_ms(self, view: StepView) -> float:
        """How late decodes may become, because steps of online work alone will make up for it."""
        pace_ms = min(view.online.tpot_ms, default=0.0)
        prefill_ms = view.step_time.added_ms(int(view.online_prompt_tokens), 0)
        pace_ms *= 1.0 - view.online_rate * prefill_ms / 1e3  # coming prefills take the rest
        gain_ms = max(0.0, pace_ms - view.step_time.step_ms(view.online.shape))
        return _DEBT * view.online_output_tokens * gain_ms

    def _due_ms(self, view: StepView, margin_ms: float, growth: float) -> float:
        """When the next online token is due, less a margin that grows from token to token."""
        online = view.online
        early_s = math.inf
        for due_s, produced, tpot_ms in zip(
            online.due_s, online.produced, online.tpot_ms, strict=True
        ):
            early_s = min(early_s, due_s - min(margin_ms, growth * produced * tpot_ms) / 1e3)
        return (early_s - view.start_s) * 1e3

    def _add_online_prefills(
        self,
        step: _Step,
        view: StepView,
        prefills: list[PrefillView],
        due_ms: float,
    ) -> tuple[float, bool]:
        """Add them, most urgent first.

        Returns:
            How long offline work may make the step, in ms, and whether a first token would
            otherwise have been late.
        """
        section = self._section
        pace_ms = min(view.online.tpot_ms, default=math.inf)
        target_ms = min(section.idle_step_share * section.ttft_ms, _MAX_PACE * pace_ms, due_ms)
        late_ms = (min(view.online.due_s, default=math.inf) - view.start_s) * 1e3
        late_ms = max(late_ms, pace_ms)
        if len(prefills) <= _FEW:  # with more of them, decodes would only lose what prefills win
            late_ms += self._recoverable_ms(view)
        hurried = False

        def urgency(request: PrefillView) -> tuple[bool, float]:
            # Whoever is late already must not make the others late, too.
            return request.due_s < view.start_s, request.due_s

        for index, request in enumerate(sorted(prefills, key=urgency)):
            tokens = step.room(request, due_ms)
            slack_ms = (request.due_s - view.start_s) * 1e3 * (1.0 - _SURE_ERROR)
            if tokens < request.new_tokens and slack_ms > 0.0:
                # At the pace of the decodes, so many steps are left until its first token is due.
                steps = max(1.0, _HASTE * slack_ms / pace_ms - 1.0)
                needed = min(request.new_tokens, math.ceil(request.new_tokens / steps))
                if not request.splittable and needed:
                    needed = request.new_tokens if steps < _MAX_PACE else 0
                if needed > tokens:
                    hurry = min(needed, step.room(request, late_ms))
                    hurried |= hurry > tokens
                    tokens = max(tokens, hurry)
            if index == 0 and not tokens:
                tokens = _least_tokens(request)
                hurried = True
            tokens = min(tokens, step.tokens_left)
            if not request.splittable and tokens < request.new_tokens:
                tokens = 0
            rest = request.new_tokens - tokens
            steps = 1.0 + (rest / tokens if tokens else math.inf)
            # Every further step that the prefill needs is as long as this one.
            if slack_ms > 0.0:
                target_ms = min(target_ms, slack_ms / steps)
            step.add(request, tokens)
        return target_ms, hurried

    def _overdue(
        self, view: StepView, prefills: list[PrefillView], online: list[PrefillView]
    ) -> PrefillView | str | None:
        """The offline request that must take part now, or None; a decode is given by its id."""
        section, idle_s = self._section, view.offline_idle_s
        owed_ms = section.offline_floor * idle_s * (1.0 + idle_s / section.offline_ageing_s) * 1e3
        if view.offline.ids:
            cost_ms = view.step_time.added_ms(
                view.offline.new_tokens[0], view.offline.context_tokens[0]
            )
            return view.offline.ids[0] if 0.0 < owed_ms >= cost_ms else None
        if not prefills:
            return None
        first = prefills[0]
        tokens = _least_tokens(first)
        if not first.running and (not view.free_slots or any(not r.running for r in online)):
            return None  # it could not be admitted, and what is held for it would be lost
        cost_ms = view.step_time.added_ms(tokens, first.context_tokens)
        return first if 0.0 < owed_ms >= cost_ms else None

    def _add_offline_decodes(
        self,
        step: _Step,
        view: StepView,
        target_ms: float,
        overdue: PrefillView | str | None,
        gone: set[str],
    ) -> set[str]:
        """Add decodes in order while they fit; return the others, to be held."""
        decodes, time = view.offline, view.step_time
        per_decode, per_context, per_token = time.decode, time.context, time.token
        room_ms = target_ms - step.ms()
        tokens_left = step.tokens_left
        count = context = 0
        held: set[str] = set()
        if time.experts:
            # All of those that this step may yet touch, so that none is forgotten.
            most = step.shape.tokens + len(decodes.ids)
            room_ms -= time.experts_ms(most) - time.experts_ms(step.shape.tokens)
        for name, size, tokens in zip(
            decodes.ids, decodes.context_tokens, decodes.new_tokens, strict=True
        ):
            if name in gone:
                continue
            added_ms = per_decode + per_context * size + per_token * (tokens - 1)
            # Who comes later may be cheaper, but first come is first served.
            if (held or added_ms > room_ms or tokens > tokens_left) and name != overdue:
                held.add(name)
                continue
            room_ms -= added_ms
            tokens_left -= tokens
            count += 1
            context += size
        step.used += step.tokens_left - tokens_left
        step.tokens_left = tokens_left
        step.shape = step.shape.with_decodes(count, context)
        return held

    def _offline_prefill_tokens(self, view: StepView, busy: bool) -> int:
        """The most offline prefill tokens in a step of which the model can tell the time."""
        if busy or not view.step_time.ready:
            return max(_COLD_TOKENS, _GROWTH * view.step_time.most_prefill_tokens)
        return view.max_tokens

    def _force_something(
        self, step: _Step, view: StepView, prefills: list[PrefillView], held: set[str]
    ) -> None:
        """A step is never empty, however slow the model says that it is."""
        if view.offline.ids:
            first = view.offline.ids[0]
            held.discard(first)
            step.used += view.offline.new_tokens[0]
        elif prefills:
            step.tokens_left = view.max_tokens
            request = prefills[0]
            step.chunks.pop(request.request_id, None)
            held.discard(request.request_id)
            step.add(request, max(_least_tokens(request), min(_COLD_TOKENS, request.new_tokens)))

    def _victims(self, view: StepView) -> list[str]:
        """Whom to preempt for the first waiting online request: little to recompute, or nobody."""
        waiting = next((r for r in view.waiting if r.online), None)
        if not view.victims or waiting is None:
            return []
        slots, blocks = 1 - view.free_slots, waiting.blocks - view.free_blocks
        chosen: list[Victim] = []
        for victim in sorted(view.victims, key=lambda v: v.recompute_tokens):
            if slots <= 0 and blocks <= 0:
                break
            chosen.append(victim)
            slots -= 1
            blocks -= victim.blocks
        if slots > 0 or blocks > 0:
            return []
        for victim in reversed(chosen[:]):
            # A later, larger one may have made an earlier one unnecessary.
            if slots + 1 <= 0 and blocks + victim.blocks <= 0:
                chosen.remove(victim)
                slots += 1
                blocks += victim.blocks
        return [victim.request_id for victim in chosen]

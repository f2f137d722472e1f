"""The elastic step policy: online deadlines first, offline work into what they leave."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xllm_plugins.latency import StepTime
from xllm_scheduler.config import SchedulerSection
from xllm_scheduler.engine.policy import (
    Late,
    OfflineDecodes,
    PrefillView,
    StepPlan,
    StepPolicy,
    StepView,
    Victim,
)
from xllm_scheduler.engine.step_builder import Step, least_tokens, most_tokens

_COLD_TOKENS = 64  # of offline prefill in a step of which the model has seen nothing alike
_GROWTH = 2  # how far beyond the largest prefill seen so far a prediction is relied on
_SURE_ERROR = 0.05  # an error of the model up to which the margin is as configured
_ERROR_WEIGHT = 4.0  # by how much a larger error widens it
_MAX_MARGIN_STEPS = 2.0
_RESERVE_GROWTH = 1.0  # of the TPOT SLO by which a reserve grows with each token
_EASY_TTFT = 0.5  # the part of the TTFT SLO in which prefills shall be done at the decodes' pace
_EXPECTED = 3.0  # times the prompts that arrive within a TTFT SLO, to be ready for
_FEW = 2  # prefills for which decodes may be late
_DEBT = 0.5  # of the tokens of a mean answer; so many are left of it on average
_HASTE = 0.5  # the part of the time until a first token is due in which its prefill is planned
_DOUBT, _MOST_DOUBT = 1.0, 0.4  # what the model's error takes from the time for a whole prompt
_WHOLE_TTFT = 0.5  # a step with a prompt that cannot be cut may always take so many TTFT SLOs,
_WHOLE_ARRIVALS = 2.0  # or as long as leaves time for so many times the prompts to be expected
_PATIENCE = 0.5  # the part of the TTFT SLO that is left when others are preempted for a request
_GOAL, _CAUTION = 0.98, 20.0  # below this attainment, each 5 % missing double the care
_MAX_PACE = 2.0  # the longest step beside online decodes, in TPOT SLOs


class ElasticPolicy(StepPolicy):
    """Online first; offline only into what the tightest online deadline leaves.

    The n-th token after the first is due at ``first + n * tpot``. A step ends, as predicted, a
    margin before the next token of every decoding online request is due, or it takes no offline
    work. The margin grows from token to token, by ``1 - online_share`` of the TPOT SLO, to
    ``margin_steps`` times the TPOT SLO, more while the latency model errs much. Since deadlines are
    absolute, time that was not used carries over and time that was lost is made up for.

    Online prefills come before offline work, earliest deadline first. They keep to the same end of
    the step unless that would make their first token late; then they may use the margin and make
    decodes late by what these can make up for. Where prompts that are to be expected would need
    that, decodes are kept ahead by a reserve instead. Without online work a step lasts at most
    ``idle_step_share * ttft``, since an online request may arrive during it. Offline work that was
    left out for long takes part whatever it costs: it is owed ``offline_floor`` of the time, more
    the longer it waits. All care grows while online requests miss SLOs for offline work.

    Sources: co-location and slack that carries over are xLLM's (arXiv 2511.21862, 2510.14686),
    chunks beside decodes are Sarathi-Serve's (arXiv 2403.02310); margin, reserve and debt are ours.
    """

    def __init__(self, section: SchedulerSection) -> None:
        self._section = section

    def plan(self, view: StepView) -> StepPlan:
        """Decide one step."""
        margin_ms = self._margin_ms(view)
        reserve_ms = self._reserve_ms(view)
        everyone = self._everyone(view, max(margin_ms, reserve_ms))
        if everyone is not None:
            return everyone

        online = [r for r in (*view.prefills, *view.waiting) if r.online and r.new_tokens]
        preempt = self._victims(view)
        running = [r for r in view.prefills if not r.online and r.new_tokens]
        running = [r for r in running if r.request_id not in preempt]
        queued = [] if preempt else [r for r in view.waiting if not r.online and r.new_tokens]
        step = Step(view)
        busy = bool(view.online.due_s or online)
        owed = self._owed(view, step, running, queued, preempt) if busy else None
        due_ms = self._due_ms(view, margin_ms, 1.0 - self._section.online_share)
        bound_ms, hurried = self._add_online_prefills(step, view, online, due_ms)
        if reserve_ms > margin_ms:
            bound_ms = min(bound_ms, self._due_ms(view, reserve_ms, _RESERVE_GROWTH))
        offline = running or queued or view.offline.ids
        held: set[str] = set()
        if offline:
            targets = self._targets(view, bound_ms)
            held = self._add_offline_decodes(
                step, view.offline, targets[0] if busy else math.inf, owed, preempt
            )
            held |= self._add_offline_prefills(step, view, online, (running, queued), targets)
        step.free_last([*view.prefills, *view.waiting])
        if not step.used:
            held -= self._force_something(step, view, running, queued)
        planned_ms = step.ms()
        late = None
        if planned_ms > bound_ms:
            late = Late.FLOOR if owed else Late.FIRST_TOKEN if hurried else Late.ONLINE
        free = not (offline or preempt or step.timed)
        return StepPlan(
            max_tokens=view.max_tokens if free else step.used,
            held=frozenset(held),
            chunk_tokens=step.chunks,
            admit_offline=any(r.request_id in step.tokens for r in queued),
            preempt=preempt,
            target_ms=bound_ms,
            planned_ms=planned_ms,
            late=late,
        )

    def is_urgent(self, slack_ms: float, new_tokens: int, step_time: StepTime) -> bool:
        """Not as long as a slot or blocks may come free in time without anything recomputed."""
        prefill_ms = step_time.added_ms(new_tokens, 0)
        return slack_ms <= _PATIENCE * self._section.ttft_ms + 2.0 * prefill_ms

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
        return StepPlan(
            view.max_tokens, admit_offline=False, target_ms=target_ms, planned_ms=planned_ms
        )

    def _caution(self, view: StepView) -> float:
        """By how much to be more careful than is planned, since offline work cost SLOs."""
        return 1.0 + _CAUTION * max(0.0, _GOAL - view.relative_attainment)

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
        prefill_ms = _EXPECTED * self._arrivals_ms(view) * self._caution(view)
        pace_ms = min(view.online.tpot_ms, default=self._section.tpot_ms)
        decodes_ms = view.step_time.step_ms(view.online.shape)
        share = max(0.0, 1.0 - decodes_ms / pace_ms)
        return prefill_ms - _EASY_TTFT * share * ttft_ms

    def _arrivals_ms(self, view: StepView) -> float:
        """How long the prefills take that come within a TTFT SLO, at least one."""
        arrivals = max(1.0, view.online_rate * self._section.ttft_ms / 1e3)
        return arrivals * view.step_time.added_ms(int(view.online_prompt_tokens), 0)

    def _recoverable_ms(self, view: StepView) -> float:
        """How late decodes may become, because steps of online work alone will make up for it."""
        pace_ms = min(view.online.tpot_ms, default=0.0)
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

    def _targets(self, view: StepView, bound_ms: float) -> tuple[float, float]:
        """How long offline work may make the step, and how long a prompt that cannot be cut may.

        The latter waits until decodes are so far ahead that it fits, which smaller pieces of
        work beside them, held to a shorter step, do not keep it from.
        """
        section = self._section
        sure = 1.0 - min(_MOST_DOUBT, _DOUBT * view.step_time.error)
        # Who arrives at its start waits for its end, and for the others that have arrived by then.
        arrival_ms = section.ttft_ms - _WHOLE_ARRIVALS * self._arrivals_ms(view)
        whole_ms = sure * min(bound_ms, max(arrival_ms, _WHOLE_TTFT * section.ttft_ms))
        idle_ms = section.idle_step_share * section.ttft_ms / self._caution(view)
        pace_ms = _MAX_PACE * min(view.online.tpot_ms, default=math.inf)
        return min(bound_ms, idle_ms, pace_ms), whole_ms

    def _add_online_prefills(
        self, step: Step, view: StepView, prefills: list[PrefillView], due_ms: float
    ) -> tuple[float, bool]:
        """Add them, most urgent first.

        Returns:
            When the step shall end by all online deadlines, in ms, and whether it shall end later,
            because a first token would otherwise be late.
        """
        pace_ms = min(view.online.tpot_ms, default=math.inf)
        late_ms = max((min(view.online.due_s, default=math.inf) - view.start_s) * 1e3, pace_ms)
        if not view.hurries:
            late_ms = due_ms
        elif len(prefills) <= _FEW:  # with more of them, decodes would only lose what prefills win
            late_ms += self._recoverable_ms(view)
        haste = _HASTE / self._caution(view)
        bound_ms, others_ms, hurried = due_ms, math.inf, False

        def urgency(request: PrefillView) -> tuple[bool, float]:
            # Whoever is late already must not make the others late, too.
            return request.due_s < view.start_s, request.due_s

        for index, request in enumerate(sorted(prefills, key=urgency)):
            most, least = most_tokens(request), least_tokens(request)
            tokens = step.room(request, bound_ms)
            slack_ms = (request.due_s - view.start_s) * 1e3 * (1.0 - _SURE_ERROR)
            if tokens < most and slack_ms > 0.0:
                # At the pace of the decodes, so many steps are left until its first token is due.
                steps = max(1.0, haste * slack_ms / pace_ms - 1.0)
                needed = min(most, math.ceil(request.new_tokens / steps))
                if not request.splittable and steps >= _MAX_PACE:
                    needed = 0  # the decodes may be ahead by so much yet
                if needed > tokens:
                    hurry = min(step.room(request, min(late_ms, others_ms)), max(needed, least))
                    hurried = hurried or hurry > tokens
                    tokens = max(tokens, hurry)
            if index == 0 and not tokens:
                tokens = least
                hurried = True
            could = min(most, step.tokens_left)
            if not request.splittable and could < most:
                continue  # the budget is vLLM's to divide, also by borders that we do not know
            step.timed = step.timed or tokens < could
            step.add(request, tokens)
            if tokens and slack_ms > 0.0:
                # Every further step that the prefill needs is as long as this one.
                share_ms = slack_ms / math.ceil(request.new_tokens / tokens)
                if share_ms >= step.ms():
                    others_ms = min(others_ms, share_ms)
                    bound_ms = min(bound_ms, share_ms)
        return bound_ms, hurried

    def _owed(
        self,
        view: StepView,
        step: Step,
        running: list[PrefillView],
        queued: list[PrefillView],
        preempt: Sequence[str],
    ) -> str | None:
        """Add the least piece of offline work if its turn has come; the id of its request."""
        section, idle_s, time = self._section, view.offline_idle_s, view.step_time
        owed_ms = section.offline_floor * idle_s * (1.0 + idle_s / section.offline_ageing_s) * 1e3
        if owed_ms <= 0.0 or (not time.ready and idle_s < section.offline_ageing_s):
            return None
        for name, size, tokens in zip(
            view.offline.ids, view.offline.context_tokens, view.offline.new_tokens, strict=True
        ):
            if name not in preempt:
                if owed_ms < time.added_ms(tokens, size) or tokens > step.tokens_left:
                    return None
                step.shape = step.shape.with_chunk(tokens, size)
                step.tokens_left -= tokens
                step.used += tokens
                return name
        slots = view.free_slots - len([r for r in view.waiting if r.online])
        admitted = [r for r in queued if slots > 0 and r.blocks <= view.free_blocks]
        for request in (running or admitted)[:1]:
            tokens = least_tokens(request)
            if tokens > step.tokens_left or owed_ms < time.added_ms(tokens, request.context_tokens):
                return None
            if tokens < request.new_tokens and not view.can_cap:
                return None
            step.add(request, tokens)
            return request.request_id
        return None

    def _add_offline_decodes(
        self,
        step: Step,
        decodes: OfflineDecodes,
        target_ms: float,
        owed: str | None,
        preempt: Sequence[str],
    ) -> set[str]:
        """Add decodes in order while they fit; return the others, to be held."""
        time = step.time
        per_decode, per_context = time.decode, time.context
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
            if name == owed or name in preempt:
                continue
            added_ms = per_decode + per_context * size
            if tokens > 1:
                added_ms = time.added_ms(tokens, size)
            # Who comes later may be cheaper, but first come is first served.
            if held or added_ms > room_ms or tokens > tokens_left:
                held.add(name)
                continue
            room_ms -= added_ms
            tokens_left -= tokens
            if tokens > 1:
                step.shape = step.shape.with_chunk(tokens, size)
            else:
                count += 1
                context += size
        step.shape = step.shape.with_decodes(count, context)
        step.used += step.tokens_left - tokens_left
        step.tokens_left = tokens_left
        return held

    def _add_offline_prefills(
        self,
        step: Step,
        view: StepView,
        online: list[PrefillView],
        offline: tuple[list[PrefillView], list[PrefillView]],
        targets: tuple[float, float],
    ) -> set[str]:
        """Add running ones in order, then waiting ones, while they fit; return those to hold."""
        busy = bool(view.online.due_s or online)
        tokens_left = self._trusted_tokens(view, busy)
        # Without caps a request takes what the budget has left, and running ones come first.
        whole_only = not view.can_cap and (bool(step.chunks) or any(not r.running for r in online))
        closed = False
        held: set[str] = set()
        for request in offline[0]:
            tokens = 0 if closed else self._fitting(step, request, targets, tokens_left)
            before = step.tokens.get(request.request_id, 0)
            partial = before + tokens < most_tokens(request)
            if (tokens or before) and not (partial and whole_only):
                step.add(request, tokens)
                tokens_left -= tokens
                closed = partial and not view.can_cap
            elif view.can_cap:
                step.chunks[request.request_id] = 0
            else:
                held.add(request.request_id)
        blocks = view.free_blocks - view.headroom_blocks
        blocks -= sum(r.blocks for r in online if not r.running)
        for request in offline[1]:
            before = step.tokens.get(request.request_id, 0)
            tokens = self._fitting(step, request, targets, tokens_left)
            if closed or not (tokens or before) or (request.blocks > max(0, blocks) and not before):
                break
            step.add(request, tokens)
            tokens_left -= tokens
            blocks -= request.blocks
            closed = not view.can_cap and step.tokens[request.request_id] < most_tokens(request)
        return held

    def _fitting(
        self, step: Step, request: PrefillView, targets: tuple[float, float], most: int
    ) -> int:
        if request.splittable:
            return min(step.room(request, targets[0]), most)
        tokens = step.room(request, targets[1])
        return tokens if tokens <= most else 0

    def _trusted_tokens(self, view: StepView, busy: bool) -> int:
        """The most offline prefill tokens in a step of which the model can tell the time."""
        if not view.step_time.ready:
            return 0 if busy else _COLD_TOKENS
        if busy:
            return max(_COLD_TOKENS, _GROWTH * view.step_time.most_prefill_tokens)
        return view.max_tokens

    def _force_something(
        self,
        step: Step,
        view: StepView,
        running: list[PrefillView],
        queued: list[PrefillView],
    ) -> set[str]:
        """A step is never empty, however slow the model says that it is; whom not to hold."""
        for request in [*running, *queued][:1]:
            step.chunks.pop(request.request_id, None)
            least = max(least_tokens(request), min(_COLD_TOKENS, most_tokens(request)))
            step.add(request, least if request.splittable else most_tokens(request))
            return {request.request_id}
        # What is there cannot be counted: draft tokens beyond the budget. vLLM cuts them.
        step.used = view.max_tokens
        return set(view.offline.ids[:1])

    def _victims(self, view: StepView) -> tuple[str, ...]:
        """Whom to preempt for the first waiting online request: little to recompute, or nobody."""
        waiting = next((r for r in view.waiting if r.online), None)
        if not view.victims or waiting is None:
            return ()
        slots, blocks = 1 - view.free_slots, waiting.blocks - view.free_blocks
        chosen: list[Victim] = []
        for victim in sorted(view.victims, key=lambda v: v.recompute_tokens):
            if slots <= 0 and blocks <= 0:
                break
            chosen.append(victim)
            slots -= 1
            blocks -= victim.blocks
        if slots > 0 or blocks > 0:
            return ()
        for victim in reversed(chosen[:]):
            # A later, larger one may have made an earlier one unnecessary.
            if slots + 1 <= 0 and blocks + victim.blocks <= 0:
                chosen.remove(victim)
                slots += 1
                blocks += victim.blocks
        return tuple(victim.request_id for victim in chosen)

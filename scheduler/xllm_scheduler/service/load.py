"""What each instance is busy with, as a router knows it: what it sent there, and heartbeats.

An instance that reports itself is believed; what this router did since its last report is added.
One that does not is known by this router's own requests alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from xllm_plugins.latency import StepTime
from xllm_scheduler.service.routing import UNKNOWN, InstanceView, RequestView, Role

_MEMORY_S = 10.0  # over which the share of prefills is averaged


class Facts(NamedTuple):
    """What an instance is; given once, when it joins, and again when it changes.

    Attributes:
        step_time: how long its steps take; not ready if that is not known.
        step_tokens: most tokens of one step.
        pace_ms: how long a step lasts at most while online requests generate.
        kv_tokens: what its KV cache holds; 0 if that is not known.
        transfers: whether it sends and fetches KV.
        transfer_ms: what it takes to fetch KV from another instance, beside its tokens.
        transfer_token_ms: and for each token.
    """

    step_time: StepTime = UNKNOWN
    step_tokens: int = 8192
    pace_ms: float = math.inf
    kv_tokens: int = 0
    transfers: bool = True
    transfer_ms: float = 0.0
    transfer_token_ms: float = 0.0


class Beat(NamedTuple):
    """What an instance says of itself now.

    Attributes:
        waiting: requests whose first token is still to come.
        running: requests that generate.
        waiting_tokens: tokens that are to be prefilled.
        context_tokens: what those that generate have for context.
        kv_used: the used share of its KV cache.
    """

    waiting: int = 0
    running: int = 0
    waiting_tokens: int = 0
    context_tokens: int = 0
    kv_used: float = 0.0


@dataclass(slots=True)
class _Load:
    """One instance."""

    role: Role
    facts: Facts
    waiting: int = 0
    running: int = 0
    offline: int = 0
    waiting_tokens: float = 0.0
    waiting_ms: float = 0.0
    context_tokens: float = 0.0
    kv_used: float = 0.0
    coming: int = 0  # requests whose prompts are computed elsewhere before they come
    coming_tokens: int = 0
    work_ms: float = 0.0  # of prefills, decayed
    prompts: float = 0.0  # how many, likewise
    work_at_s: float = 0.0
    view: InstanceView | None = None


@dataclass(slots=True)
class _Sent:
    """A request under way."""

    prefill: str
    decode: str
    new_tokens: float
    work_ms: float
    prompt_tokens: int
    online: bool = True
    first: bool = False


@dataclass
class LoadBook:
    """The books of one router."""

    _loads: dict[str, _Load] = field(default_factory=dict)
    _sent: dict[str, _Sent] = field(default_factory=dict)

    def add(self, instance: str, role: Role, facts: Facts) -> None:
        """An instance has joined, empty; what was sent to one of its name before is not there."""
        self._loads[instance] = _Load(role, facts)
        for sent in self._sent.values():
            if sent.prefill == instance:
                sent.prefill = ""
            if sent.decode == instance:
                sent.decode = ""

    def set_facts(self, instance: str, facts: Facts) -> None:
        """More is known of an instance than before."""
        self._changed(instance).facts = facts

    def remove(self, instance: str) -> None:
        """An instance has gone."""
        self._loads.pop(instance, None)

    def set_role(self, instance: str, role: Role) -> None:
        """An instance is given something else to do."""
        self._changed(instance).role = role

    def beat(self, instance: str, beat: Beat) -> None:
        """An instance has reported itself."""
        load = self._changed(instance)
        load.waiting, load.running = beat.waiting, beat.running
        load.waiting_tokens, load.context_tokens = beat.waiting_tokens, beat.context_tokens
        load.waiting_ms = load.facts.step_time.token * beat.waiting_tokens
        load.kv_used = beat.kv_used

    def placed(self, request: RequestView, prefill: str, decode: str, now_s: float) -> None:
        """A request has been sent to an instance, its KV perhaps to move to another one."""
        load = self._changed(prefill)
        cached = request.cached.get(prefill, 0.0)
        new_tokens = max(1.0, request.prompt_tokens - cached)
        times = load.facts.step_time
        work_ms = new_tokens * (times.token + times.cross * cached + times.square * new_tokens)
        online = request.online
        sent = _Sent(prefill, decode, new_tokens, work_ms, request.prompt_tokens, online)
        self._sent[request.request_id] = sent
        load.waiting += 1
        load.waiting_tokens += new_tokens
        load.waiting_ms += work_ms
        fade = self._fade(load, now_s)
        load.work_ms = load.work_ms * fade + work_ms
        load.prompts = load.prompts * fade + 1.0
        load.work_at_s = now_s
        self._hold(load, request.prompt_tokens)
        if not online and decode in self._loads:
            self._changed(decode).offline += 1
        if decode != prefill and decode in self._loads:
            # It will come, so who routes the next one has to reckon with it.
            goes_to = self._changed(decode)
            goes_to.coming += 1
            goes_to.coming_tokens += request.prompt_tokens
            self._hold(goes_to, request.prompt_tokens)

    def first_token(self, request_id: str) -> None:
        """A request's prompt has been computed."""
        sent = self._sent.get(request_id)
        if sent is None or sent.first:
            return
        sent.first = True
        self._end_prefill(sent)
        if sent.decode != sent.prefill and sent.prefill in self._loads:
            self._release(self._changed(sent.prefill), sent.prompt_tokens)
        if sent.decode in self._loads:
            load = self._changed(sent.decode)
            load.running += 1
            load.context_tokens += sent.prompt_tokens

    def finished(self, request_id: str) -> bool:
        """A request is over, however it ended; whether it was under way."""
        sent = self._sent.pop(request_id, None)
        if sent is None:
            return False
        if not sent.first:
            self._end_prefill(sent)
        load = self._loads.get(sent.decode)
        if load is not None:
            load.view = None
            if not sent.online:
                load.offline -= 1
            if sent.first:
                load.running = max(0, load.running - 1)
                load.context_tokens = max(0.0, load.context_tokens - sent.prompt_tokens)
            self._release(load, sent.prompt_tokens)
        if sent.decode != sent.prefill and not sent.first and sent.prefill in self._loads:
            self._release(self._changed(sent.prefill), sent.prompt_tokens)
        return True

    def views(self, now_s: float) -> list[InstanceView]:
        """What policies see of all instances."""
        return [self._view(name, load, now_s) for name, load in self._loads.items()]

    def prompt_tokens(self, request_id: str) -> int:
        """Of a request that is under way; 0 of another."""
        sent = self._sent.get(request_id)
        return sent.prompt_tokens if sent else 0

    def is_under_way(self, request_id: str) -> bool:
        """Whether a request was placed and is not over."""
        return request_id in self._sent

    def _view(self, name: str, load: _Load, now_s: float) -> InstanceView:
        share = min(1.0, load.work_ms * self._fade(load, now_s) / (_MEMORY_S * 1e3))
        if load.view is not None:
            return load.view._replace(prefill_share=share)
        facts = load.facts
        load.view = InstanceView(
            instance_id=name,
            role=load.role,
            waiting=load.waiting,
            running=load.running + load.coming,
            offline=load.offline,
            waiting_tokens=round(load.waiting_tokens),
            waiting_ms=load.waiting_ms,
            context_tokens=round(load.context_tokens) + load.coming_tokens,
            kv_used=load.kv_used,
            step_time=facts.step_time,
            step_tokens=facts.step_tokens,
            pace_ms=facts.pace_ms,
            prefill_share=share,
            prompt_ms=load.work_ms / load.prompts if load.prompts else 0.0,
            transfers=facts.transfers,
            transfer_ms=facts.transfer_ms,
            transfer_token_ms=facts.transfer_token_ms,
        )
        return load.view

    def _end_prefill(self, sent: _Sent) -> None:
        goes_to = self._loads.get(sent.decode)
        if sent.decode != sent.prefill and goes_to is not None:
            goes_to.view = None
            goes_to.coming = max(0, goes_to.coming - 1)
            goes_to.coming_tokens = max(0, goes_to.coming_tokens - sent.prompt_tokens)
        load = self._loads.get(sent.prefill)
        if load is None:
            return
        load.view = None
        load.waiting = max(0, load.waiting - 1)
        load.waiting_tokens = max(0.0, load.waiting_tokens - sent.new_tokens)
        load.waiting_ms = max(0.0, load.waiting_ms - sent.work_ms)

    def _changed(self, instance: str) -> _Load:
        load = self._loads[instance]
        load.view = None
        return load

    def _fade(self, load: _Load, now_s: float) -> float:
        return math.exp(-(now_s - load.work_at_s) / _MEMORY_S)

    def _hold(self, load: _Load, tokens: float) -> None:
        if load.facts.kv_tokens:
            load.kv_used = min(1.0, load.kv_used + tokens / load.facts.kv_tokens)

    def _release(self, load: _Load, tokens: float) -> None:
        if load.facts.kv_tokens:
            load.kv_used = max(0.0, load.kv_used - tokens / load.facts.kv_tokens)

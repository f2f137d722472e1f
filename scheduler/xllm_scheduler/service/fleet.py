"""All that a router knows and decides, without any I/O: who is there, how busy, with which KV.

The service and the simulator drive it; both tell it what happened and ask it where to send.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xllm_kv.index import NOTHING, KvIndex, Match, Prompt
from xllm_kv.prices import Line
from xllm_plugins.latency import StepTime
from xllm_scheduler.service.breaker import Breaker
from xllm_scheduler.service.forecast import step_ms
from xllm_scheduler.service.kv_book import TEXT_BLOCK, KvBook, credit
from xllm_scheduler.service.load import Beat, Facts, LoadBook
from xllm_scheduler.service.ranks import Ranks
from xllm_scheduler.service.registry import Member, Patience, Record, Registry
from xllm_scheduler.service.routing import (
    InstanceView,
    RequestView,
    Role,
    RolePolicy,
    Route,
    RoutingPolicy,
)
from xllm_scheduler.service.slack import room

# A guess at step times where nobody knows any: only what is more and what is less matters.
_USUAL = StepTime(base=10.0, token=0.05, decode=0.1, context=1e-5)
_REMEMBERED = 10_000  # decisions
_ANSWERS = 0.01  # weight of one answer in the mean length
_NO_TRANSFERS_S = 60.0
_UNIT, _LEAST_MOVE_MS = 64.0, 0.1  # tokens; about what a MiB holds, which is what the line is for


class Decision(NamedTuple):
    """Where a request went, and why; what ``explain`` tells.

    Attributes:
        at_s: when, by the fleet's clock.
        route: where to.
        cached: tokens that each instance held, by credit.
        expected: tokens of answer that were reckoned with.
        ranks: the data-parallel rank at each of the route's instances that has several.
        hit: tokens of the prompt that the first instance was expected to hold, in whatever tier.
    """

    at_s: float
    route: Route
    cached: Mapping[str, float]
    expected: float
    ranks: Mapping[str, int]
    hit: int


@dataclass
class Tally:
    """Requests of one class.

    Attributes:
        placed: sent somewhere.
        apart: of these, to be prefilled and generated at different instances.
        finished: answered in full.
        prompt_tokens: of those that were placed, where it is known.
        expected_hits: tokens of these that their instance was expected to hold.
        stale: of these, where the instance told, those that it did not hold.
        missed: likewise tokens that it held and that were not expected.
    """

    placed: int = 0
    apart: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    expected_hits: int = 0
    stale: int = 0
    missed: int = 0


@dataclass
class Fleet:
    """See the module.

    Attributes:
        routing: places requests.
        roles: changes roles; None for fixed ones.
        most_offline: how many offline requests may wait at an instance; None for as many as come.
        index: who holds which KV.
        registry: who is there.
        tally: counts by class, online first.
    """

    routing: RoutingPolicy
    roles: RolePolicy | None = None
    most_offline: int | None = None
    index: KvIndex = field(default_factory=KvIndex)
    patience: Patience = field(default_factory=Patience)
    new_breaker: Callable[[], Breaker] = Breaker

    def __post_init__(self) -> None:
        self.registry = Registry(self.patience)
        self.tally = {True: Tally(), False: Tally()}
        self.changes: deque[tuple[float, str, Role]] = deque(maxlen=_REMEMBERED)
        self._book = LoadBook()
        self._breakers: dict[str, Breaker] = {}
        self._decisions: dict[str, Decision] = {}
        self.kv = KvBook(self.index)
        self._ranks = Ranks()
        self._no_transfers: dict[str, float] = {}  # until when
        self._moves: dict[str, Line] = {}  # ms over units of tokens
        self._mean_output = 0.0
        self._asked_roles_s = -math.inf

    # Instances

    def join(self, record: Record, now_s: float) -> bool:
        """An instance is there, or its lease is back.

        Returns:
            Whether it is new, or another incarnation of what was there before.
        """
        there = self.registry.members.get(record.name)
        known = there is not None and there.record.incarnation == record.incarnation
        self.registry.joined(record, now_s)
        if known:
            return False
        if there is not None:
            self._forget(record.name, there.record.dp_size)
        role = self.registry.members[record.name].role
        self._book.add(record.name, role, facts_of(record))
        self._breakers[record.name] = self.new_breaker()
        self.kv.add(record)
        return True

    def leave(self, name: str) -> None:
        """An instance is gone."""
        member = self.registry.members.get(name)
        self.registry.left(name)
        self._forget(name, member.record.dp_size if member else 1)

    def beat(self, name: str, incarnation: str, beat: Beat, now_s: float) -> bool:
        """An instance has reported itself; whether it is one that is known."""
        if not self.registry.heard(name, incarnation, now_s):
            return False
        self._book.beat(name, beat)
        return True

    def learned(self, name: str, step_time: Mapping[str, float]) -> None:
        """An instance knows better how long its steps take."""
        if step_time:
            self._known(name, step_time=dict(step_time))

    def moved(self, request_id: str, took_ms: float, now_s: float) -> None:
        """The first token of a request has come, so long after its prompt was done elsewhere."""
        decision = self._decisions.get(request_id)
        prompt_tokens = self._book.prompt_tokens(request_id)
        if decision is None or not prompt_tokens:
            return
        name = decision.route.decode
        view = next((view for view in self.views(now_s) if view.instance_id == name), None)
        if view is None:
            return
        line = self._moves.get(name)
        if line is None:
            line = self._moves[name] = Line(view.transfer_ms, view.transfer_token_ms * _UNIT)
        tokens = max(0.0, prompt_tokens - decision.cached.get(name, 0.0))
        # A step generates the token; what is left over was spent on fetching, or on waiting for it.
        line.learn(tokens / _UNIT, max(_LEAST_MOVE_MS, took_ms - step_ms(view)))
        once_ms = line.at(0.0)
        token_ms = (line.at(1.0) - once_ms) / _UNIT
        self._known(name, transfer_ms=once_ms, transfer_token_ms=token_ms)

    def cannot_transfer(self, name: str, now_s: float) -> None:
        """An instance was asked to send KV and did not offer it; for a while it is not again."""
        self._no_transfers[name] = now_s + _NO_TRANSFERS_S

    def answered(self, name: str, now_s: float) -> None:
        """A probe was answered."""
        member = self.registry.members.get(name)
        if member is not None:
            self.registry.heard(name, member.record.incarnation, now_s)

    def back(self, name: str) -> None:
        """An instance answers probes again that did not for a while: it begins anew."""
        if name in self._breakers:
            self._breakers[name] = self.new_breaker()

    def unanswered(self, name: str, now_s: float) -> None:
        """A probe was not."""
        self.registry.failed(name, now_s)

    def tick(self, now_s: float) -> list[str]:
        """Let time pass; the names of those that are gone."""
        sizes = {name: m.record.dp_size for name, m in self.registry.members.items()}
        gone = self.registry.tick(now_s)
        for name in gone:
            self._forget(name, sizes[name])
        return gone

    def drain(self, name: str, drains: bool) -> None:
        """Give an instance nothing new, or again.

        Raises:
            KeyError: there is none of that name.
        """
        self.registry.members[name].draining = drains

    def set_role(self, name: str, role: Role, now_s: float) -> None:
        """An instance does something else now.

        Raises:
            KeyError: there is none of that name.
        """
        self.registry.members[name].role = role
        self._book.set_role(name, role)
        self.changes.append((now_s, name, role))

    def wanted_roles(self, now_s: float) -> Mapping[str, Role]:
        """The changes of role that the policy asks for now."""
        return {} if self.roles is None else self.roles.roles(self.views(now_s), now_s)

    def views(self, now_s: float) -> list[InstanceView]:
        """What policies see of all instances."""
        members, views = self.registry.members, self._book.views(now_s)
        # Who has not learned its step times yet is taken to be as fast as one that has.
        usual = next((v.step_time for v in views if v.step_time.ready), _USUAL)
        return [
            view._replace(
                accepts=self._accepts(members[view.instance_id], now_s),
                transfers=view.transfers and self._no_transfers.get(view.instance_id, 0.0) <= now_s,
                answer_tokens=self._mean_output,
                model=members[view.instance_id].record.models[0],
                step_time=view.step_time if view.step_time.ready else usual,
            )
            for view in views
        ]

    # Requests

    def place(
        self,
        request: RequestView,
        now_s: float,
        *,
        prompt: Prompt | None = None,
        model: str = "",
        without: Sequence[str] = (),
    ) -> Route | None:
        """Where a request goes.

        Args:
            request: what is known of it.
            now_s: the time.
            prompt: its tokens, if they are known.
            model: only instances that serve it; "" for all.
            without: instances that have failed it.

        Returns:
            None to let it wait for an instance that accepts, and has room if it is offline.
        """
        members = self.registry.members
        matches: dict[tuple[str, int], Match] = {}
        if prompt is not None:
            matches = self.kv.matches(prompt, [m.record for m in members.values()], now_s)
        worth = {place: credit(match) for place, match in matches.items()}
        cached: dict[str, float] = {}
        for (name, _), tokens in worth.items():
            cached[name] = max(cached.get(name, 0.0), tokens)
        expected = request.output_tokens
        if self._mean_output:
            expected = min(expected, self._mean_output)
        seen = request._replace(cached=cached, output_tokens=expected)
        views = [
            view
            for view in self.views(now_s)
            if view.instance_id not in without and self._serves(view.instance_id, model)
        ]
        if self.most_offline is not None and not request.online:
            views = [view for view in views if room(view, self.most_offline)]
        route = self.routing.route(seen, views, now_s)
        if route is None:
            return None
        ranks: dict[str, int] = {}
        for name in {route.prefill, route.decode}:
            self._breakers[name].sent(now_s)
            size = members[name].record.dp_size
            if size > 1:
                ranks[name] = self._ranks.placed(
                    request.request_id, name, size, request.prompt_tokens, worth
                )
        self._book.placed(seen, route.prefill, route.decode, now_s)
        tally = self.tally[request.online]
        tally.placed += 1
        tally.apart += route.prefill != route.decode
        first, rank, hit = members[route.prefill].record, ranks.get(route.prefill, 0), 0
        if prompt is not None:
            self.kv.sent(prompt, first, rank, now_s)
            hit = _usable(matches.get((route.prefill, rank), NOTHING), first, request.prompt_tokens)
            tally.prompt_tokens += request.prompt_tokens
            tally.expected_hits += hit
        self._remember(request.request_id, Decision(now_s, route, cached, expected, ranks, hit))
        return route

    def first_token(self, request_id: str) -> None:
        """A request's prompt has been computed."""
        self._book.first_token(request_id)

    def found(self, request: RequestView, name: str, cached_tokens: int) -> None:
        """How much of a request's prompt an instance says that it held."""
        decision = self._decisions.get(request.request_id)
        if decision is not None and decision.route.prefill == name:  # others get it from there
            tally = self.tally[request.online]
            tally.stale += max(0, decision.hit - cached_tokens)
            tally.missed += max(0, cached_tokens - decision.hit)

    def finished(self, request: RequestView, tokens: int, now_s: float) -> None:
        """A request was answered in full, with so many tokens."""
        self._over(request.request_id)
        self.tally[request.online].finished += 1
        if tokens:
            before = self._mean_output or float(tokens)
            self._mean_output = before + _ANSWERS * (tokens - before)
        decision = self._decisions.get(request.request_id)
        if decision is not None:
            for name in {decision.route.prefill, decision.route.decode} & self._breakers.keys():
                self._breakers[name].succeeded(now_s)

    def failed(self, request_id: str, instance: str, now_s: float) -> None:
        """An instance has failed a request, which may be sent on."""
        self._over(request_id)
        if instance in self._breakers:
            self._breakers[instance].failed(now_s)

    def dropped(self, request_id: str) -> None:
        """A request is over without anybody's fault: its client has gone."""
        self._over(request_id)

    def is_under_way(self, request_id: str) -> bool:
        """Whether a request of that name has been placed and is not over."""
        return self._book.is_under_way(request_id)

    def decision(self, request_id: str) -> Decision | None:
        """Where a request went last; None if that is no longer known."""
        return self._decisions.get(request_id)

    def _known(self, name: str, **facts: Any) -> None:
        member = self.registry.members.get(name)
        if member is not None:
            member.record = dataclasses.replace(member.record, **facts)
            self._book.set_facts(name, facts_of(member.record))

    def _over(self, request_id: str) -> None:
        if not self._book.finished(request_id):
            return
        self._ranks.over(request_id)
        decision = self._decisions.get(request_id)
        if decision is not None:
            for name in {decision.route.prefill, decision.route.decode} & self._breakers.keys():
                self._breakers[name].released()

    def _serves(self, name: str, model: str) -> bool:
        return not model or model in self.registry.members[name].record.models

    def _accepts(self, member: Member, now_s: float) -> bool:
        return member.accepts and self._breakers[member.record.name].passes(now_s)

    def _remember(self, request_id: str, decision: Decision) -> None:
        if len(self._decisions) >= _REMEMBERED:
            del self._decisions[next(iter(self._decisions))]
        self._decisions[request_id] = decision

    def _forget(self, name: str, ranks: int) -> None:
        self._book.remove(name)
        self._moves.pop(name, None)
        self._breakers.pop(name, None)
        self.kv.remove(name, ranks)
        self._ranks.remove(name, ranks)


def _usable(match: Match, record: Record, prompt_tokens: int) -> int:
    """Tokens of a match that an engine leaves out: it computes the last one to say the next."""
    block = record.block_tokens or TEXT_BLOCK
    return min(match.total, max(0, prompt_tokens - 1) // block * block)


def facts_of(record: Record) -> Facts:
    """What an instance said, as the books keep it."""
    coefficients: dict[str, Any] = dict(record.step_time)
    return Facts(
        step_time=StepTime(**coefficients, ready=bool(coefficients)),
        step_tokens=record.step_tokens,
        pace_ms=record.pace_ms or math.inf,
        kv_tokens=record.kv_tokens,
        transfers=record.transfers,
        transfer_ms=record.transfer_ms,
        transfer_token_ms=record.transfer_token_ms,
    )

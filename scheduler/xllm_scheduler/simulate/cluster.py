"""The virtual cluster: events in order of time, instances, routing, roles and failures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xllm_kv.index import Prompt
from xllm_scheduler.service.fleet import Fleet
from xllm_scheduler.service.routing import RequestView, Role, RolePolicy, RoutingPolicy
from xllm_scheduler.simulate.agenda import Agenda
from xllm_scheduler.simulate.clock import START_S, VirtualClock
from xllm_scheduler.simulate.connector import Transfer
from xllm_scheduler.simulate.engine import Engine
from xllm_scheduler.simulate.instance import Instance, Produced
from xllm_scheduler.simulate.members import MODEL, ClusterSpec, record_of, xargs_of
from xllm_scheduler.simulate.network import Network
from xllm_scheduler.simulate.outcomes import Outcome, Run, Sample
from xllm_scheduler.simulate.profiles import Profile
from xllm_scheduler.simulate.workload import Ask, Prompts, Session, Stream, arrivals, fitting

_ROUTER_MS = 1.0  # from one instance's answer to the next one's queue
Progress = Callable[[float, int], None]
"""Called now and then with the virtual seconds passed and the requests that are finished."""


@dataclass(slots=True)
class _Active:
    """A request in the cluster."""

    outcome: Outcome
    name: str  # at the instances; another one for each attempt
    prompt: list[int]
    token: int
    at: str = ""  # the instance that has it
    decode: str = ""  # where it goes after its prefill; empty if it stays
    history: list[int] = field(default_factory=list)  # what was generated after the prompt
    fetched: bool = False  # whether its KV came from another instance
    rest: Sequence[Any] = ()  # further turns of its session
    stream: int = 0


class Cluster:
    """Runs streams of requests on instances; made for one run.

    Args:
        spec: what the cluster is.
        engine: what an instance is.
        profile: how long its steps take.
        routing: places requests.
        roles: changes roles; None for fixed ones.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        engine: Engine,
        profile: Profile,
        routing: RoutingPolicy,
        roles: RolePolicy | None = None,
    ) -> None:
        self._spec, self._engine, self._profile = spec, engine, profile
        self._clock = VirtualClock()
        self._agenda = Agenda(self._clock)
        self._fleet = Fleet(routing, roles)
        self._network = Network(spec.link)
        self._instances = {
            f"i{index}": Instance(f"i{index}", engine, profile, self._clock, role)
            for index, role in enumerate(spec.roles)
        }
        self._wakes: dict[str, float] = {}
        self._active: dict[str, _Active] = {}
        self._unplaced: deque[str] = deque()
        self._outcomes: list[Outcome] = []
        self._samples: list[Sample] = []
        self._log: list[tuple[float, str]] = []
        self._seen: dict[str, tuple[int, int]] = {}
        self._wanted: dict[str, Role] = {}
        self._prompts = Prompts(engine.vllm_config.model_config.get_vocab_size())
        self._streams: list[Stream] = []
        self._backlogs: list[deque[Ask]] = []
        self._to_come = 0
        self._finished = 0
        self._online_to_come = 0
        self._over_late = 0  # online requests that are over and missed an SLO
        self._missed = 0  # those and whose first token was late, by the last sample

    def run(
        self,
        streams: Sequence[Stream],
        *,
        seconds: float | None = None,
        least: float = 0.0,
        progress: Progress | None = None,
    ) -> Run:
        """Run until all requests that come at their times are done.

        Args:
            streams: what is asked.
            seconds: stop then instead, whatever is still under way.
            least: stop as soon as this attainment is out of reach; what came until then tells
                no more than that.
            progress: is told how it goes.

        Raises:
            SimulationError: a policy or a scheduler raised.
        """
        fitted = [fitting(stream, self._engine.max_model_len - 1) for stream in streams]
        self._streams = [stream for stream, _ in fitted]
        self._backlogs = [deque(s.asks if s.outstanding else ()) for s in self._streams]
        for instance in self._instances.values():
            self._join(instance)
        self._plan()
        affordable = (1.0 - least) * self._online_to_come
        end_s = float("inf") if seconds is None else START_S + seconds
        told_s = START_S
        for now_s in self._agenda.happen(end_s):
            if progress is not None and now_s - told_s >= 1.0:
                told_s = now_s
                progress(now_s - START_S, self._finished)
            if seconds is None and not self._to_come:
                break
            if self._missed > affordable:
                break
        last_s = self._clock.now_s if seconds is None else end_s
        return Run(
            outcomes=self._outcomes,
            samples=self._samples,
            seconds=last_s - START_S,
            steps=sum(i.steps for i in self._instances.values()),
            busy_s={name: i.busy_s for name, i in self._instances.items()},
            moved_bytes=self._network.bytes_moved,
            offline_tokens=sum(i.offline_tokens for i in self._instances.values()),
            dropped=sum(dropped for _, dropped in fitted),
            events=self._log,
        )

    def _plan(self) -> None:
        """Put on the agenda what is known from the beginning."""
        at = self._agenda.at
        for at_s, index, item in arrivals(self._streams):
            self._to_come += 1
            if self._streams[index].online:
                self._online_to_come += len(item.turns) if isinstance(item, Session) else 1
            at(START_S + at_s, self._arrive, index, item)
        for index, stream in enumerate(self._streams):
            for _ in range(stream.outstanding):
                at(START_S, self._take_next, index)
        for failure in self._spec.failures:
            at(START_S + failure.at_s, self._lose, failure.instance)
            if failure.back_s != float("inf"):
                at(START_S + failure.back_s, self._recover, failure.instance)
        at(START_S, self._sample)
        at(START_S, self._beat)
        if self._fleet.roles is not None:
            at(START_S + self._spec.roles_every_s, self._ask_roles)

    # Requests

    def _arrive(self, index: int, item: Ask | Session) -> None:
        if isinstance(item, Session):
            self._turn(index, [], item.turns)
        else:
            self._begin(index, self._prompts.of(item), item.output_tokens)

    def _turn(self, index: int, history: list[int], turns: Sequence[Any]) -> None:
        turn = turns[0]
        prompt = history + self._prompts.new(turn.new_tokens)
        self._begin(index, prompt, turn.output_tokens, rest=turns[1:])

    def _take_next(self, index: int) -> None:
        if self._backlogs[index]:
            ask = self._backlogs[index].popleft()
            self._begin(index, self._prompts.of(ask), ask.output_tokens)

    def _begin(
        self, index: int, prompt: list[int], output_tokens: int, rest: Sequence[Any] = ()
    ) -> None:
        stream = self._streams[index]
        request_id = f"{stream.name}-{len(self._outcomes)}"
        outcome = Outcome(
            request_id=request_id,
            stream=stream.name,
            online=stream.online,
            slo=stream.slo,
            arrival_s=self._clock.now_s - START_S,
            prompt_tokens=len(prompt),
            wanted_tokens=output_tokens,
        )
        self._outcomes.append(outcome)
        token = self._prompts.token()
        made = _Active(outcome, request_id, prompt, token, rest=rest, stream=index)
        self._active[request_id] = made
        self._agenda.after(self._profile.request_ms / 2e3, self._place, request_id)

    def _place(self, request_id: str) -> None:
        active = self._active[request_id]
        outcome = active.outcome
        request = self._view(active)
        prompt = Prompt(MODEL, active.prompt) if self._engine.spec.kv_events else None
        route = self._fleet.place(request, self._clock.now_s, prompt=prompt)
        if route is None:
            self._unplaced.append(request_id)
            return
        outcome.prefill, outcome.decode = route.prefill, route.decode
        active.at = route.prefill
        remaining = outcome.wanted_tokens - outcome.tokens
        moves = route.decode != route.prefill and remaining > 1
        active.decode = route.decode if moves else ""
        self._add(active, 1 if moves else remaining, {"do_remote_decode": True} if moves else None)

    def _view(self, active: _Active) -> RequestView:
        outcome = active.outcome
        return RequestView(
            active.name,
            outcome.online,
            len(active.prompt),
            outcome.slo.ttft_ms,
            outcome.slo.tpot_ms,
            output_tokens=self._engine.max_model_len,
        )

    def _add(self, active: _Active, max_tokens: int, transfer: Mapping[str, Any] | None) -> None:
        outcome = active.outcome
        instance = self._instances[active.at]
        instance.add(
            active.name,
            active.prompt,
            max_tokens=max_tokens,
            token=active.token,
            online=outcome.online,
            xargs=xargs_of(outcome),
            transfer=transfer,
        )
        self._advance(instance.instance_id)

    def _advance(self, name: str) -> None:
        instance = self._instances[name]
        if instance.lost:
            return
        now_s = self._clock.now_s
        if self._wakes.get(name, 0.0) <= now_s:
            self._wakes.pop(name, None)
        for produced in instance.advance():
            self._produced(name, produced)
        events = instance.take_events()
        if events:
            self._fleet.kv.applied(name, 0, events)
        for due in instance.transfers():
            self._send(name, due)
        next_s = instance.next_s()
        if next_s is not None and self._wakes.get(name, float("inf")) > next_s:
            self._wakes[name] = next_s
            self._agenda.at(next_s, self._wake, name, next_s)
        if instance.draining and not instance.requests:
            self._drained(name)

    def _wake(self, name: str, at_s: float) -> None:
        if self._wakes.get(name) == at_s:  # else an earlier event has brought it forward
            self._advance(name)

    def _produced(self, name: str, produced: Produced) -> None:
        active = self._active.get(produced.request_id)
        if active is None:
            return
        outcome = active.outcome
        if produced.cached_tokens is not None and outcome.first_s is None and not active.fetched:
            outcome.cached_tokens = produced.cached_tokens
        # What moves is generated, from the first token on, where it goes to, as with vLLM's
        # routers; the instance that prefills generates one token because it cannot do without.
        if produced.cached_tokens is not None:
            self._fleet.first_token(produced.request_id)
        if produced.tokens and not active.decode:
            outcome.produced(produced.tokens, self._clock.now_s - START_S)
            active.history += [active.token] * produced.tokens
        if not produced.finished:
            return
        if active.decode:
            self._agenda.after(_ROUTER_MS / 1e3, self._hand_over, produced.request_id)
            return
        self._done(produced.request_id)

    def _done(self, request_id: str) -> None:
        active = self._active.pop(request_id)
        stream = self._streams[active.stream]
        self._finished += 1
        self._over_late += active.outcome.online and not active.outcome.met
        self._fleet.finished(self._view(active), active.outcome.tokens, self._clock.now_s)
        if stream.outstanding:
            self._agenda.after(0.0, self._take_next, active.stream)
        elif active.rest:
            spoken = active.prompt + active.history
            think_s = active.rest[0].think_s
            self._agenda.after(think_s, self._turn, active.stream, spoken, active.rest)
        else:
            self._to_come -= 1

    # Transfers

    def _hand_over(self, request_id: str) -> None:
        """The prompt is computed: let the other instance fetch its KV and generate."""
        active = self._active.get(request_id)
        if active is None:
            return
        sender, active.at, active.decode = active.at, active.decode, ""
        if self._instances[active.at].lost:
            self._again(request_id)
            return
        active.fetched = True
        transfer = {"do_remote_prefill": True, "sender": sender}
        self._add(active, active.outcome.wanted_tokens - active.outcome.tokens, transfer)

    def _send(self, receiver: str, due: Transfer) -> None:
        now_s = self._clock.now_s
        if not due.tokens:  # all of it was in the receiver's prefix cache
            self._agenda.at(now_s, self._sent, due.sender, due.request_id)
            return
        size = int(due.tokens * self._engine.kv_token_bytes)
        end_s = self._network.transfer(due.sender, receiver, size, now_s)
        self._agenda.at(end_s, self._received, due.sender, receiver, due.request_id)

    def _received(self, sender: str, receiver: str, request_id: str) -> None:
        active = self._active.get(request_id)
        if active is not None and active.at == receiver and active.fetched:
            if self._instances[sender].lost:
                self._instances[receiver].abort(request_id)
                self._again(request_id)
            else:
                self._instances[receiver].received(request_id)
            self._advance(receiver)
        self._sent(sender, request_id)

    def _sent(self, sender: str, request_id: str) -> None:
        instance = self._instances[sender]
        if not instance.lost and request_id in instance.requests:
            instance.sent(request_id)
            self._advance(sender)

    # Failures

    def _lose(self, name: str) -> None:
        instance = self._instances[name]
        self._note(f"{name} is lost")
        instance.lost, instance.draining = True, False
        self._wanted.pop(name, None)
        self._network.forget(name)
        self._fleet.leave(name)
        for request_id in instance.restart():
            active = self._active.get(request_id)
            if active is not None and active.at == name:
                self._again(request_id)

    def _recover(self, name: str) -> None:
        self._note(f"{name} is back")
        instance = self._instances[name]
        instance.lost = False
        self._join(instance)
        self._place_waiting()

    def _again(self, request_id: str) -> None:
        """Go on with a request elsewhere; what was generated is kept, its KV is not."""
        active = self._active.pop(request_id)
        self._fleet.dropped(request_id)
        active.prompt = active.prompt + active.history
        active.history, active.at, active.decode, active.fetched = [], "", "", False
        active.outcome.attempts += 1
        # The instance that it was at may still have it under the old name.
        active.name = f"{active.outcome.request_id}.{active.outcome.attempts}"
        self._active[active.name] = active
        self._agenda.after(_ROUTER_MS / 1e3, self._place, active.name)

    def _place_waiting(self) -> None:
        waiting, self._unplaced = self._unplaced, deque()
        for request_id in waiting:
            self._place(request_id)

    # Roles

    def _ask_roles(self) -> None:
        for name, role in self._fleet.wanted_roles(self._clock.now_s).items():
            instance = self._instances[name]
            if role is instance.role or instance.lost or instance.draining:
                continue
            if not self._spec.drain:
                self._change_role(name, role)
                continue
            self._note(f"{name} drains, to become {role.value}")
            instance.draining = True
            self._fleet.drain(name, True)
            self._wanted[name] = role
            self._advance(name)
        self._agenda.after(self._spec.roles_every_s, self._ask_roles)

    def _drained(self, name: str) -> None:
        role = self._wanted.pop(name, None)
        if role is not None:
            self._agenda.after(self._spec.role_change_ms / 1e3, self._change_role, name, role)

    def _change_role(self, name: str, role: Role) -> None:
        instance = self._instances[name]
        if instance.lost:
            return
        self._note(f"{name} is {role.value}")
        instance.take_role(role)
        instance.draining = False
        self._fleet.set_role(name, role, self._clock.now_s)
        self._fleet.drain(name, False)
        self._place_waiting()

    def _join(self, instance: Instance) -> None:
        record = record_of(instance, self._engine, self._profile, self._spec.link)
        self._fleet.join(record, self._clock.now_s)

    # What is seen

    def _note(self, what: str) -> None:
        self._log.append((self._clock.now_s - START_S, what))

    def _beat(self) -> None:
        for name, instance in self._instances.items():
            if not instance.lost:
                self._fleet.beat(name, "", instance.beat(), self._clock.now_s)
        self._agenda.after(self._spec.beat_s, self._beat)

    def _sample(self) -> None:
        now_s = self._clock.now_s
        self._missed = self._over_late + sum(
            active.outcome.late_by(now_s - START_S) for active in self._active.values()
        )
        for name, instance in self._instances.items():
            beat = instance.beat()
            tokens, offline = self._seen.get(name, (0, 0))
            computed = instance.tokens - tokens
            self._seen[name] = (instance.tokens, instance.offline_tokens)
            self._samples.append(
                Sample(
                    at_s=now_s - START_S,
                    instance=name,
                    role="lost" if instance.lost else instance.role.value,
                    waiting=beat.waiting,
                    running=beat.running,
                    kv_used=beat.kv_used,
                    offline_share=(instance.offline_tokens - offline) / computed
                    if computed
                    else 0.0,
                )
            )
        self._agenda.after(self._spec.sample_s, self._sample)

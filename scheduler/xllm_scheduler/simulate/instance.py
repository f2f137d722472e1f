"""One simulated instance: vLLM's scheduler, driven as vLLM's engine drives it, on virtual time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from xllm_plugins.errors import XllmError
from xllm_plugins.latency import StepShape
from xllm_scheduler.engine.load import beat_of, take_role
from xllm_scheduler.service.load import Beat
from xllm_scheduler.service.routing import Role
from xllm_scheduler.simulate.clock import VirtualClock
from xllm_scheduler.simulate.connector import Transfer
from xllm_scheduler.simulate.engine import Engine
from xllm_scheduler.simulate.profiles import Profile

_IDLE_S = 0.001  # how long vLLM's engine sleeps when it could execute nothing


class SimulationError(XllmError):
    """A policy or a scheduler raised; says when, for whom, and what."""


class _Launched(NamedTuple):
    output: Any
    result: ModelRunnerOutput
    end_s: float
    transfers: Sequence[Transfer] = ()  # that begin when it has ended


class Produced(NamedTuple):
    """What one step brought a request.

    Attributes:
        request_id: whose.
        tokens: how many new ones.
        finished: whether it is done at this instance.
        cached_tokens: of its prompt, found in the prefix cache; None but with the first token.
    """

    request_id: str
    tokens: int
    finished: bool
    cached_tokens: int | None


class Instance:
    """A scheduler, the steps in flight, and what its GPUs do with them.

    Attributes:
        instance_id: its id.
        role: what routing gives it.
        draining: whether it takes no new requests, until its role has changed.
        lost: whether it has failed.
    """

    def __init__(
        self, instance_id: str, engine: Engine, profile: Profile, clock: VirtualClock, role: Role
    ) -> None:
        self.instance_id = instance_id
        self.role = role
        self.draining = False
        self.lost = False
        self.steps = 0
        self.busy_s = 0.0
        self.offline_tokens = self.tokens = 0
        self._engine, self._profile, self._clock = engine, profile, clock
        self._depth = engine.depth
        self._tells = engine.spec.kv_events
        self._rng = random.Random(f"jitter-{instance_id}")  # noqa: S311 - not for secrets
        self.restart()

    def restart(self) -> list[str]:
        """Begin anew and empty; the ids of the requests that were there."""
        gone = list(self.requests) if hasattr(self, "scheduler") else []
        self._events: list[Any] = []
        self.scheduler = self._engine.scheduler(self._clock, self if self._tells else None)
        self.take_role(self.role)
        self._in_flight: deque[_Launched] = deque()
        self._free_s = self._clock.now_s
        self._received: set[str] = set()
        self._sent: set[str] = set()
        self._due: list[Transfer] = []
        self._token: dict[str, int] = {}
        self._offline: set[str] = set()
        return gone

    @property
    def requests(self) -> Mapping[str, Any]:
        """VLLM's requests that are not finished, by id."""
        found: Mapping[str, Any] = self.scheduler.requests
        return found

    def add(
        self,
        request_id: str,
        prompt: list[int],
        *,
        max_tokens: int,
        token: int,
        online: bool,
        xargs: Mapping[str, Any],
        transfer: Mapping[str, Any] | None = None,
    ) -> None:
        """Take in a request.

        Args:
            request_id: unique here.
            prompt: its tokens.
            max_tokens: how many tokens are generated; no other end is known here.
            token: the one that it generates, again and again.
            online: whether it has SLOs.
            xargs: its class and SLOs, as clients say them.
            transfer: vLLM's ``kv_transfer_params``.
        """
        extra = dict(xargs)
        if transfer is not None:
            extra["kv_transfer_params"] = dict(transfer)
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=params,
            pooling_params=None,
            arrival_time=self._clock.now_s,
            priority=0 if online else 1,
            block_hasher=self._engine.block_hasher,
        )
        self._token[request_id] = token
        if not online:
            self._offline.add(request_id)
        self.scheduler.add_request(request)

    def take_role(self, role: Role) -> None:
        """Do something else from now on."""
        self.role = role
        take_role(self.scheduler, {"role": role.value})

    def abort(self, request_id: str) -> None:
        """Drop a request."""
        self.scheduler.finish_requests([request_id], RequestStatus.FINISHED_ABORTED)

    def received(self, request_id: str) -> None:
        """The KV of a request has arrived."""
        self._received.add(request_id)

    def sent(self, request_id: str) -> None:
        """The KV of a request has been taken away."""
        if request_id in self.requests:
            self._sent.add(request_id)

    def advance(self) -> Iterator[Produced]:
        """End the steps that are over and launch those that can be; what the former brought."""
        now_s = self._clock.now_s
        while self._in_flight and self._in_flight[0].end_s <= now_s:
            yield from self._end(self._in_flight.popleft())
        while len(self._in_flight) < self._depth and self._has_work():
            output = self.scheduler.schedule()
            failure = getattr(self.scheduler, "policy_failure", "")
            if failure:
                raise SimulationError(f"the step policy of {self.instance_id} raised {failure}")
            due = self.scheduler.connector.take_due()
            if self._engine.forward_blocks:
                launched = self._launch(output, now_s)._replace(transfers=due)
            else:
                launched = self._launch(output, now_s)
                self._due += due
            if output.total_num_scheduled_tokens or self._in_flight:
                self._in_flight.append(launched)
                continue
            # As vLLM's engine: nothing was to be executed, so it is over at once.
            yield from self._end(launched)
            if not self._received and not self._sent:
                return

    def next_s(self) -> float | None:
        """When to advance again, if nothing happens before; None if there is nothing to do."""
        if self._in_flight:
            return self._in_flight[0].end_s
        return self._clock.now_s + _IDLE_S if self._has_work() else None

    def transfers(self) -> list[Transfer]:
        """The KV that requests here wait for, since the last call."""
        due, self._due = self._due, []
        return due

    def publish(self, batch: Any) -> None:
        """Take KV events of the scheduler, as vLLM's publishers do."""
        self._events += batch.events

    def take_events(self) -> list[Any]:
        """The KV events since the last call."""
        events, self._events = self._events, []
        return events

    def beat(self) -> Beat:
        """What it says of itself."""
        return beat_of(self.scheduler)

    def _has_work(self) -> bool:
        return bool(self.scheduler.has_requests() or self._received or self._sent)

    def _launch(self, output: Any, now_s: float) -> _Launched:
        requests, shape = self.requests, StepShape()
        ids = list(output.num_scheduled_tokens)
        sampled: list[list[int]] = []
        decodes = context = 0
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            # vLLM has already advanced it by the tokens of this step.
            computed = request.num_computed_tokens - tokens
            if tokens == 1:
                decodes += 1
                context += computed
            else:
                shape = shape.with_chunk(tokens, computed)
            if request_id in self._offline:
                self.offline_tokens += tokens
            sampled.append([] if request.is_prefill_chunk else [self._token[request_id]])
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
        )
        if not ids:
            return _Launched(output, result, max(now_s, self._free_s))
        self.tokens += output.total_num_scheduled_tokens
        took_s = self._profile.step_ms(shape.with_decodes(decodes, context)) / 1e3
        if self._profile.jitter:
            took_s *= self._rng.lognormvariate(0.0, self._profile.jitter)
        self._free_s = max(now_s, self._free_s) + took_s
        self.steps += 1
        self.busy_s += took_s
        return _Launched(output, result, self._free_s)

    def _end(self, step: _Launched) -> Iterator[Produced]:
        self._due += step.transfers
        if self._received or self._sent:
            step.result.kv_connector_output = KVConnectorOutput(
                finished_sending=self._sent, finished_recving=self._received
            )
            self._received, self._sent = set(), set()
        for outputs in self.scheduler.update_from_output(step.output, step.result).values():
            for one in outputs.outputs:
                stats = one.prefill_stats
                finished = one.finish_reason is not None
                if finished:
                    self._token.pop(one.request_id, None)
                    self._offline.discard(one.request_id)
                yield Produced(
                    one.request_id,
                    len(one.new_token_ids),
                    finished,
                    None if stats is None else stats.num_cached_tokens,
                )

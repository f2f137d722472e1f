"""An engine without a model: a real vLLM scheduler and KV cache manager, driven as vLLM does."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from benchmarks.lab.engine import build as lab_build
from tests.contract.worker import Worker
from xllm_plugins.latency import StepShape

OFFLINE = {"xllm_class": "offline"}
BOTH = pytest.mark.parametrize("base", [Scheduler, AsyncScheduler])
MAX_LEN = 96
BLOCK = 4
_VOCABULARY = 64
_EMPTY_STEP_S = 0.001  # how long vLLM's engine sleeps when it could execute nothing


@dataclass
class Clock:
    """Stands in for the module ``time``."""

    now_s: float = 1000.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s


def build(
    scheduler_class: type,
    *,
    settings: Mapping[str, Any] | None = None,
    budget: int = 64,
    seqs: int = 8,
    blocks: int = 128,
    policy: str = "fcfs",
) -> Any:
    """A scheduler of this class; ``settings`` are those of the section ``scheduler``."""
    return lab_build(
        scheduler_class,
        # What one test learns is nothing that another may start from.
        {"profile_dir": "", **(settings or {})},
        budget=budget,
        seqs=seqs,
        blocks=blocks,
        block_tokens=BLOCK,
        max_len=MAX_LEN,
        vocabulary=_VOCABULARY,
        policy=policy,
    )


def request(
    request_id: str,
    prompt: Sequence[int] | int = 8,
    *,
    max_tokens: int = 4,
    xargs: Mapping[str, Any] | None = None,
    priority: int = 0,
    arrival_s: float = 1000.0,
    stop: Sequence[int] = (),
    resumable: bool = False,
    lora: int = 0,
    salt: str = "",
    block: int = BLOCK,
) -> Request:
    """A request as the engine core makes it; a prompt given as a number is so many tokens."""
    tokens = list(range(prompt)) if isinstance(prompt, int) else list(prompt)
    params = SamplingParams(
        max_tokens=max_tokens, stop_token_ids=list(stop), extra_args=dict(xargs) if xargs else None
    )
    return Request(
        request_id=request_id,
        prompt_token_ids=tokens,
        sampling_params=params,
        pooling_params=None,
        priority=priority,
        arrival_time=arrival_s,
        block_hasher=get_request_block_hasher(block, sha256),
        resumable=resumable,
        cache_salt=salt or None,
        lora_request=LoRARequest(f"adapter-{lora}", lora, "/nowhere") if lora else None,
    )


class Step(NamedTuple):
    """A step that has ended; ``plan`` is what the elastic scheduler planned, if it did."""

    scheduled: dict[str, int]
    plan: Any
    start_s: float
    end_s: float


@dataclass
class Engine:
    """Drives a scheduler as ``EngineCore.step`` and ``step_with_batch_queue`` do.

    Attributes:
        depth: how many steps are in flight at most; 2 under asynchronous scheduling.
        token_ms: what the device needs for a token, beside 5 ms for each step.
        streams: the tokens that each request was given.
        reasons: why each request ended.
        steps: the tokens of every step, by request.
        ended: every step that has ended.
        times_s: when each request was given each of its tokens.
    """

    scheduler: Any
    clock: Clock = field(default_factory=Clock)
    token_ms: float = 0.5
    streams: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    steps: list[dict[str, int]] = field(default_factory=list)
    ended: list[Step] = field(default_factory=list)
    times_s: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.depth = 2 if isinstance(self.scheduler, AsyncScheduler) else 1
        self._worker = Worker(self.scheduler.block_size)
        self._in_flight: deque[tuple[Any, Any, Step]] = deque()
        self._device_free_s = 0.0

    def add(self, *requests: Request) -> None:
        for one in requests:
            self.streams[one.request_id] = []
            self.times_s[one.request_id] = []
            self.scheduler.add_request(one)

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.reasons.setdefault(request_id, "abort")

    def step(self) -> dict[str, int]:
        """One turn of the engine's loop; what it scheduled."""
        scheduled: dict[str, int] = {}
        if self.scheduler.has_requests():
            scheduled = self._launch()
            if len(self._in_flight) < self.depth:
                return scheduled
        if self._in_flight:
            self._finish(*self._in_flight.popleft())
        return scheduled

    def run(self, most: int = 500) -> None:
        """Step until nothing is left to do."""
        for _ in range(most):
            if not self.scheduler.has_requests() and not self._in_flight:
                return
            self.step()
        raise AssertionError(f"still busy after {most} steps: {self.scheduler.requests}")

    def _launch(self) -> dict[str, int]:
        output = self.scheduler.schedule()
        scheduled = dict(output.num_scheduled_tokens)
        self.steps.append(scheduled)
        tokens = sum(scheduled.values())
        took_s = (5.0 + self.token_ms * tokens) / 1e3 if tokens else _EMPTY_STEP_S
        start_s = max(self._device_free_s, self.clock.now_s)
        self._device_free_s = start_s + took_s
        books = getattr(self.scheduler, "_books", None)
        plan = books._plan if books is not None else None
        step = Step(scheduled, plan, start_s, self._device_free_s)
        self._in_flight.append((output, self._worker.execute(output), step))
        self.clock.now_s += 0.0001
        return scheduled

    def _finish(self, output: Any, result: Any, step: Step) -> None:
        self.clock.now_s = max(self.clock.now_s, step.end_s)
        self.ended.append(step)
        answers = self.scheduler.update_from_output(output, result)
        for one in (one for client in answers.values() for one in client.outputs):
            self.streams[one.request_id] += one.new_token_ids
            self.times_s[one.request_id] += [self.clock.now_s] * len(one.new_token_ids)
            if one.finish_reason is not None:
                self.reasons[one.request_id] = str(one.finish_reason)


def check_kv_books(scheduler: Any) -> None:
    """Every KV block is free or held, and held exactly as often as requests hold it."""
    pool = scheduler.kv_cache_manager.block_pool
    held: Counter[int] = Counter()
    for request_id in scheduler.requests:
        ids = scheduler.kv_cache_manager.get_block_ids(request_id)[0]
        assert len(set(ids)) == len(ids), f"{request_id} holds a block twice: {ids}"
        held.update(ids)
    free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
    real = [block for block in pool.blocks if not block.is_null]
    assert {b.block_id: b.ref_cnt for b in real} == {b.block_id: held[b.block_id] for b in real}
    assert free == {block.block_id for block in real if not block.ref_cnt}


def warm_up(scheduler: Any, token_ms: float) -> None:
    """Have it learn that a step takes 5 ms and ``token_ms`` for each token."""
    for i in range(1, 17):
        shape = StepShape().with_chunk(i * 4, 8 * i)
        for _ in range(i % 4):
            shape = shape.with_chunk(1, 10 * i)
        tokens = shape.prefill_tokens + shape.decodes
        scheduler._model.observe(shape, 5.0 + token_ms * tokens)
    assert scheduler._model.current.ready

"""What a step policy is shown and what it decides: plain data, and the interface.

A policy says which requests take part in the next engine step, and with how many tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from xllm_plugins.latency import StepShape, StepTime


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
        step_tokens: the most that vLLM computes of it in one step.
        splittable: whether they may be cut into chunks of any size.
        blocks: how many KV blocks it needs to be admitted; 0 for a running request.
    """

    request_id: str
    online: bool
    running: bool
    due_s: float
    new_tokens: int
    context_tokens: int = 0
    step_tokens: int = 1 << 30
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
        relative_attainment: the share of recent online requests that met both SLOs, of those that
            would have without offline work.
        hurries: whether prefills may make decodes late; not at an instance that is there to
            generate, whose prompts are short or overflow from elsewhere.
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
    relative_attainment: float = 1.0
    hurries: bool = True
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

    def is_urgent(self, slack_ms: float, new_tokens: int, step_time: StepTime) -> bool:
        """Whether to look for requests to preempt for a waiting online one that finds no room.

        Args:
            slack_ms: how long after the start of the step its first token is due.
            new_tokens: how many of its tokens are left to compute.
            step_time: the current latency model.
        """
        return False

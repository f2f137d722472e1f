"""Where a request goes and which role an instance has: the interface that policies implement.

The router and the simulator carry the same policies. What a policy sees is plain data, and the time
is handed to it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from xllm_plugins.latency import StepTime

UNKNOWN = StepTime()
_NONE: Mapping[str, float] = MappingProxyType({})


class Role(str, Enum):
    """What an instance is given to do. A role is routing state: every instance can do all."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class RequestView(NamedTuple):
    """A request that has to be placed.

    Attributes:
        request_id: its id.
        online: whether it has SLOs.
        prompt_tokens: to be computed or found in a cache.
        ttft_ms: its SLO; infinite for offline requests.
        tpot_ms: its SLO; infinite for offline requests.
        output_tokens: how many it is expected to generate.
        cached: tokens of its prompt that each instance need not compute, by its id; those in slower
            tiers count for less.
        session: what its client's requests have in common; empty for nothing.
    """

    request_id: str
    online: bool
    prompt_tokens: int
    ttft_ms: float = math.inf
    tpot_ms: float = math.inf
    output_tokens: float = 1.0
    cached: Mapping[str, float] = _NONE
    session: str = ""


class InstanceView(NamedTuple):
    """What is known of an instance.

    Attributes:
        instance_id: its id.
        role: what it is given to do.
        waiting: requests whose first token is still to come.
        running: requests that generate.
        offline: offline requests that this router has under way there.
        waiting_tokens: tokens that are to be prefilled there.
        waiting_ms: how long that takes, beside the steps' base.
        context_tokens: what those that generate have for context, in all.
        kv_used: the used share of its KV cache, 0..1.
        accepts: False while it drains or is lost.
        step_time: how long its steps take; not ready if that is not known.
        step_tokens: most tokens of one step.
        pace_ms: how long a step lasts at most while online requests generate; infinite for an
            engine that does not look.
        prefill_share: the recent share of its time that went into prefills, 0..1.
        prompt_ms: what a recent prompt took of its time on average.
        answer_tokens: what a recent answer of the fleet had on average.
        transfers: whether it sends and fetches KV.
        transfer_ms: what it takes to fetch KV from another instance, beside its tokens.
        transfer_token_ms: and for each token.
        model: what it serves.
    """

    instance_id: str
    role: Role
    waiting: int = 0
    running: int = 0
    offline: int = 0
    waiting_tokens: int = 0
    waiting_ms: float = 0.0
    context_tokens: int = 0
    kv_used: float = 0.0
    accepts: bool = True
    step_time: StepTime = UNKNOWN
    step_tokens: int = 8192
    pace_ms: float = math.inf
    prefill_share: float = 0.0
    prompt_ms: float = 0.0
    answer_tokens: float = 0.0
    transfers: bool = True
    transfer_ms: float = 0.0
    transfer_token_ms: float = 0.0
    model: str = ""


class Route(NamedTuple):
    """Where a request goes.

    Attributes:
        prefill: the instance that computes its prompt.
        decode: the instance that generates; the same one unless KV is to be moved.
        why: the reason, in a few words.
        costs: what each instance that was looked at would have cost, lowest best; in ms where the
            policy predicts.
    """

    prefill: str
    decode: str
    why: str = ""
    costs: Sequence[tuple[str, float]] = ()


class RoutingPolicy(ABC):
    """The interface of kind ``service.routing``."""

    reads_cached = False
    """Whether it looks at :attr:`RequestView.cached`, which costs tokenising the prompt."""

    @abstractmethod
    def route(
        self, request: RequestView, instances: Sequence[InstanceView], now_s: float
    ) -> Route | None:
        """Place one request; None to let it wait for an instance that accepts."""


class RolePolicy(ABC):
    """The interface of kind ``service.roles``."""

    @abstractmethod
    def roles(self, instances: Sequence[InstanceView], now_s: float) -> Mapping[str, Role]:
        """The role that each instance shall have, by id; those that may stay can be left out."""

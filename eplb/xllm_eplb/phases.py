"""Steps that compute prompts and steps that generate: their loads are kept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from xllm_eplb.search import Floats


class Phase(str, Enum):
    """Which steps of a window."""

    ALL = "all"
    DECODE = "decode"
    PREFILL = "prefill"


PHASES = (Phase.PREFILL, Phase.DECODE)


@dataclass(frozen=True)
class Prefill:
    """What the prefill steps of a window had.

    Attributes:
        load: tokens of each expert in them, ``[layers, experts]``.
        share: of the window's steps, 0 to 1.
    """

    load: Floats
    share: float


def is_prefill(scheduled: Mapping[str, int], drafts: Mapping[str, Sequence[int]]) -> bool:
    """Whether most of a step's tokens are prompts'.

    A request that generates has one token in a step, and those drafted for it; any other prefills.

    Args:
        scheduled: tokens of the step, by request.
        drafts: of these the drafted ones, by request.
    """
    generated = sum(
        tokens
        for request, tokens in scheduled.items()
        if tokens <= 1 + len(drafts.get(request, ()))
    )
    return 2 * generated < sum(scheduled.values())

"""Settings of the adaptive proposer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from xllm_plugins.config import Mode, Section, option


class Choice(str, Enum):
    """Whose drafts are used."""

    BEST = "best"
    NGRAM = "ngram"
    SUFFIX = "suffix"


@dataclass(frozen=True)
class SpecDecodeSection(Section):
    """The ``spec_decode`` section."""

    # Until it has been measured that drafts are never slower than none.
    mode: Mode = option(Mode.OFF, "on where it can help, always on, or off")
    drafter: Choice = option(
        Choice.BEST,
        "whose drafts are used: ngram (the request's own text), suffix (recent outputs of all "
        "requests), or for each request the better one",
    )
    most_tokens: int = option(
        16, "tokens of a draft at most; how many it is, is chosen", at_least=1, at_most=64
    )
    tpot_ms: float = option(
        0.0,
        "TPOT that a step with drafts must not exceed, ms; 0 for that of each online request where "
        "xllm.scheduler is active, else none",
        at_least=0.0,
    )
    shared_mib: float = option(
        32.0, "memory for recent outputs of all requests, MiB", above=0.0, at_most=4096.0
    )

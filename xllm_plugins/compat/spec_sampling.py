"""Seam: temperatures and top-k of requests with drafts on vLLM's CPU platform.

vLLM spreads each request's over its drafted tokens with a kernel, whose stand-in for CPUs writes
whatever is not a 64-bit integer into a copy: such requests would be sampled at a temperature that
nobody has set, and one with ``top_k`` ends the engine.
"""

from __future__ import annotations

from typing import Any

from xllm_plugins.compat import Target, patch

WHY = "On CPUs vLLM samples requests with drafts at temperatures out of uninitialised memory."
WITHOUT = "xllm.spec_decode is off."
HOLDS_FOR = ">=0.23,<0.33"
_SAMPLER = "vllm.v1.sample.rejection_sampler"
SEAM = (
    Target(
        f"{_SAMPLER}:expand_batch_to_tokens",
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
    ),
)


def mend() -> None:
    """Spread them as vLLM means to, in this process, if it computes on a CPU."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if current_platform.is_cpu():
        patch(rejection_sampler, "expand_batch_to_tokens", lambda _: spread, "spec_sampling")


def spread(
    x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    """Each value of ``x`` ``[requests]`` as often as its request has tokens, ``[num_tokens]``.

    Args:
        x: a tensor.
        cu_num_tokens: how many tokens requests have up to each of them, ``[requests]``.
        num_tokens: of all.
        replace_from: a value that becomes another one.
        replace_to: that one.
    """
    ends = cu_num_tokens.long()
    counts = ends.diff(prepend=ends.new_zeros(1))
    values = x.masked_fill(x == replace_from, replace_to)
    return values.repeat_interleave(counts, output_size=num_tokens)

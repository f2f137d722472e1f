"""Claim: giving up KV by predicted reuse saves at least as much prefill time as LRU and ARC.

A trace's prompts, in order, through one cache of so many blocks; only what is found from a prompt's
first block on without a hole counts, at what its prefill takes by a shipped profile. Belady's
eviction, which knows the future, is the most that any cache could save:

    python -m benchmarks.kv_policy --mooncake mooncake_conversation_trace.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.lab.belady import Belady
from benchmarks.lab.caches import Arc, Cache, Lru, Ours
from xllm_scheduler.simulate.profiles import find_profile
from xllm_scheduler.simulate.traces import read_trace

SIZES = (0.05, 0.1, 0.2, 0.4, 0.8)
MODEL, GPU, TENSOR_PARALLEL, BLOCK = "Qwen3-32B", "h200", 4, 512
CLAIM_SMALL, SMALL = 1.1, 0.05


@dataclass(frozen=True)
class Result:
    """What one cache brought: hit tokens, and the prefill seconds that they saved."""

    hit_tokens: int
    saved_s: float


def main() -> None:
    """Runs the comparison."""
    options = _options()
    prompts = [ask.hash_ids for ask in read_trace(options.mooncake)]
    blocks = len({block for prompt in prompts for block in prompt})
    console = Console()
    console.print(f"{len(prompts)} prompts, {blocks} distinct blocks of {BLOCK} tokens")
    rows: dict[float, dict[str, Result]] = {}
    for size in track(SIZES, "caches", console=console):
        capacity = int(size * blocks)
        caches: dict[str, Cache] = {
            "lru": Lru(capacity),
            "arc": Arc(capacity),
            "ours": Ours(capacity),
            "belady": Belady(capacity, prompts),
        }
        rows[size] = {name: measured(cache, prompts) for name, cache in caches.items()}
    console.print(_table(rows))
    small = rows[SMALL]
    ratio = small["ours"].saved_s / max(small["lru"].saved_s, small["arc"].saved_s)
    console.print(
        f"at {SMALL:.0%}: {ratio:.2f} of the better of LRU and ARC (claim: {CLAIM_SMALL})"
    )
    if options.json:
        plain = {
            size: {name: vars(found) for name, found in row.items()} for size, row in rows.items()
        }
        options.json.write_text(json.dumps(plain, indent=1))


def measured(cache: Cache, prompts: Sequence[Sequence[int]]) -> Result:
    """Put all prompts through a cache.

    Args:
        cache: empty.
        prompts: each one's block ids, in order of arrival.
    """
    step_time = find_profile(GPU, MODEL, TENSOR_PARALLEL).step_time
    costs_ms: list[float] = []
    hits, saved_ms = 0, 0.0
    for prompt in prompts:
        while len(costs_ms) < len(prompt):
            costs_ms.append(step_time.added_ms(BLOCK, BLOCK * len(costs_ms)))
        found = next((n for n, block in enumerate(prompt) if block not in cache), len(prompt))
        hits += found
        saved_ms += sum(costs_ms[:found])
        cache.use(prompt)
    return Result(hits * BLOCK, saved_ms / 1e3)


def _table(rows: dict[float, dict[str, Result]]) -> Table:
    table = Table("cache", "policy", "hit tokens", "saved prefill s", "of LRU's")
    for size, row in rows.items():
        for name, found in row.items():
            ratio = found.saved_s / row["lru"].saved_s
            table.add_row(
                f"{size:.0%}",
                name,
                f"{found.hit_tokens:,}",
                f"{found.saved_s:,.0f}",
                f"{ratio:.3f}",
            )
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mooncake", type=Path, required=True, help="a trace in Mooncake's form")
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()

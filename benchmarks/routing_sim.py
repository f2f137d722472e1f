"""Claim: routing by where KV lies finds nearly all of it, and halves the time to the first token.

Mooncake's conversation trace on eight simulated instances of Qwen3-32B, four H200 each, vLLM's real
scheduler (FCFS) and prefix cache on virtual time. Hits are compared with those of one cache as
large as all together with perfect eviction (Belady); goodput is the highest rate at 90 %
attainment:

    python -m benchmarks.routing_sim --mooncake mooncake_conversation_trace.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.lab.belady import most_hits
from benchmarks.lab.caches import Lru
from benchmarks.lab.model import ROOT
from benchmarks.lab.routing_rules import VllmRouterKvAware
from xllm_scheduler.service.config import RouterSection, routing_of
from xllm_scheduler.service.routing import Role, RoutingPolicy
from xllm_scheduler.simulate.cluster import Cluster
from xllm_scheduler.simulate.engine import FCFS, Engine, EngineSpec
from xllm_scheduler.simulate.hardware import LINKS
from xllm_scheduler.simulate.members import ClusterSpec
from xllm_scheduler.simulate.outcomes import Run, Summary
from xllm_scheduler.simulate.profiles import find_profile
from xllm_scheduler.simulate.sweep import highest_rate
from xllm_scheduler.simulate.traces import read_trace
from xllm_scheduler.simulate.workload import Ask, Slo, Stream, between, scaled

MODEL, GPU, TENSOR_PARALLEL, INSTANCES = "Qwen3-32B", "h200", 4, 8
SLO = Slo(ttft_ms=5000.0, tpot_ms=100.0)  # of prompts of 12,000 tokens on average
TRACE_BLOCK = 512  # tokens of a block of the trace
ATTAINMENT, PRECISION = 0.9, 0.04
VLLM_ROUTER, OURS = "vllm-router kv_aware", "slo_aware"
POLICIES = ("round_robin", "least_loaded", VLLM_ROUTER, OURS)
CLAIM_OF_HITS, CLAIM_OF_TTFT, CLAIM_OF_GOODPUT = 0.9, 0.5, 1.3


@dataclass(frozen=True)
class Result:
    """What a policy brought at the recorded rate.

    Attributes:
        hits: the share of prompt tokens that prefix caches held.
        attainment: of both SLOs.
        ttft_p50_ms, ttft_p90_ms, tpot_p90_ms: of all requests.
        goodput_s: requests per second in time, at the highest rate that keeps 90 %.
        factor: that rate, times the recorded one.
    """

    hits: float
    attainment: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    tpot_p90_ms: float
    goodput_s: float = 0.0
    factor: float = 0.0


@functools.cache
def _engine() -> Engine:
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # the trace's longest prompts
    vllm = {"max_model_len": 131072, "block_size": 128}
    spec = EngineSpec(MODEL, GPU, TENSOR_PARALLEL, FCFS, {}, vllm, kv_events=True)
    return Engine(spec)


def policy_of(name: str) -> RoutingPolicy:
    """A policy by its name in the table."""
    if name == VLLM_ROUTER:
        return VllmRouterKvAware()
    return routing_of(RouterSection(routing=name))


@functools.cache
def _trace(path: Path) -> Sequence[Ask]:
    return read_trace(path)


def simulated(policy: str, asks: Sequence[Ask], least: float = 0.0) -> Run:
    """All instances mixed, to the last answer or until the least attainment is out of reach."""
    spec = ClusterSpec([Role.MIXED] * INSTANCES, LINKS["rdma-400g"])
    profile = find_profile(GPU, MODEL, TENSOR_PARALLEL)
    cluster = Cluster(spec, _engine(), profile, policy_of(policy))
    return cluster.run([Stream("online", True, SLO, asks=asks)], least=least)


def at_recorded_rate(path: Path, policy: str, seconds: float) -> Result:
    """The trace as it was recorded."""
    run = simulated(policy, between(_trace(path), 0.0, seconds))
    found = run.summary()
    prompts = sum(o.prompt_tokens for o in run.outcomes)
    hits = sum(o.cached_tokens for o in run.outcomes) / prompts
    return Result(hits, found.attainment, found.ttft_ms.p50, found.ttft_ms.p90, found.tpot_ms.p90)


def goodput(path: Path, policy: str, slice_s: float) -> tuple[float, float]:
    """The highest goodput at the attainment, and the rate's factor."""
    asks = between(_trace(path), 0.0, slice_s)

    def summary(factor: float) -> Summary:
        found = simulated(policy, scaled(asks, factor), ATTAINMENT).summary()
        print(f"{policy} at {factor:.3g} times the rate: {found.attainment:.1%}", flush=True)
        return found

    factor, points = highest_rate(summary, attainment=ATTAINMENT, precision=PRECISION)
    best = max((p.summary.goodput_s for p in points if p.factor == factor), default=0.0)
    return best, factor


@dataclass(frozen=True)
class Possible:
    """Shares of the prompt tokens that one pooled cache would have had.

    Attributes:
        belady: in as much memory as all instances have, perfectly evicted.
        lru: in the same, evicted as vLLM does.
        unbounded: with nothing evicted.
    """

    belady: float
    lru: float
    unbounded: float


def possible_hits(path: Path, seconds: float) -> Possible:
    """What no routing can exceed, and what it could reach with vLLM's eviction."""
    asks = between(_trace(path), 0.0, seconds)
    blocks = [ask.hash_ids for ask in asks]
    tokens = sum(ask.prompt_tokens for ask in asks)
    capacity = INSTANCES * _engine().kv_tokens // TRACE_BLOCK
    pooled, found = Lru(capacity), 0
    for one in blocks:
        found += sum(1 for _ in itertools.takewhile(pooled.__contains__, one))
        pooled.use(one)
    hits = most_hits(blocks, capacity), found, most_hits(blocks, 1 << 40)
    return Possible(*(one * TRACE_BLOCK / tokens for one in hits))


def table(results: Mapping[str, Result], possible: Possible) -> Table:
    """All policies."""
    made = Table(title=f"TTFT {SLO.ttft_ms:g} ms, TPOT {SLO.tpot_ms:g} ms")
    for heading in (
        "routing", "hits", "of the possible", "attainment", "TTFT p50, ms", "TTFT p90, ms",
        "TPOT p90, ms", "goodput, 1/s", "at times the rate",
    ):  # fmt: skip
        made.add_column(heading, justify="left" if heading == "routing" else "right")
    for name, one in results.items():
        made.add_row(
            name, f"{one.hits:.1%}", f"{one.hits / possible.belady:.2f}", f"{one.attainment:.1%}",
            f"{one.ttft_p50_ms:.0f}", f"{one.ttft_p90_ms:.0f}", f"{one.tpot_p90_ms:.1f}",
            f"{one.goodput_s:.2f}", f"{one.factor:.2f}",
        )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulates, prints; status 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mooncake", type=Path, required=True, help="the conversation trace")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the trace")
    parser.add_argument("--slice-s", type=float, default=600.0, help="of it, for goodput; 0: none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="simulations at a time")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "routing_sim.json"
    )
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # vLLM tells of each engine
    path = options.mooncake
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = {
            p: pool.submit(at_recorded_rate, path, p, options.seconds) for p in options.policies
        }
        sweeps = {
            p: pool.submit(goodput, path, p, options.slice_s)
            for p in (options.policies if options.slice_s else ())
        }
        possible = possible_hits(path, options.seconds)
        print(
            f"possible: {possible.belady:.1%} of the prompt tokens in as much memory, perfectly "
            f"evicted; {possible.lru:.1%} evicted as vLLM does; {possible.unbounded:.1%} without "
            "bound",
            flush=True,
        )
        results = {}
        for name, run in runs.items():
            results[name] = run.result()
            print(f"{name}: {results[name]}", flush=True)
        for name, sweep in sweeps.items():
            best, factor = sweep.result()
            results[name] = dataclasses.replace(results[name], goodput_s=best, factor=factor)
            print(f"{name}: {best:.2f}/s in time at {factor:.2f} times the rate", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {name: dataclasses.asdict(one) for name, one in results.items()}
    options.json.write_text(
        json.dumps({"possible": dataclasses.asdict(possible), **document}, indent=1) + "\n"
    )
    Console(width=None if sys.stdout.isatty() else 180).print(table(results, possible))
    if not {OURS, "round_robin"} <= results.keys():
        return 0
    mine, turns = results[OURS], results["round_robin"]
    claims = {
        f"hits at least {CLAIM_OF_HITS:g} of the possible": mine.hits
        >= CLAIM_OF_HITS * possible.belady,
        f"TTFT p50 at most {CLAIM_OF_TTFT:g} of round robin's": mine.ttft_p50_ms
        <= CLAIM_OF_TTFT * turns.ttft_p50_ms,
        f"goodput at least {CLAIM_OF_GOODPUT:g} of round robin's": mine.goodput_s
        >= CLAIM_OF_GOODPUT * turns.goodput_s,
    }
    for claim, holds in claims.items():
        print(f"{'met' if holds else 'NOT met'}: {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Claim: on a simulated H200 node, offline work gets most of what online requests leave.

One instance of Qwen3-32B on four H200, the burst of Azure's code trace online, arXiv summaries as
the offline backlog, vLLM's real scheduler on virtual time:

    python -m benchmarks.colocation_sim --azure AzureLLMInferenceTrace_code.csv --arxiv ...csv
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.lab.model import ROOT
from benchmarks.lab.xllm_rule import H200, BottleneckPolicy, Roofline, Thresholds
from xllm_plugins.features import Policy
from xllm_plugins.hookspecs import hookimpl
from xllm_plugins.manager import registry
from xllm_scheduler.plugin import POLICY_KIND
from xllm_scheduler.service.routing import Role
from xllm_scheduler.service.staged import least_loaded
from xllm_scheduler.simulate.cluster import Cluster
from xllm_scheduler.simulate.engine import ELASTIC, FCFS, PRIORITY, Engine, EngineSpec
from xllm_scheduler.simulate.hardware import LINKS
from xllm_scheduler.simulate.members import ClusterSpec
from xllm_scheduler.simulate.outcomes import Run
from xllm_scheduler.simulate.profiles import find_profile
from xllm_scheduler.simulate.traces import read_trace
from xllm_scheduler.simulate.workload import Ask, Slo, Stream, between

MODEL, GPU, TENSOR_PARALLEL = "Qwen3-32B", "h200", 4
SLICE_S = (600.0, 1200.0)  # ten minutes of the trace; its busiest ten seconds are the 860th on
SLO = Slo(ttft_ms=2000.0, tpot_ms=50.0)
ALONE_GOAL = 0.99
KEPT = 0.97  # of the attainment of online requests alone
MOST_OUTSTANDING = 256
LATENCY_SHARES = (0.5, 0.65, 0.8, 0.98)
SATURATION_SHARES = (0.25, 0.5, 1.0)
CLAIM_OF_ROOM, CLAIM_OF_PRIORITY, CLAIM_OF_RULE = 0.85, 3.0, 1.15
RULE = "xllm-rule"
QWEN3_32B = Roofline(H200, 5120, 25600, 64, 64, 8, 151936, tensor_parallel=TENSOR_PARALLEL)


@dataclass(frozen=True)
class Work:
    """What is asked.

    Attributes:
        online: the slice, before it is thinned out.
        offline: the backlog.
    """

    online: Sequence[Ask]
    offline: Sequence[Ask]

    def streams(self, share: float, outstanding: int) -> list[Stream]:
        """The online requests thinned out to a share, the same ones each time, and the backlog."""
        rng = random.Random("thinned")
        kept = [ask for ask in self.online if rng.random() < share]
        made = [Stream("online", True, SLO, asks=kept)]
        if outstanding:
            made.append(Stream("offline", False, asks=self.offline, outstanding=outstanding))
        return made


@dataclass(frozen=True)
class Trial:
    """One simulation.

    Attributes:
        scheduler: of the instance.
        share: of the online requests.
        outstanding: offline requests at a time.
        settings: of ``elastic``.
        thresholds: of xLLM's rule.
    """

    scheduler: str = FCFS
    share: float = 0.0
    outstanding: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    thresholds: Thresholds | None = None


@dataclass(frozen=True)
class Result:
    """What a simulation brought.

    Attributes:
        trial: which.
        online: how many online requests there were.
        attainment: of both SLOs.
        ttft_p90_ms, tpot_p90_ms: of online requests.
        offline_tok_s: tokens computed for offline requests, prompts and answers, per second.
        longest_wait_s: of an offline request without a token.
        busy: the share of time in which a step ran.
    """

    trial: Trial
    online: int
    attainment: float
    ttft_p90_ms: float
    tpot_p90_ms: float
    offline_tok_s: float
    longest_wait_s: float
    busy: float

    @classmethod
    def of(cls, trial: Trial, run: Run) -> Result:
        """The figures of a run."""
        found = run.summary()
        return cls(
            trial,
            found.online,
            found.attainment,
            found.ttft_ms.p90,
            found.tpot_ms.p90,
            found.offline_total_tokens_s,
            found.longest_offline_wait_s,
            sum(run.busy_s.values()) / run.seconds,
        )


class RulePlugin:
    """Offers xLLM's rule as a step policy, as any plugin would."""

    thresholds = Thresholds()

    @hookimpl
    def xllm_policies(self) -> list[Policy]:
        """The policy ``xllm-rule``."""
        return [Policy(POLICY_KIND, RULE, self._made)]

    def _made(self, section: Any) -> BottleneckPolicy:
        return BottleneckPolicy(QWEN3_32B, section.tpot_ms, self.thresholds)


_rule = RulePlugin()


def _engine(trial: Trial) -> Engine:
    settings = {"ttft_ms": SLO.ttft_ms, "tpot_ms": SLO.tpot_ms, **trial.settings}
    scheduler = trial.scheduler
    if trial.thresholds is not None:
        if not registry().hooks.has_plugin(RULE):
            registry().hooks.register(_rule, name=RULE)
        settings["policy"] = RULE
        _rule.thresholds = trial.thresholds  # read when the scheduler is made
    return _engine_of(scheduler, json.dumps(settings if scheduler == ELASTIC else {}))


@functools.cache
def _engine_of(scheduler: str, settings: str) -> Engine:
    return Engine(EngineSpec(MODEL, GPU, TENSOR_PARALLEL, scheduler, json.loads(settings)))


@functools.cache
def read_work(azure: Path, arxiv: Path) -> Work:
    """The traces."""
    return Work(between(read_trace(azure), *SLICE_S), read_trace(arxiv))


def simulate(paths: tuple[Path, Path], trial: Trial) -> Result:
    """Run one trial to the answer of the last online request; without any, for the same time."""
    profile = find_profile(GPU, MODEL, TENSOR_PARALLEL)
    cluster = Cluster(
        ClusterSpec([Role.MIXED], LINKS["nvlink"]), _engine(trial), profile, least_loaded()
    )
    streams = read_work(*paths).streams(trial.share, trial.outstanding)
    seconds = None if trial.share else SLICE_S[1] - SLICE_S[0]
    return Result.of(trial, cluster.run(streams, seconds=seconds))


def largest(good: Callable[[int], bool], most: int) -> int:
    """The largest number up to ``most`` that is good, by bisection; 0 if none is."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def alone(paths: tuple[Path, Path]) -> Result:
    """Online requests alone, as many as attain the goal, to a hundredth."""
    found: dict[int, Result] = {}

    def good(hundredths: int) -> bool:
        found[hundredths] = simulate(paths, Trial(share=hundredths / 100))
        return found[hundredths].attainment >= ALONE_GOAL

    best = largest(good, 100)
    if not best:
        raise SystemExit("even a hundredth of the online requests misses its SLOs")
    return found[best]


def best_of_vllm(paths: tuple[Path, Path], scheduler: str, share: float, goal: float) -> Result:
    """VLLM at the most offline requests at a time that still keep the goal."""
    found: dict[int, Result] = {}

    def good(outstanding: int) -> bool:
        found[outstanding] = simulate(paths, Trial(scheduler, share, outstanding))
        return found[outstanding].attainment >= goal

    best = largest(good, MOST_OUTSTANDING)
    return found[best] if best else simulate(paths, Trial(scheduler, share, 0))


def rule_trials(share: float) -> list[Trial]:
    """XLLM's rule with every pair of thresholds."""
    pairs = itertools.product(LATENCY_SHARES, SATURATION_SHARES)
    return [
        Trial(ELASTIC, share, MOST_OUTSTANDING, thresholds=Thresholds(latency, saturation))
        for latency, saturation in pairs
    ]


def best(results: Sequence[Result], goal: float) -> Result:
    """The one with most offline tokens of those that keep the goal; without, the most attained."""
    keeping = [r for r in results if r.attainment >= goal]
    if not keeping:
        return max(results, key=lambda r: r.attainment)
    return max(keeping, key=lambda r: r.offline_tok_s)


def table(results: Mapping[str, Result], room_tok_s: float) -> Table:
    """All systems."""
    made = Table(title=f"TTFT {SLO.ttft_ms:g} ms, TPOT {SLO.tpot_ms:g} ms")
    for heading in (
        "system", "attainment", "TTFT p90, ms", "TPOT p90, ms", "offline tok/s", "of the room",
        "longest wait, s", "at a time", "thresholds",
    ):  # fmt: skip
        made.add_column(heading, justify="left" if heading == "system" else "right")
    for name, one in results.items():
        limits = one.trial.thresholds
        made.add_row(
            name,
            f"{one.attainment:.2%}",
            f"{one.ttft_p90_ms:.0f}",
            f"{one.tpot_p90_ms:.1f}",
            f"{one.offline_tok_s:.0f}",
            f"{one.offline_tok_s / room_tok_s:.3f}",
            f"{one.longest_wait_s:.1f}",
            str(one.trial.outstanding),
            f"{limits.latency:g} / {limits.saturation:g}" if limits else "",
        )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulates, prints; status 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--azure", type=Path, required=True, help="AzureLLMInferenceTrace_code.csv")
    parser.add_argument("--arxiv", type=Path, required=True, help="Vidur's arXiv summarisation CSV")
    parser.add_argument("--set", type=json.loads, default={}, help="settings of elastic, as JSON")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="simulations at a time")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "colocation_sim.json"
    )
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # vLLM tells of each engine
    paths = (options.azure, options.arxiv)
    with ProcessPoolExecutor(options.jobs) as pool:
        offline_alone = pool.submit(simulate, paths, Trial(outstanding=MOST_OUTSTANDING))
        online_alone = pool.submit(alone, paths).result()
        share, goal = online_alone.trial.share, KEPT * online_alone.attainment
        print(f"{share:.0%} of the slice attain {online_alone.attainment:.2%} alone", flush=True)
        searches = {
            name: pool.submit(best_of_vllm, paths, name, share, goal) for name in (FCFS, PRIORITY)
        }
        ours = pool.submit(
            simulate, paths, Trial(ELASTIC, share, MOST_OUTSTANDING, settings=options.set)
        )
        grid = [pool.submit(simulate, paths, trial) for trial in rule_trials(share)]
        rule = best([one.result() for one in grid], goal)
        results = {
            "online alone": online_alone,
            "offline alone": offline_alone.result(),
            **{name: search.result() for name, search in searches.items()},
            "xLLM's rule": rule,
            "elastic": ours.result(),
        }
    room_tok_s = results["offline alone"].offline_tok_s * (1.0 - online_alone.busy)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {name: dataclasses.asdict(one) for name, one in results.items()}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 180).print(table(results, room_tok_s))
    print(f"online alone keeps the engine busy for {online_alone.busy:.1%} of the time")
    mine = results["elastic"]
    claims = {
        f"attainment at least {goal:.2%}": mine.attainment >= goal,
        f"at least {CLAIM_OF_ROOM:g} of the room": mine.offline_tok_s >= CLAIM_OF_ROOM * room_tok_s,
        f"at least {CLAIM_OF_PRIORITY:g} times {PRIORITY}": mine.offline_tok_s
        >= CLAIM_OF_PRIORITY * results[PRIORITY].offline_tok_s,
        f"at least {CLAIM_OF_RULE:g} times xLLM's rule": mine.offline_tok_s
        >= CLAIM_OF_RULE * rule.offline_tok_s,
    }
    for claim, holds in claims.items():
        print(f"{'met' if holds else 'NOT met'}: {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

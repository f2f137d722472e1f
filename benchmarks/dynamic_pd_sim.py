"""Claim: turning instances between prefill and decode beats every fixed division of them.

Eight simulated instances of Llama 3.1 70B on four A100 each, one engine scheduler everywhere, TTFT
2 s and TPOT 50 ms: the highest rate at 90 % attainment for all-mixed, every fixed division, xLLM's
rule, ours, and an oracle that divides anew every minute knowing the future:

    python -m benchmarks.dynamic_pd_sim --azure AzureLLMInferenceTrace_code.csv
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.lab.model import ROOT
from benchmarks.lab.routing_rules import XllmSloAware
from xllm_scheduler.service.config import RouterSection, roles_of, routing_of
from xllm_scheduler.service.routing import InstanceView, Role, RolePolicy, RoutingPolicy
from xllm_scheduler.service.staged import least_loaded
from xllm_scheduler.simulate.clock import START_S
from xllm_scheduler.simulate.cluster import Cluster
from xllm_scheduler.simulate.engine import ELASTIC, FCFS, Engine, EngineSpec
from xllm_scheduler.simulate.generate import Arrivals, Lengths, requests
from xllm_scheduler.simulate.hardware import LINKS
from xllm_scheduler.simulate.members import ClusterSpec
from xllm_scheduler.simulate.outcomes import Run, Summary
from xllm_scheduler.simulate.profiles import find_profile
from xllm_scheduler.simulate.sweep import highest_rate
from xllm_scheduler.simulate.traces import read_trace
from xllm_scheduler.simulate.workload import Ask, Slo, Stream, between, scaled

# Steps as long as these are few enough to simulate a hundred hours of them.
MODEL, GPU, TENSOR_PARALLEL, INSTANCES = "Meta-Llama-3.1-70B", "a100", 4, 8
NAMES = [f"i{n}" for n in range(INSTANCES)]
SLO = Slo(ttft_ms=2000.0, tpot_ms=50.0)
LINK = "rdma-400g"
ATTAINMENT, PRECISION = 0.9, 0.05
MINUTE_S = 60.0
AZURE, SWINGING = "Azure code", "swinging"
MIXED, MINIMAL, PUBLISHED, CODED, OURS, ORACLE = (
    "all mixed", "minimal load", "xLLM's rule", "xLLM's code", "ours", "oracle",
)  # fmt: skip
FIXED = tuple(f"{k} prefill, {INSTANCES - k} decode" for k in range(1, INSTANCES))
DIVISIONS = {MIXED: 0, **{name: n + 1 for n, name in enumerate(FIXED)}}
SYSTEMS = (MIXED, *FIXED, MINIMAL, PUBLISHED, CODED, OURS)
CLAIM_OF_FIXED, CLAIM_OF_SWING, CLAIM_OF_ORACLE = 1.0, 1.2, 0.9
XLLM_SPLIT = 4  # half and half, as its evaluation divides them


@dataclass(frozen=True)
class Work:
    """A load.

    Attributes:
        azure: the trace to take a slice of; None for the swinging load.
        start_s, end_s: the slice, or how long the swinging load lasts.
        swing_s: how long it stays with prompts or with answers.
    """

    azure: Path | None
    start_s: float
    end_s: float
    swing_s: float = 300.0

    def asks(self, factor: float) -> list[Ask]:
        """Its requests at so many times its rate."""
        if self.azure is not None:
            return scaled(between(_trace(self.azure), self.start_s, self.end_s), factor)
        made: list[Ask] = []
        at_s, prompts = 0.0, True
        while at_s < self.end_s:
            seconds = min(self.swing_s, self.end_s - at_s)
            # Each takes about a third of what all instances together could do.
            rate, prompt, output = (4.0, 4000, 60) if prompts else (8.0, 300, 900)
            part = requests(
                Arrivals(rate * factor), Lengths(prompt, 0.5), Lengths(output, 0.5),
                seconds=seconds, seed=round(at_s),
            )  # fmt: skip
            made += [ask._replace(at_s=ask.at_s + at_s) for ask in part]
            at_s, prompts = at_s + seconds, not prompts
        return made


class Planned(RolePolicy):
    """Divides as planned for each minute: so many prefill instances, 0 for all mixed."""

    def __init__(self, plan: Sequence[int]) -> None:
        self._plan = plan

    def roles(self, instances: Sequence[InstanceView], now_s: float) -> Mapping[str, Role]:
        """See :class:`RolePolicy`."""
        minute = min(len(self._plan) - 1, int((now_s - START_S) / MINUTE_S))
        prefills = self._plan[minute]
        order = sorted(instances, key=lambda i: (i.role is not Role.PREFILL, i.running))
        wanted = {i.instance_id: Role.DECODE if prefills else Role.MIXED for i in order}
        wanted |= {i.instance_id: Role.PREFILL for i in order[:prefills]}
        return wanted


@functools.cache
def _trace(path: Path) -> Sequence[Ask]:
    return read_trace(path)


@functools.cache
def _engine(scheduler: str) -> Engine:
    settings = {"ttft_ms": SLO.ttft_ms, "tpot_ms": SLO.tpot_ms} if scheduler == ELASTIC else {}
    return Engine(EngineSpec(MODEL, GPU, TENSOR_PARALLEL, scheduler, settings))


def policies(
    system: str, plan: Sequence[int] = ()
) -> tuple[Sequence[Role], RoutingPolicy, RolePolicy | None]:
    """Roles at the beginning, and who decides."""
    section = RouterSection(
        routing="slo_aware", roles="dynamic", ttft_ms=SLO.ttft_ms, tpot_ms=SLO.tpot_ms
    )
    if system in FIXED:
        prefills = FIXED.index(system) + 1
        return _divided(prefills), least_loaded(), None
    if system == MIXED:
        return _divided(0), least_loaded(), None
    if system == MINIMAL:
        return _divided(XLLM_SPLIT), least_loaded(), None
    if system in (PUBLISHED, CODED):
        rule = XllmSloAware(NAMES, XLLM_SPLIT, SLO.ttft_ms, SLO.tpot_ms, as_coded=system == CODED)
        return _divided(XLLM_SPLIT), rule, rule
    if system == ORACLE:
        return _divided(plan[0]), routing_of(section), Planned(plan)
    return _divided(0), routing_of(section), roles_of(section)


def _divided(prefills: int) -> list[Role]:
    if not prefills:
        return [Role.MIXED] * INSTANCES
    return [Role.PREFILL] * prefills + [Role.DECODE] * (INSTANCES - prefills)


def simulated(
    system: str, scheduler: str, work: Work, factor: float, plan: Sequence[int] = (),
    *, least: float = 0.0, drained: bool = True,
) -> Run:  # fmt: skip
    """One run, to the last answer or until the least attainment is out of reach.

    Not ``drained``, it ends a minute after the last request has come.
    """
    roles, routing, role_policy = policies(system, plan)
    every_s = 0.1 if system in (PUBLISHED, CODED) else 1.0
    spec = ClusterSpec(roles, LINKS[LINK], drain=False, roles_every_s=every_s)
    profile = find_profile(GPU, MODEL, TENSOR_PARALLEL)
    cluster = Cluster(spec, _engine(scheduler), profile, routing, role_policy)
    asks = work.asks(factor)
    seconds = None if drained else asks[-1].at_s + MINUTE_S
    return cluster.run([Stream("online", True, SLO, asks=asks)], seconds=seconds, least=least)


def highest(
    system: str, scheduler: str, work: Work, first: float, plan: Sequence[int] = ()
) -> tuple[float, float]:
    """The highest factor at the attainment, searched from ``first`` on, and its goodput."""

    def summary(factor: float) -> Summary:
        run = simulated(system, scheduler, work, factor * first, plan, least=ATTAINMENT)
        return run.summary()

    factor, points = highest_rate(summary, attainment=ATTAINMENT, precision=PRECISION)
    return factor * first, max(
        (p.summary.goodput_s for p in points if p.factor == factor), default=0.0
    )


def point(
    system: str, scheduler: str, work: Work, factor: float, plan: Sequence[int] = ()
) -> tuple[float, float]:
    """Attainment and goodput, requests/s, at one factor; of a run broken off, until then."""
    summary = simulated(system, scheduler, work, factor, plan, least=ATTAINMENT).summary()
    return summary.attainment, summary.goodput_s


def by_minute(system: str, scheduler: str, work: Work, factor: float) -> dict[int, tuple[int, int]]:
    """For each minute, how many of the requests that came in it were in time, and how many came."""
    found: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
    for outcome in simulated(system, scheduler, work, factor, drained=False).outcomes:
        minute = found[int(outcome.arrival_s / MINUTE_S)]
        minute[0] += outcome.met
        minute[1] += 1
    return {minute: (met, came) for minute, (met, came) in found.items()}


def planned(minutes: Mapping[str, Mapping[int, tuple[int, int]]]) -> list[int]:
    """For each minute the division that did best in it, of runs that kept one throughout.

    Of several as good, the one that did best in all minutes together.
    """
    last = max(minute for one in minutes.values() for minute in one)
    total = {name: sum(met for met, _ in one.values()) for name, one in minutes.items()}
    plan = []
    for minute in range(last + 1):
        met = {name: one.get(minute, (0, 0))[0] for name, one in minutes.items()}
        plan.append(DIVISIONS[max(met, key=lambda name: (met[name], total[name]))])
    return plan


@dataclass(frozen=True)
class Result:
    """What a system reached: times the load's rate, and requests in time per second there."""

    factor: float
    goodput_s: float


def table(title: str, results: Mapping[str, Result]) -> Table:
    """All systems of one load."""
    fixed = [results[name].goodput_s for name in (MIXED, *FIXED) if name in results]
    made = Table(title=title)
    for heading in ("system", "times the rate", "goodput, 1/s", "of the best fixed"):
        made.add_column(heading, justify="left" if heading == "system" else "right")
    for name, one in results.items():
        share = f"{one.goodput_s / max(fixed):.2f}" if fixed else "-"
        made.add_row(name, f"{one.factor:.2f}", f"{one.goodput_s:.2f}", share)
    return made


def _at(pool: ProcessPoolExecutor, options: argparse.Namespace, title: str, work: Work) -> None:
    """All systems at given factors, and a given plan."""
    plans: dict[str, Sequence[int]] = dict.fromkeys(options.systems, ())
    if options.plan:
        plans[ORACLE] = options.plan
    runs = {
        (name, factor): pool.submit(point, name, options.scheduler, work, factor, plan)
        for factor in options.at
        for name, plan in plans.items()
    }
    for (name, factor), run in runs.items():
        attainment, goodput_s = run.result()
        given_up = "" if attainment >= ATTAINMENT else ", broken off"
        print(f"{title} at {factor:g}, {name}: {attainment:.1%} in time{given_up}, "
              f"{goodput_s:.2f}/s", flush=True)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulates, prints; status 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--azure", type=Path, required=True, help="AzureLLMInferenceTrace_code.csv")
    parser.add_argument("--slice", type=float, nargs=2, default=(780.0, 960.0), metavar="S",
        help="of the trace, from and to, s; its busiest seconds are the 860th on")  # fmt: skip
    parser.add_argument("--swing-s", type=float, default=600.0, help="how long the load swings")
    parser.add_argument("--scheduler", choices=(FCFS, ELASTIC), default=FCFS)
    parser.add_argument("--loads", nargs="+", choices=(AZURE, SWINGING), default=[AZURE, SWINGING])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--at", type=float, nargs="+", metavar="FACTOR",
        help="only run the systems at these times the load's rate")  # fmt: skip
    parser.add_argument("--plan", type=int, nargs="+", metavar="COUNT",
        help="with --at, also an oracle with so many prefill instances in each minute")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="simulations at a time")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "dynamic_pd_sim.json"
    )
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # vLLM tells of each engine
    works = {
        AZURE: (Work(options.azure, *options.slice), 2.0),
        SWINGING: (Work(None, 0.0, options.swing_s), 1.0),
    }
    scheduler, document, held = options.scheduler, {}, []
    with ProcessPoolExecutor(options.jobs) as pool:
        for title in options.loads:
            work, first = works[title]
            if options.at:
                _at(pool, options, title, work)
                continue
            searches: dict[str, Future[tuple[float, float]]] = {
                name: pool.submit(highest, name, scheduler, work, first) for name in options.systems
            }
            results = {}
            for name, search in searches.items():
                results[name] = Result(*search.result())
                print(f"{title}, {name}: {results[name]}", flush=True)
            fixed = [name for name in (MIXED, *FIXED) if name in results]
            if fixed and OURS in results:
                results[ORACLE] = _oracle(pool, fixed, scheduler, work, results)
            Console(width=None if sys.stdout.isatty() else 140).print(table(title, results))
            document[title] = {name: dataclasses.asdict(one) for name, one in results.items()}
            held += _claims(title, results)
    if options.at:
        return 0
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    for claim, holds in held:
        print(f"{'met' if holds else 'NOT met'}: {claim}")
    return 0 if all(holds for _, holds in held) else 1


def _oracle(
    pool: ProcessPoolExecutor, fixed: Sequence[str], scheduler: str, work: Work,
    results: Mapping[str, Result],
) -> Result:  # fmt: skip
    """The best of plans that know what each minute brings, and of one that changes nothing."""
    top = max(one.factor for one in results.values())
    plans = [[DIVISIONS[max(fixed, key=lambda name: results[name].goodput_s)]]]
    runs = {name: pool.submit(by_minute, name, scheduler, work, top) for name in fixed}
    plans.append(planned({name: run.result() for name, run in runs.items()}))
    found = [pool.submit(highest, ORACLE, scheduler, work, top, plan) for plan in plans]
    best = max((one.result() for one in found), key=lambda pair: pair[1])
    return Result(*best)


def _claims(title: str, results: Mapping[str, Result]) -> list[tuple[str, bool]]:
    fixed = [one.goodput_s for name, one in results.items() if name in (MIXED, *FIXED)]
    if OURS not in results or not fixed:
        return []
    mine = results[OURS].goodput_s
    least = CLAIM_OF_FIXED if title == AZURE else CLAIM_OF_SWING
    claims = [(f"{title}: at least {least:g} of the best fixed", mine >= least * max(fixed))]
    oracle = results[ORACLE].goodput_s
    claims.append(
        (f"{title}: at least {CLAIM_OF_ORACLE:g} of the oracle", mine >= CLAIM_OF_ORACLE * oracle)
    )
    return claims


if __name__ == "__main__":
    sys.exit(main())

"""Claim: our `schedule()` costs at most 1.15 times vLLM's, of which planning at most 300 us.

Real schedulers without a model, vLLM's and ours turn by turn in one process, by CPU time:

    python -m benchmarks.step_cost --steps 600
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import gc
import json
import logging
import os
import pstats
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from benchmarks.lab.costs import BLOCK_STEPS, Comparison, StepCost, median_of_blocks
from benchmarks.lab.engine import BLOCK, MAX_LEN, Engine, Turn, build, request
from benchmarks.lab.machine import OthersMeter, cpu_name
from benchmarks.lab.model import ROOT
from xllm_scheduler.classes import CLASS_KEY, TPOT_KEY, TTFT_KEY, ServiceClass
from xllm_scheduler.engine.scheduler import elastic_class

LIMIT_RATIO = 1.15
LIMIT_PLANNER_US = 300.0
SAME_WORK = 0.05  # by how much the requests in a step may differ
BASES = (Scheduler, AsyncScheduler)
LOOSE_MS = 1e6  # nothing is held
TIGHT_MS = 1e-3  # nothing fits beside online work
_LOOSE = {"ttft_ms": LOOSE_MS, "tpot_ms": LOOSE_MS}
_BUDGET = 2048
_VOCABULARY = 32000
_PROMPT_TOKENS = (80, 120)
_WARM_UP = 100
_MOST_FILL = 2000


@dataclass(frozen=True)
class Load:
    """Which requests there are, and what they are promised."""

    about: str
    offline_every: int
    """Each so many-th request is offline; 0 for none."""
    slo_ms: float
    """The SLO of its online requests, TTFT and TPOT."""


MIXED = Load("half offline", 2, LOOSE_MS)
LOADS = (MIXED, Load("online only", 0, LOOSE_MS))
HELD = Load("half offline, tight", 2, TIGHT_MS)


@dataclass(frozen=True)
class Case:
    """One row."""

    base: type
    running: int
    load: Load


def engine_for(scheduler_class: type, case: Case, *, waiting: int, steps: int, seed: int) -> Engine:
    """An engine whose batch is full of decodes, with so many requests waiting behind them."""
    tokens = _MOST_FILL + _WARM_UP + steps
    blocks = case.running * ((_PROMPT_TOKENS[1] + tokens) // BLOCK + 1) + 1
    scheduler = build(scheduler_class, _LOOSE, budget=_BUDGET, seqs=case.running, blocks=blocks)
    engine = Engine(scheduler)
    rng = random.Random(f"step-cost-{seed}")
    requests = [_request(index, case.load, tokens, rng) for index in range(case.running + waiting)]
    batch = requests[: case.running]
    # Offline ones first: tight SLOs would keep them out.
    for online in (False, True):
        for one in batch:
            if _online(one) is online:
                scheduler.add_request(one)
        _fill(engine)
    for one in requests[case.running :]:
        scheduler.add_request(one)
    for _ in range(_WARM_UP):
        engine.step()
    return engine


def _request(index: int, load: Load, tokens: int, rng: random.Random) -> Request:
    offline = load.offline_every and index % load.offline_every == 0
    kind = ServiceClass.OFFLINE if offline else ServiceClass.ONLINE
    xargs = {CLASS_KEY: kind.value, TTFT_KEY: load.slo_ms, TPOT_KEY: load.slo_ms}
    prompt = [rng.randrange(_VOCABULARY) for _ in range(rng.randint(*_PROMPT_TOKENS))]
    return request(f"r{index}", prompt, max_tokens=tokens, xargs=xargs)


def _online(one: Request) -> bool:
    kind: str = one.sampling_params.extra_args[CLASS_KEY]
    return kind == ServiceClass.ONLINE.value


def _fill(engine: Engine) -> None:
    """Step until every request decodes."""
    for _ in range(_MOST_FILL // 2):
        if not engine.scheduler.waiting and engine.all_decode():
            return
        engine.step()
    raise RuntimeError(f"{len(engine.scheduler.waiting)} requests did not get into the batch")


def measure(case: Case, *, waiting: int, steps: int, seed: int) -> Comparison:
    """Two engines with the same requests, turn by turn; which comes first changes each turn."""
    plain, ours = (
        engine_for(one, case, waiting=waiting, steps=steps, seed=seed)
        for one in (case.base, elastic_class(case.base))
    )
    gc.collect()
    gc.freeze()  # as vLLM's engine does when it has started
    planner = time_planner(ours)
    plain_turns: list[Turn] = []
    our_turns: list[Turn] = []
    pairs = [(plain, plain_turns), (ours, our_turns)]
    for number in range(steps):
        for engine, turns in pairs if number % 2 else reversed(pairs):
            turns.append(engine.step())
    gc.unfreeze()
    return Comparison(
        _cost(plain_turns), _cost(our_turns, median_of_blocks(planner) if planner else 0.0)
    )


def time_planner(engine: Engine) -> list[float]:
    """The time of each decision of our policy from now on, in us."""
    took_us: list[float] = []
    plan = engine.scheduler._policy.plan

    def timed(*args: Any) -> Any:
        began_s = time.thread_time()
        planned = plan(*args)
        took_us.append((time.thread_time() - began_s) * 1e6)
        return planned

    # Its own counter goes by the wall clock, which runs on while others have the core.
    engine.scheduler._policy.plan = timed
    return took_us


def profile(case: Case, *, waiting: int, steps: int, seed: int) -> None:
    """Print where `schedule()` and `update_from_output()` of ours spend their time."""
    engine = engine_for(elastic_class(case.base), case, waiting=waiting, steps=steps, seed=seed)
    profiler = cProfile.Profile()
    for _ in range(steps):
        profiler.runcall(engine.step)
    print(f"profile of {steps} turns, {_name(case)} (slower than without a profiler):")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def table(title: str, results: Mapping[Case, Comparison]) -> Table:
    """One row for each case."""
    made = Table(title=title)
    for heading in ("base", "running", "load"):
        made.add_column(heading)
    for heading in (
        "vLLM schedule, us",
        "ours",
        "ratio",
        "planning, us",
        "vLLM update, us",
        "ours",
        "ratio",
        "vLLM requests",
        "ours",
    ):
        made.add_column(heading, justify="right")
    for case, one in results.items():
        made.add_row(
            case.base.__name__,
            str(case.running),
            case.load.about,
            f"{one.plain.schedule_us:.0f}",
            f"{one.ours.schedule_us:.0f}",
            f"{one.ratio:.2f}",
            f"{one.ours.planner_us:.0f}",
            f"{one.plain.update_us:.0f}",
            f"{one.ours.update_us:.0f}",
            f"{one.update_ratio:.2f}",
            f"{one.plain.requests:.0f}",
            f"{one.ours.requests:.0f}",
        )
    return made


def failures(results: Mapping[Case, Comparison]) -> list[str]:
    """What contradicts the claim, or makes a ratio say nothing."""
    found = []
    for case, one in results.items():
        if not one.alike(SAME_WORK):
            found.append(
                f"{_name(case)}: {one.ours.requests:.1f} requests a step, vLLM's "
                f"{one.plain.requests:.1f}; the work is not the same"
            )
        if one.ratio > LIMIT_RATIO:
            found.append(f"{_name(case)}: {one.ratio:.2f} times vLLM's; claim: {LIMIT_RATIO}")
        if one.ours.planner_us > LIMIT_PLANNER_US:
            found.append(
                f"{_name(case)}: planning {one.ours.planner_us:.0f} us; "
                f"claim: {LIMIT_PLANNER_US:.0f} us"
            )
    return found


def write_json(
    path: Path, options: argparse.Namespace, others_cpu: float, results: Mapping[Case, Comparison]
) -> None:
    """The tables' figures."""
    document = {
        "setting": {name: str(value) for name, value in vars(options).items()},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "others_cpu": others_cpu},
        "versions": {name: version(name) for name in ("vllm", "xllm-plugins")},
        "rows": [
            {
                "base": case.base.__name__,
                "running": case.running,
                "load": dataclasses.asdict(case.load),
                "ratio": one.ratio,
                **dataclasses.asdict(one),
            }
            for case, one in results.items()
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; status 1 if the claim does not hold."""
    options = _options(arguments)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    asked = {"waiting": options.waiting, "steps": options.steps, "seed": options.seed}
    if options.profile:
        for base in BASES:
            profile(Case(base, max(options.running), MIXED), **asked)
        return 0
    meter = OthersMeter()
    claimed: dict[Case, Comparison] = {}
    informing: dict[Case, Comparison] = {}
    for results, loads in ((claimed, LOADS), (informing, (HELD,))):
        for base in BASES:
            for running in options.running:
                for load in loads:
                    case = Case(base, running, load)
                    print(f"measuring {_name(case)}", flush=True)
                    results[case] = measure(case, **asked)
    others_cpu = meter.share()
    write_json(options.json, options, others_cpu, {**claimed, **informing})
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table(f"{options.waiting} requests wait; nothing is held", claimed))
    console.print(table("For information: SLOs that offline work does not fit into", informing))
    contradictions = failures(claimed)
    print(
        f"claim: at most {LIMIT_RATIO} times vLLM's schedule(), planning at most "
        f"{LIMIT_PLANNER_US:.0f} us; others took {others_cpu:.0%} of the CPU; "
        f"records in {options.json}"
    )
    for line in contradictions:
        print(f"not met: {line}")
    return 1 if contradictions else 0


def _cost(turns: Sequence[Turn], planner_us: float = 0.0) -> StepCost:
    return StepCost(
        schedule_us=median_of_blocks([turn.schedule_s * 1e6 for turn in turns]),
        update_us=median_of_blocks([turn.update_s * 1e6 for turn in turns]),
        requests=median_of_blocks([turn.requests for turn in turns]),
        planner_us=planner_us,
    )


def _name(case: Case) -> str:
    return f"{case.base.__name__}, {case.running} running, {case.load.about}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=600, help="measured steps of each scheduler")
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--waiting", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="print a profile of ours instead")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "step_cost.json"
    )
    options = parser.parse_args(arguments)
    longest = MAX_LEN - _PROMPT_TOKENS[1] - _MOST_FILL - _WARM_UP
    if not BLOCK_STEPS <= options.steps <= longest:
        parser.error(f"--steps must be between {BLOCK_STEPS} and {longest}")
    if not all(0 < running <= _BUDGET for running in options.running):
        parser.error(f"--running must be between 1 and {_BUDGET}")
    return options


if __name__ == "__main__":
    sys.exit(main())

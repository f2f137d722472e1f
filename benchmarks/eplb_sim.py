"""Claim: under switching topics DeepSeek-V3 decodes at least as much as with vLLM's default.

Steady decoding on four nodes of eight H200 each, 1,024 requests to a node, experts over all 32
devices. A step takes what the simulator's profile of a node says, and for each layer what its
heaviest device takes longer than the mean. Rearranging stops the engine for as long as the busiest
device receives weights, or for a share of that where vLLM does it asynchronously:

    python -m benchmarks.eplb_sim
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.eplb import COURSES, costs, rule_of
from benchmarks.lab.eplb_rules import Ours, Rule
from benchmarks.lab.eplb_traffic import DEEPSEEK_V3
from benchmarks.lab.model import ROOT
from xllm_eplb.placement import imbalance, received
from xllm_eplb.policy import BalancePolicy, Costs, Rules
from xllm_eplb.search import Floats
from xllm_plugins.latency import StepShape
from xllm_scheduler.simulate.profiles import find_profile

GPU, PROFILE, NODE_GPUS = "h200", "DeepSeek-V3", 8
NODE_BATCH, CONTEXT = 1024, 2000  # requests, and tokens of each, prompt included
TRANSFERS = {"synchronous": 1.0, "asynchronous": 0.2}  # share of a transfer that steps wait for
SYSTEMS = ("none", "vllm", "ours")
LOADS = ("switch", "noise")


@dataclass(frozen=True)
class Result:
    """What a system made of a course of traffic.

    Attributes:
        tokens_s: output of all devices, per second.
        balance: mean max/mean over layers and windows.
        step_ms: a step in the mean, stalls aside.
        stall_s: the longest that one rearrangement adds.
    """

    tokens_s: float
    balance: float
    step_ms: float
    stall_s: float


def simulated(rule: Rule, windows: Sequence[Floats], steps: int, machine: Costs) -> Result:
    """Decode through all windows; each plan is made from the window before."""
    topology, placement = DEEPSEEK_V3.topology, DEEPSEEK_V3.first()
    shape = StepShape(decodes=NODE_BATCH, decode_context=NODE_BATCH * CONTEXT)
    base_s = find_profile(GPU, PROFILE, NODE_GPUS).step_ms(shape) / 1e3
    stepping_s, stalls, scores = 0.0, [], []
    for window, after in itertools.pairwise(windows):
        found = rule(window, placement, topology)
        arrives = received(placement, found, topology.devices).max(1).sum()
        stalls.append(machine.exposed * machine.move_s * float(arrives))
        placement = found
        heaviest = imbalance(after, found, topology.devices)
        tokens = after.sum(1) / (steps * topology.devices)  # a device's mean in a step, by layer
        longer = machine.layer_s(heaviest * tokens) - machine.layer_s(tokens)
        stepping_s += steps * (base_s + float(longer.sum()))
        scores.append(float(heaviest.mean()))
    tokens = steps * len(scores) * NODE_BATCH * topology.devices / NODE_GPUS
    return Result(
        tokens_s=float(tokens / (stepping_s + sum(stalls))),
        balance=float(np.mean(scores)),
        step_ms=stepping_s / (steps * len(scores)) * 1e3,
        stall_s=max(stalls),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints; status 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="plans; a topic lasts ten")
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 100], help="between plans")
    parser.add_argument("--seed", type=int, default=1)
    path = ROOT / "benchmarks" / "results" / "eplb_sim.json"
    parser.add_argument("--json", type=Path, default=path)
    options = parser.parse_args(arguments)
    table = Table(
        "load", "steps", "transfer", "rule", "max/mean", "step, ms", "longest stall, s", "tok/s"
    )
    found: dict[str, dict[str, Result]] = {}
    for load, steps in itertools.product(LOADS, options.steps):
        counts = NODE_BATCH / NODE_GPUS * DEEPSEEK_V3.topology.devices * DEEPSEEK_V3.chosen * steps
        course = COURSES[load].windows(DEEPSEEK_V3, options.rounds + 1, counts, options.seed)
        windows = list(course)
        for transfer, exposed in TRANSFERS.items():
            machine = dataclasses.replace(costs(DEEPSEEK_V3), exposed=exposed)
            row = found[f"{load}, a plan in {steps} steps, {transfer}"] = {}
            for name in SYSTEMS:
                one = row[name] = simulated(_rule(name, machine, steps), windows, steps, machine)
                table.add_row(
                    load, str(steps), transfer, name, f"{one.balance:.3f}", f"{one.step_ms:.2f}",
                    f"{one.stall_s:.2f}", f"{one.tokens_s:,.0f}",
                )  # fmt: skip
    Console(width=110).print(table)
    plain = {k: {n: dataclasses.asdict(r) for n, r in v.items()} for k, v in found.items()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(plain, indent=1) + "\n")
    ratios = {
        load: row["ours"].tokens_s / max(row["none"].tokens_s, row["vllm"].tokens_s)
        for load, row in found.items()
    }
    for load, ratio in ratios.items():
        print(f"{'met' if ratio >= 1 else 'NOT met'}: {load}: x{ratio:.4f} of the better of both")
    return 0 if all(ratio >= 1 for ratio in ratios.values()) else 1


def _rule(name: str, machine: Costs, steps: int) -> Rule:
    if name == "ours":
        return Ours(BalancePolicy(Rules(), machine), steps)
    return rule_of(name, DEEPSEEK_V3)


if __name__ == "__main__":
    raise SystemExit(main())

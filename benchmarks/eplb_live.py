"""Claim: experts follow the topic of real traffic, and not one answer changes.

A real mixture of experts on two ranks of one vLLM server, whose traffic changes from prose to
numbers and back. vLLM's EPLB never plans in one system and ours does in the other; a server of one
rank without any of it gives the answers to compare with:

    python -m benchmarks.eplb_live
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.lab.machine import OthersMeter, cpu_name
from benchmarks.lab.model import ROOT
from benchmarks.lab.moe import (
    NUMBERS_PROMPTS,
    ONE_CORE_A_RANK,
    PROSE_PROMPTS,
    prepare_smollm2_moe,
    two_ranks,
)
from benchmarks.lab.server import Server, serve
from xllm_eplb.placement import imbalance
from xllm_eplb.search import Ints
from xllm_eplb.trace import Window, window_of

SERVER_ARGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32")
TOPICS = {"prose": PROSE_PROMPTS, "numbers": NUMBERS_PROMPTS}
COURSE = ("prose", "numbers", "prose")
FIXED, OURS = "experts stay", "xllm.eplb"
NEVER = 1_000_000  # engine steps
TOKENS = 40
SETTLED = 3  # plans that a topic is given
CLAIM = 0.5  # of what the untouched placement has above 1, at most, once a topic has settled


@dataclass(frozen=True)
class Plan:
    """A window that was planned from.

    Attributes:
        topic: of the traffic.
        number: of the windows since the topic began, from 0.
        now: max/mean load of the ranks, a mean over layers.
        first: as it would have been in the first placement.
    """

    topic: str
    number: int
    now: float
    first: float


@dataclass
class Found:
    """What a system showed.

    Attributes:
        wrong: answers that differ from those of one rank.
        answers: of all.
        gaps_s: between two tokens of an answer.
        tokens_s: output tokens of all clients, each second.
        others: share of the machine's CPU time that other processes took meanwhile.
        moves: experts moved.
        stall_s: the longest rearrangement.
        plans: in order.
    """

    wrong: int = 0
    answers: int = 0
    gaps_s: list[float] = field(default_factory=list)
    tokens_s: float = 0.0
    others: float = 0.0
    moves: int = 0
    stall_s: float = 0.0
    plans: list[Plan] = field(default_factory=list)


def main() -> int:
    """Measures, prints; status 1 if a claim does not hold."""
    options = _options()
    console = Console(width=120)
    model = prepare_smollm2_moe()
    with serve(model, args=SERVER_ARGS) as server:
        right = {topic: _round(server, prompts)[0] for topic, prompts in TOPICS.items()}
    found = {}
    for system, interval in ((FIXED, NEVER), (OURS, options.interval)):
        args = [*SERVER_ARGS, *two_ranks(interval, options.interval)]
        with serve(model, args=args, env=ONE_CORE_A_RANK) as server:
            found[system] = measured(server, right, options.rounds)
    console.print(_table(found))
    for plan in found[OURS].plans:
        console.print(
            f"  {plan.topic}, window {plan.number + 1}: max/mean {plan.now:.3f}, "
            f"in the first placement {plan.first:.3f}"
        )
    console.print(cpu_name())
    held = claims(found)
    for claim, holds in held.items():
        print(f"{'met' if holds else 'NOT met'}: {claim}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({k: asdict(v) for k, v in found.items()}, indent=1) + "\n")
    return 0 if all(held.values()) else 1


def measured(server: Server, right: dict[str, list[str]], rounds: int) -> Found:
    """All topics in turn; the windows of a topic are read before the next begins."""
    found, meter, began = Found(), OthersMeter(), time.perf_counter()
    first: Ints | None = None
    seen = 0
    for topic in COURSE:
        for _ in range(rounds):
            texts, gaps = _round(server, TOPICS[topic])
            found.answers += len(texts)
            found.wrong += sum(a != b for a, b in zip(texts, right[topic], strict=True))
            found.gaps_s += gaps
        new = server.request("GET", f"/xllm/v1/eplb/windows?after={seen}")["windows"]
        for number, window in enumerate(map(window_of, new)):
            seen = window.plan
            first = window.placement if first is None else first
            now, untouched = _mean(window, window.placement), _mean(window, first)
            found.plans.append(Plan(topic, number, now, untouched))
    found.tokens_s = found.answers * TOKENS / (time.perf_counter() - began)
    found.others = meter.share()
    time.sleep(11)  # workers are asked for their books every ten seconds
    (engine,) = server.request("GET", "/xllm/v1/status")["engines"]
    found.moves, found.stall_s = engine["eplb"]["moves"], engine["eplb"]["longest_stall_s"]
    return found


def _mean(window: Window, placement: Ints) -> float:
    return float(imbalance(window.load, placement, window.topology.devices).mean())


def _round(server: Server, prompts: Sequence[str]) -> tuple[list[str], list[float]]:
    """One answer to each prompt, all at once: the texts, and the gaps between tokens."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: _ask(server, prompt), prompts))
    return [text for text, _ in answers], [gap for _, gaps in answers for gap in gaps]


def _ask(server: Server, prompt: str) -> tuple[str, list[float]]:
    body = {
        "model": server.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    text, at = "", []
    with closing(http.client.HTTPConnection(server.host, server.port, timeout=300)) as connection:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                at.append(time.perf_counter())
                text += json.loads(line[6:])["choices"][0]["text"]
    return text, list(np.diff(at))


def claims(found: dict[str, Found]) -> dict[str, bool]:
    """What is to hold."""
    ours, wrong = found[OURS], sum(one.wrong for one in found.values())
    settled = [plan for plan in ours.plans if plan.number >= SETTLED]
    now = statistics.fmean(plan.now - 1.0 for plan in settled)
    first = statistics.fmean(plan.first - 1.0 for plan in settled)
    return {
        f"{wrong} of {sum(one.answers for one in found.values())} answers differ": wrong == 0,
        f"{ours.moves} experts have moved": ours.moves > 0,
        f"settled max/mean {1 + now:.3f}, {1 + first:.3f} in the first placement": (
            now <= CLAIM * first
        ),
    }


def _table(found: dict[str, Found]) -> Table:
    table = Table(title="two ranks, traffic that changes its topic twice")
    for heading in (
        "system", "answers", "wrong", "tok/s", "gap p50, ms", "longest gap, s",
        "longest rearrangement, s", "moves", "CPU others took",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for name, one in found.items():
        table.add_row(
            name, str(one.answers), str(one.wrong), f"{one.tokens_s:.1f}",
            f"{statistics.median(one.gaps_s) * 1e3:.0f}", f"{max(one.gaps_s):.2f}",
            f"{one.stall_s:.2f}", str(one.moves), f"{one.others:.0%}",
        )  # fmt: skip
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6, help="of each topic in the course")
    parser.add_argument("--interval", type=int, default=TOKENS, help="engine steps between plans")
    path = ROOT / "benchmarks" / "results" / "eplb_live.json"
    parser.add_argument("--json", type=Path, default=path)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())

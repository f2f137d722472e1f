"""Claim: keeping KV costs next to nothing where nothing of it is ever asked for again.

Real vLLM servers, all up at once, are asked the same new prompt one after the other, in another
order each round, so that whatever else the machine does hits all alike. A worker of vLLM spins for
a second after its last step, on a core that all servers here share, so each waits for that to end:

    python -m benchmarks.kv_steady --rounds 24
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.kv_tiers import SERVER_ARGS, ask, prompt_of
from benchmarks.lab.machine import OthersMeter, cpu_name
from benchmarks.lab.model import prepare_smollm2
from benchmarks.lab.server import Server, serve

ALONE, HOST, DISK = "vLLM alone", "host", "host and disk"
CLAIM_PREFILL, CLAIM_DECODE = 0.97, 0.98
WORDS, TOKENS = 175, 64
PAUSE_S = 1.5  # longer than the worker that was asked before spins


@dataclass(frozen=True)
class Seen:
    """One answer: time to its first token, time of the others, CPU time of the whole server; s."""

    ttft_s: float
    rest_s: float
    cpu_s: float


def main() -> int:
    """Runs the comparison; status 1 if a claim does not hold."""
    options = _options()
    console, model, others = Console(), prepare_smollm2(), OthersMeter()
    seen: dict[str, list[Seen]] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="xllm-kv-"))
        servers: dict[str, Server] = {}
        for system, section in _sections(folder).items():
            console.print(f"starting {system}")
            more = ["--plugins", "xllm.kv", "--xllm-config", json.dumps({"kv": section})]
            args = [*SERVER_ARGS, *(more if section else [])]
            servers[system] = stack.enter_context(serve(model, args=args))
        for server in servers.values():
            _asked(server, "warm", 8)
        order = list(servers)
        for number in track(range(options.rounds), "rounds", console=console):
            prompt = prompt_of(random.Random(number), WORDS)
            for system in order:
                seen.setdefault(system, []).append(_asked(servers[system], prompt, TOKENS))
            order.append(order.pop(0))
        taken = others.share()  # while servers are there to be told from others
    console.print(_table(seen))
    console.print(f"{cpu_name()}; others took {taken:.0%} of it")
    if options.json:
        plain = {system: [dataclasses.asdict(s) for s in one] for system, one in seen.items()}
        options.json.write_text(json.dumps(plain, indent=1))
    slow = [
        system
        for system in (HOST, DISK)
        if _speed(seen, system, "ttft_s") < CLAIM_PREFILL
        or _speed(seen, system, "rest_s") < CLAIM_DECODE
    ]
    return 1 if slow else 0


def _sections(folder: str) -> Mapping[str, Mapping[str, object]]:
    return {ALONE: {}, HOST: {"host_gib": 1.0}, DISK: {"host_gib": 0.16, "disk": folder}}


def _asked(server: Server, prompt: str, tokens: int) -> Seen:
    time.sleep(PAUSE_S)
    before_s = _cpu_s(server)
    answer = ask(server, prompt, tokens)
    return Seen(answer.ttft_s, answer.rest_s, _cpu_s(server) - before_s)


def _cpu_s(server: Server) -> float:
    first = psutil.Process(server.pid)
    times = [process.cpu_times() for process in (first, *first.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _speed(seen: Mapping[str, Sequence[Seen]], system: str, name: str) -> float:
    """The median over rounds of vLLM's time by this system's, of the same prompt."""
    pairs = zip(seen[ALONE], seen[system], strict=True)
    return float(statistics.median(getattr(base, name) / getattr(one, name) for base, one in pairs))


def _table(seen: Mapping[str, Sequence[Seen]]) -> Table:
    headings = ("system", "TTFT p50, s", "prefill speed", "TPOT p50, ms", "decode speed", "CPU")
    table = Table(*headings)
    for system, one in seen.items():
        ttft_s = statistics.median(s.ttft_s for s in one)
        tpot_ms = statistics.median(s.rest_s for s in one) / (TOKENS - 1) * 1e3
        speeds = [_speed(seen, system, name) for name in ("ttft_s", "rest_s", "cpu_s")]
        table.add_row(
            system, f"{ttft_s:.3f}", f"{speeds[0]:.3f}", f"{tpot_ms:.1f}", f"{speeds[1]:.3f}",
            f"{1.0 / speeds[2]:.3f}",
        )  # fmt: skip
    table.caption = (
        f"speeds and CPU time against vLLM alone, medians of pairs; claimed: {CLAIM_PREFILL} and "
        f"{CLAIM_DECODE}"
    )
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24, help="prompts that each is asked")
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

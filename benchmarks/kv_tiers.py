"""Claim: KV from a tier or a peer comes in a fraction of the time to compute it again.

A real vLLM server whose device holds little more than one of three long prompts, so that each has
been given up when it is asked for again. Rounds alternate the systems; the first time that a prompt
is asked is not counted. A peer is a second server, whose device holds all of them and which is
asked for each first, as a router does:

    python -m benchmarks.kv_tiers --rounds 2
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.lab.lmcache import lmcache_args, lmcache_env
from benchmarks.lab.machine import cpu_name
from benchmarks.lab.model import prepare_smollm2
from benchmarks.lab.mooncake_master import find_master, mooncake_master
from benchmarks.lab.nixl import NIXL, nixl_env
from benchmarks.lab.redis_server import redis_server
from benchmarks.lab.router import cores
from benchmarks.lab.server import Server, own_modules, serve
from xllm_scheduler.service.call import prefill_body

PROMPT_WORDS, PROMPTS, TOKENS = 700, 3, 16
COMPUTED, HOST, DISK, REMOTE = "computed", "host", "disk", "redis"
MOONCAKE, PEER, VLLMS, LMCACHE = "mooncake", "peer", "vLLM's host", "LMCache's host"
SYSTEMS = (COMPUTED, HOST, DISK, REMOTE, MOONCAKE, PEER, VLLMS, LMCACHE)
CLAIMS = {HOST: 0.15, DISK: 0.3, REMOTE: 0.5, MOONCAKE: 0.5, PEER: 0.5}
LENGTH_ARGS = ("--enforce-eager", "--max-model-len", "3200", "--dtype", "float32")
SERVER_ARGS = (*LENGTH_ARGS, "--num-gpu-blocks-override", "27")
Ask = Callable[[str], "Answer"]


@dataclass(frozen=True)
class Answer:
    """One answer: its prompt's tokens, time to the first token, time of all others, and text."""

    prompt_tokens: int
    ttft_s: float
    rest_s: float
    text: str


@dataclass
class Found:
    """What a system showed.

    Attributes:
        again: answers to prompts that the device had given up.
        first: texts of the first time.
    """

    again: list[Answer] = field(default_factory=list)
    first: list[str] = field(default_factory=list)


def main() -> None:
    """Runs the comparison."""
    options = _options()
    console = Console()
    asked = {COMPUTED, *options.systems} - (set() if options.lmcache else {LMCACHE})
    found = {s: Found() for s in SYSTEMS if s in asked}
    for number in range(options.rounds):
        for system, one in found.items():
            measure(system, number, one, options.lmcache)
            ttft_s = _median([answer.ttft_s for answer in one.again])
            console.print(f"round {number + 1} of {options.rounds}: {system} {ttft_s:.3f} s")
    console.print(_table(found))
    console.print(cpu_name())
    texts = {system: [a.text for a in one.again] for system, one in found.items()}
    same = all(texts[system] == texts[COMPUTED] for system in found)
    console.print(f"greedy text {'equal' if same else 'NOT EQUAL'} in all systems")
    if options.json:
        plain = {system: dataclasses.asdict(one) for system, one in found.items()}
        options.json.write_text(json.dumps(plain, indent=1))


def measure(system: str, number: int, found: Found, lmcache: Path | None) -> None:
    """One round of one system on a fresh server."""
    rng = random.Random(number)
    prompts = [prompt_of(rng, PROMPT_WORDS) for _ in range(PROMPTS)]
    with ExitStack() as stack:
        asked = _peers(stack) if system == PEER else _alone(system, stack, lmcache)
        for prompt in prompts:
            found.first.append(asked(prompt).text)
        for prompt in prompts:
            found.again.append(asked(prompt))


def _alone(system: str, stack: ExitStack, lmcache: Path | None) -> Ask:
    """Starts one server; how it is asked."""
    args = [*SERVER_ARGS, *_options_of(system, stack)]
    env = lmcache_env(lmcache) if system == LMCACHE and lmcache else own_modules()
    server = stack.enter_context(serve(prepare_smollm2(), args=args, env=env))
    return lambda prompt: ask(server, prompt, TOKENS)


def _peers(stack: ExitStack) -> Ask:
    """Starts the one that holds prompts and the one that fetches them; how they are asked.

    Each has a core of its own: an engine that holds KV for another goes on stepping, and takes all
    of the core that it shares.
    """
    more = ["--plugins", "xllm.kv", "--xllm-config", json.dumps(NIXL)]
    model, pinned = prepare_smollm2(), cores()
    holder, server = (
        stack.enter_context(
            serve(
                model,
                args=[*args, *more],
                env={**nixl_env(), "VLLM_CPU_OMP_THREADS_BIND": str(pinned[at])},
            )
        )
        for at, args in ((-1, LENGTH_ARGS), (0, SERVER_ARGS))
    )

    def asked(prompt: str) -> Answer:
        began_s = time.perf_counter()
        body = prefill_body({"model": holder.model, "prompt": prompt, "temperature": 0})
        held = holder.request("POST", "/v1/completions", body)
        before_s = time.perf_counter() - began_s
        transfer = {"kv_transfer_params": held["kv_transfer_params"]}
        answer = ask(server, prompt, TOKENS, transfer)
        return dataclasses.replace(answer, ttft_s=before_s + answer.ttft_s)

    return asked


def _options_of(system: str, stack: ExitStack) -> list[str]:
    if system == VLLMS:
        from benchmarks.lab.vllm_tiers import transfer_config

        return ["--kv-transfer-config", transfer_config(1 << 30)]
    if system == LMCACHE:
        return lmcache_args(1.0, 128)
    # Before disk and store there is host memory for little more than one prompt.
    tier: dict[str, object] = {"host_gib": 1.0 if system == HOST else 0.16}
    if system == COMPUTED:
        return []
    if system == DISK:
        folder = tempfile.TemporaryDirectory(prefix="xllm-kv-")
        tier["disk"] = stack.enter_context(folder)
    elif system == REMOTE:
        tier["remote"] = stack.enter_context(redis_server()).url
    elif system == MOONCAKE:
        if find_master() is None:
            raise SystemExit("mooncake is not installed; it is the extra of that name")
        tier["remote"] = stack.enter_context(mooncake_master()).url(segment_gib=1.0)
    return ["--plugins", "xllm.kv", "--xllm-config", json.dumps({"kv": tier})]


def ask(server: Server, prompt: str, tokens: int, more: Mapping[str, Any] | None = None) -> Answer:
    """Stream one completion; ``more`` goes into the request's body."""
    body = {
        "model": server.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        **(more or {}),
    }  # fmt: skip
    began_s, first_s, text, prompt_tokens = time.perf_counter(), 0.0, "", 0
    with closing(http.client.HTTPConnection(server.host, server.port, timeout=300)) as connection:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        for line in connection.getresponse():
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk["choices"]:
                first_s = first_s or time.perf_counter()
                text += chunk["choices"][0]["text"]
            else:
                prompt_tokens = chunk["usage"]["prompt_tokens"]
    return Answer(prompt_tokens, first_s - began_s, time.perf_counter() - first_s, text)


def prompt_of(rng: random.Random, words: int) -> str:
    """So many words that no other prompt begins with, a few tokens each."""
    return " ".join(f"{rng.choice(_WORDS)}{rng.randrange(1000)}" for _ in range(words))


_WORDS = ("river", "stone", "cloud", "field", "light", "wind")


def _table(found: dict[str, Found]) -> Table:
    table = Table("system", "TTFT p50, s", "of computing", "claim")
    base = found[COMPUTED]
    ttft = _median([a.ttft_s for a in base.again])
    for system, one in found.items():
        mine = _median([a.ttft_s for a in one.again])
        claim = f"{CLAIMS[system]:.2f}" if system in CLAIMS else ""
        table.add_row(system, f"{mine:.3f}", f"{mine / ttft:.3f}", claim)
    tokens = _median([float(a.prompt_tokens) for a in base.again])
    table.caption = f"prompts of {tokens:.0f} tokens"
    return table


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="servers of each system")
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="computed is always one"
    )
    parser.add_argument(
        "--lmcache", type=Path, help="a folder that LMCache is installed in; without it is left out"
    )
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()

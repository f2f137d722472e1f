"""Claim: a tier that is slower than computing costs at most 5 %, and comes back by itself.

A real vLLM server with a Redis behind a link whose bandwidth is changed. Prompts that the device
and host memory have given up are asked again, each beside one that nobody has asked before: while
the link is fast, after it has turned slower than computing, and after it is fast again:

    python -m benchmarks.kv_slow_tier
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from contextlib import closing
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.kv_tiers import ask
from benchmarks.lab.machine import cpu_name
from benchmarks.lab.model import ROOT, prepare_smollm2
from benchmarks.lab.redis_server import redis_server
from benchmarks.lab.server import Server, serve
from benchmarks.lab.slow_link import SlowLink

PROMPTS, WORDS, TOKENS = 4, 250, 4
SERVER_ARGS = (
    "--enforce-eager", "--max-model-len", "1280", "--dtype", "float32",
    "--num-gpu-blocks-override", "11",
)  # fmt: skip
HOST_GIB = 0.11  # 19 chunks of 128 tokens, of which a prompt has 7 or 8
SLOW_BYTES_S = 1 << 20  # some 45 s for a prompt
CLAIM, RECOVERY_S = 1.05, 120.0
TIER = "RemoteTier"


def main() -> int:
    """Runs the scene; status 1 if the claim does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="times that the link turns slow")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "kv_slow_tier.json"
    )
    options = parser.parse_args()
    with redis_server() as store, closing(SlowLink(store.port)) as link:
        url = f"redis://127.0.0.1:{link.port}"
        settings = json.dumps({"kv": {"host_gib": HOST_GIB, "eviction": "lru", "remote": url}})
        args = [*SERVER_ARGS, "--plugins", "xllm.kv", "--xllm-config", settings]
        with serve(prepare_smollm2(), args=args) as server:
            found = scene(server, link, options.rounds)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    for name, values in found.items():
        print(f"{name}: {', '.join(f'{value:.3f}' for value in values)}")
    middle = {name: statistics.median(values) for name, values in found.items()}
    slow = middle["slow: asked again, s"] / middle["slow: computed, s"]
    fast = middle["fast: asked again, s"] / middle["fast: computed, s"]
    print(f"of computing: fast {fast:.3f}, slow {slow:.3f} (at most {CLAIM}); {cpu_name()}")
    return 0 if slow <= CLAIM else 1


def scene(server: Server, link: SlowLink, rounds: int) -> dict[str, list[float]]:
    """The figures of each phase."""
    rng = random.Random(0)
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)
        print(f"{name} {value:.3f}", flush=True)

    prompts = [prompt(rng) for _ in range(PROMPTS)]
    texts = [ask(server, one, TOKENS).text for one in prompts]

    def phase(name: str) -> None:
        for one, text in zip(prompts, texts, strict=True):
            again = ask(server, one, TOKENS)
            assert again.text == text, "another text"
            add(f"{name}: asked again, s", again.ttft_s)
            add(f"{name}: computed, s", ask(server, prompt(rng), TOKENS).ttft_s)

    for _ in range(rounds):
        phase("fast")
        link.bytes_per_s = SLOW_BYTES_S
        phase("slow")
        before = counts(server)
        add("slow: fetches given up", before["late"])
        link.bytes_per_s = inf
        began_s = time.monotonic()
        while time.monotonic() - began_s < RECOVERY_S:
            for one in prompts:
                ask(server, one, TOKENS)
            if counts(server)["won_tokens"] > before["won_tokens"]:
                break
        add("until it is used again, s", time.monotonic() - began_s)
    return found


def counts(server: Server) -> dict[str, Any]:
    """What the tier has counted."""
    (engine,) = server.request("GET", "/xllm/v1/status")["engines"]
    found: dict[str, Any] = engine["kv"]["tiers"][TIER]
    return found


def prompt(rng: random.Random) -> str:
    """One that nobody has asked before."""
    words = ("river", "stone", "cloud", "field", "light", "wind")
    return " ".join(f"{rng.choice(words)}{rng.randrange(1000)}" for _ in range(WORDS))


if __name__ == "__main__":
    sys.exit(main())

"""Claim: whatever happens to KV in tiers, no answer is wrong, none fails, and no space is lost.

A real vLLM server with host memory for three of a dozen prompts, a disk and a Redis behind it, is
asked at random while files and values are damaged, the disk is filled, the store is killed or
stopped, and the server itself is killed while it writes. Every answer is compared with the first
one to its prompt, which was computed:

    python -m benchmarks.kv_faults --faults 200
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import redis

from benchmarks.lab.damage import Faults
from benchmarks.lab.machine import cpu_name
from benchmarks.lab.model import ROOT, prepare_smollm2
from benchmarks.lab.redis_server import redis_server
from benchmarks.lab.server import Server, ServerError, serve

PROMPTS, WORDS, TOKENS = 12, 40, 4
BLOCK_TOKENS = 32
SERVER_ARGS = (
    "--enforce-eager", "--max-model-len", "320", "--dtype", "float32",
    "--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", "12",
)  # fmt: skip
CHUNK_BYTES = 30 * 2 * 3 * 64 * BLOCK_TOKENS * 4  # layers, K and V, heads, width, tokens, bytes
QUOTA_GIB, DISK_MB, STORE_MB = 24 * CHUNK_BYTES / 2**30, 45, 45
SETTINGS = {"host_gib": 14 * CHUNK_BYTES / 2**30, "disk_gib": QUOTA_GIB}
DISK, STORE = "DiskTier", "RemoteTier"


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        faults: by kind.
        asked, wrong, failed: requests; those that were cut off by a kill do not count.
        tiers: counts of the tiers, summed over all servers.
        mid_write: kills that hit the server while it wrote a file.
        disk_bytes, unfinished, shared: what is left on the disk, of it unfinished, and files of
            host memory.
        store_bytes: what the store says that it uses.
    """

    faults: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    wrong: int = 0
    failed: int = 0
    tiers: dict[str, Counter[str]] = field(default_factory=dict)
    mid_write: int = 0
    disk_bytes: int = 0
    unfinished: int = 0
    shared: int = 0
    store_bytes: int = 0
    errors: list[str] = field(default_factory=list)


def run(count: int, killed_every: int, seed: int, outcome: Outcome) -> None:
    """Ask, damage and compare."""
    rng = random.Random(seed)
    words = ("river", "stone", "cloud", "field", "light", "wind")
    prompts = [
        f"{n} " + " ".join(f"{rng.choice(words)}{rng.randrange(99)}" for _ in range(WORDS))
        for n in range(PROMPTS)
    ]
    expected: list[str] = []
    limits = ("--maxmemory", f"{STORE_MB}mb", "--maxmemory-policy", "allkeys-lru")
    shared = set(Path("/dev/shm").glob("vllm_offload_*"))
    with small_disk() as (folder, full), redis_server(*limits) as store:
        faults = Faults(folder, full, store, rng)
        settings = {"kv": {**SETTINGS, "disk": str(folder), "remote": store.url}}
        args = (*SERVER_ARGS, "--plugins", "xllm.kv", "--xllm-config", json.dumps(settings))

        def compare(server: Server, number: int) -> None:
            outcome.asked += 1
            try:
                outcome.wrong += ask(server, prompts[number]) != expected[number]
            except (ServerError, OSError, http.client.HTTPException) as error:
                outcome.failed += 1
                outcome.errors.append(str(error)[:300])

        while True:
            with serve(prepare_smollm2(), args=args) as server:
                if not expected:
                    expected = [ask(server, prompt) for prompt in prompts]
                    assert not fetched(server), "the first answers were not computed"
                for number in range(PROMPTS):
                    compare(server, number)
                for _ in range(min(killed_every - 1, count - outcome.faults.total())):
                    name = faults.inject()
                    outcome.faults[name] += 1
                    compare(server, rng.randrange(PROMPTS))
                    seen = f"{outcome.wrong} wrong, {outcome.failed} failed of {outcome.asked}"
                    print(outcome.faults.total(), name, seen, flush=True)
                faults.mend()
                for number in range(PROMPTS):
                    compare(server, number)
                add(outcome.tiers, server)
                if outcome.faults.total() == count:
                    break  # the last start has cleared up what a killed server left
                outcome.mid_write += kill_in_mid_write(server, prompts, folder)
                outcome.faults["server: killed"] += 1
        files = [path for path in folder.rglob("*") if path.is_file()]
        outcome.disk_bytes = sum(path.stat().st_size for path in files)
        outcome.unfinished = sum(path.name.startswith(".") for path in files)
        outcome.store_bytes = redis.Redis(port=store.port).info("memory")["used_memory"]
    outcome.shared = len(set(Path("/dev/shm").glob("vllm_offload_*")) - shared)


def kill_in_mid_write(server: Server, prompts: list[str], folder: Path) -> bool:
    """Kill a server that is being asked; whether a file was half written then."""

    def asked() -> None:
        for number in range(100):
            with suppress(ServerError, OSError, http.client.HTTPException):
                ask(server, f"{number} {prompts[number % len(prompts)]}")

    threading.Thread(target=asked, daemon=True).start()
    until_s = time.monotonic() + 30.0
    while time.monotonic() < until_s:
        if any(folder.glob("*/*/.*")):
            os.killpg(server.pid, signal.SIGKILL)
            return any(folder.glob("*/*/.*"))
    os.killpg(server.pid, signal.SIGKILL)
    return False


def ask(server: Server, prompt: str) -> str:
    """The greedy answer."""
    body = {"model": server.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    text: str = server.request("POST", "/v1/completions", body)["choices"][0]["text"]
    return text


def add(totals: dict[str, Counter[str]], server: Server) -> None:
    """Add what a server's tiers have counted."""
    for tier, counts in tiers(server).items():
        totals.setdefault(tier, Counter()).update(counts)


def fetched(server: Server) -> bool:
    """Whether anything has come from a tier."""
    return any(counts["fetched_bytes"] for counts in tiers(server).values())


def tiers(server: Server) -> dict[str, dict[str, float]]:
    """What a server's tiers have counted."""
    (engine,) = server.request("GET", "/xllm/v1/status")["engines"]
    found: dict[str, dict[str, float]] = engine["kv"]["tiers"]
    return found


@contextmanager
def small_disk() -> Iterator[tuple[Path, bool]]:
    """A folder on a file system that can be filled, where this user may mount one."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="xllm-kv-"))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder]
        full = subprocess.run(mount, capture_output=True).returncode == 0
        if full:
            # Lazily: the server that has just been stopped may hold a file for a moment more.
            stack.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
        else:
            print("a small file system cannot be mounted: the disk is never full")
        yield Path(folder), full


def main() -> int:
    """Damages, prints; status 1 if an answer was wrong or failed, or space was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--killed-every", type=int, default=50, help="faults; a start takes long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "kv_faults.json"
    )
    options = parser.parse_args()
    outcome = Outcome()
    run(options.faults, options.killed_every, options.seed, outcome)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(vars(outcome), indent=1) + "\n")
    for name, number in sorted(outcome.faults.items()):
        print(f"{number:4} {name}")
    for tier in (DISK, STORE):
        counts = outcome.tiers[tier]
        print(f"{tier}: {counts['fetched_bytes'] / 2**20:.0f} MiB fetched, "
              f"{counts['stored_bytes'] / 2**20:.0f} MiB stored, {counts['errors']} errors, "
              f"{counts['skipped']} blocks not written, {counts['late']} late")  # fmt: skip
    quota = round(QUOTA_GIB * 2**30) + 24 * 4096
    print(f"wrong {outcome.wrong}, failed {outcome.failed} of {outcome.asked} {outcome.errors[:2]}")
    print(f"left: {outcome.disk_bytes} bytes on disk of {quota}, {outcome.unfinished} unfinished, "
          f"{outcome.shared} files of host memory, {outcome.store_bytes} bytes in the store; "
          f"{outcome.mid_write} kills in mid-write; {cpu_name()}")  # fmt: skip
    lost = outcome.unfinished or outcome.shared or outcome.disk_bytes > quota
    return 1 if outcome.wrong or outcome.failed or lost else 0


if __name__ == "__main__":
    sys.exit(main())

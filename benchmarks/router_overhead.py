"""Claim: the router adds under a millisecond, and one core of it relays thousands of requests.

An upstream that answers at once, wrk, and between them nothing, our router, or vLLM's (PyPI's
``vllm-router``, in Rust), each router on one core. Needs wrk (Debian: wrk) and taskset:

    python -m benchmarks.router_overhead --vllm-router /path/to/vllm-router
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.lab.model import ROOT
from benchmarks.lab.router import command
from benchmarks.lab.server import free_port

SHORT = "Tell me something."
LONG = "word " * 2000
SECONDS, CONNECTIONS = 6, 32
CLAIM_P50_MS, CLAIM_REQUESTS_S, CLAIM_STREAMS_S = 1.0, 2500.0, 1200.0
DIRECT, OURS, OURS_KV, THEIRS, THEIRS_KV = (
    "direct", "xllm, round robin", "xllm, slo_aware", "vllm-router, round robin",
    "vllm-router, kv_aware",
)  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """What wrk measured.

    Attributes:
        p50_ms, p99_ms: of one connection.
        per_s: requests per second of many connections.
        failed: answers that were no 2xx or did not come.
    """

    p50_ms: float
    p99_ms: float
    per_s: float
    failed: int


def wrk(url: str, body: Mapping[str, object], connections: int, seconds: int) -> tuple[str, int]:
    """Its report, and how many answers failed."""
    text = json.dumps(body)
    script = "\n".join(
        [
            'wrk.method = "POST"',
            'wrk.headers["Content-Type"] = "application/json"',
            f"wrk.body = [==[{text}]==]",
        ]
    )
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        args = ["wrk", "--latency", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", file.name]
        ran = subprocess.run(
            [*_pinned(-1), *args, url + "/v1/completions"],
            capture_output=True,
            text=True,
            check=True,
        )
    failed = sum(int(n) for n in re.findall(r"Non-2xx or 3xx responses: (\d+)", ran.stdout))
    for counts in re.findall(r"Socket errors: (.*)", ran.stdout):
        failed += sum(int(n) for n in re.findall(r"\d+", counts))
    return ran.stdout, failed


def measured(url: str, body: Mapping[str, object], seconds: int) -> Figures:
    """One connection for latencies, many for throughput."""
    wrk(url, body, CONNECTIONS, 1)  # warm
    one, failed = wrk(url, body, 1, seconds)
    many, more = wrk(url, body, CONNECTIONS, seconds)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", many)
    assert rate is not None, many
    return Figures(_latency_ms(one, 50), _latency_ms(one, 99), float(rate[1]), failed + more)


def _latency_ms(report: str, percent: int) -> float:
    found = re.search(rf"{percent}%\s+([\d.]+)(us|ms|s)", report)
    assert found is not None, report
    return float(found[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[found[2]]


def _pinned(index: int) -> list[str]:
    """On one of the cores: the first for routers, the last for everything else."""
    cores = sorted(os.sched_getaffinity(0))
    return ["taskset", "-c", str(cores[index])]


@contextlib.contextmanager
def running(args: Sequence[str], url: str, path: str, core: int) -> Iterator[None]:
    """A process until the block ends, once it answers at ``path``."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*_pinned(core), *args], stdout=log, stderr=log)
        try:
            until_s = time.monotonic() + 60.0
            while not _answers(url + path):
                if process.poll() is not None or time.monotonic() > until_s:
                    log.seek(0)
                    tail = log.read().decode(errors="replace")[-2000:]
                    raise SystemExit(f"{args[0]} does not answer:\n{tail}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def systems(upstream: str, peer: str) -> Iterator[tuple[str, str, Sequence[str], str]]:
    """Name, address, command and path to ask whether it is there; the command is empty for none."""
    yield DIRECT, upstream, (), ""
    for name, routing in ((OURS, "round_robin"), (OURS_KV, "slo_aware")):
        port = free_port()
        args = command(port, ["--instances", upstream, "--routing", routing])
        yield name, f"http://127.0.0.1:{port}", args, "/ready"
    for name, policy in ((THEIRS, "round_robin"), (THEIRS_KV, "kv_aware")) if peer else ():
        port, metrics = free_port(), free_port()
        args = [peer, "--worker-urls", upstream, "--policy", policy, "--port", str(port),
                "--host", "127.0.0.1", "--prometheus-port", str(metrics)]  # fmt: skip
        yield name, f"http://127.0.0.1:{port}", args, "/health"


def table(results: Mapping[str, Mapping[str, Figures]]) -> Table:
    """All systems, by kind of request."""
    made = Table(title="One connection for latencies, 32 for requests per second of one core")
    for heading in ("system", "request", "p50, ms", "added", "p99, ms", "added", "1/s", "failed"):
        made.add_column(heading, justify="left" if heading in ("system", "request") else "right")
    for name, kinds in results.items():
        for kind, one in kinds.items():
            base = results[DIRECT][kind]
            made.add_row(
                name, kind, f"{one.p50_ms:.2f}", f"{one.p50_ms - base.p50_ms:+.2f}",
                f"{one.p99_ms:.2f}", f"{one.p99_ms - base.p99_ms:+.2f}", f"{one.per_s:.0f}",
                str(one.failed),
            )  # fmt: skip
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints; status 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vllm-router", default=shutil.which("vllm-router") or "", help="a path")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each measurement")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "router_overhead.json"
    )
    options = parser.parse_args(arguments)
    port = free_port()
    upstream = f"http://127.0.0.1:{port}"
    stub = [sys.executable, "-m", "uvicorn", "benchmarks.lab.fast_stub:app", "--port", str(port),
            "--no-access-log", "--log-level", "error"]  # fmt: skip
    kinds = {
        "whole": {"model": "stub", "prompt": SHORT, "max_tokens": 20},
        "stream": {"model": "stub", "prompt": SHORT, "max_tokens": 20, "stream": True},
        "2,000 tokens": {"model": "stub", "prompt": LONG, "max_tokens": 20},
    }
    results: dict[str, dict[str, Figures]] = {}
    with running(stub, upstream, "/health", -1):
        for name, url, args, path in systems(upstream, options.vllm_router):
            with running(args, url, path, 0) if args else contextlib.nullcontext():
                results[name] = {
                    kind: measured(url, body, options.seconds) for kind, body in kinds.items()
                }
            print(f"{name}: {results[name]}", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    document = {
        name: {kind: dataclasses.asdict(one) for kind, one in found.items()}
        for name, found in results.items()
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 140).print(table(results))
    mine, direct = results[OURS], results[DIRECT]
    claims = {
        f"added p50 below {CLAIM_P50_MS:g} ms": mine["whole"].p50_ms - direct["whole"].p50_ms
        < CLAIM_P50_MS,
        f"at least {CLAIM_REQUESTS_S:g} requests/s a core": mine["whole"].per_s >= CLAIM_REQUESTS_S,
        f"at least {CLAIM_STREAMS_S:g} streams/s a core": mine["stream"].per_s >= CLAIM_STREAMS_S,
        "no request failed": not any(one.failed for one in mine.values()),
    }
    for claim, holds in claims.items():
        print(f"{'met' if holds else 'NOT met'}: {claim}")
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

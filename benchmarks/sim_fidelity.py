"""Claim: a simulation tells a real server's TTFT, TPOT and throughput within 15 %.

A real server is profiled from outside, then loaded; the simulation gets the profile and the same
arrivals. ``prefill-decode`` is two servers on a core each, the KV moved by NIXL:

    python -m benchmarks.sim_fidelity

The offline clients of a run fall into step with each other, and which of them then wait for an
online prompt is chance: p90 of TTFT of two equal real runs with 60 requests differed by 16 %, so
there are more.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.colocation import DEFAULT_SLO, OFFLINE, SERVER_ARGS, SYSTEMS, WARM_UP
from benchmarks.lab.load import Load, run_load
from benchmarks.lab.machine import OthersMeter, cpu_name, fast_dtype
from benchmarks.lab.model import ROOT, prepare_smollm2
from benchmarks.lab.nixl import NIXL, nixl_env
from benchmarks.lab.results import RequestClass, Run, output_tokens_in, percentiles, summarize
from benchmarks.lab.server import Server, serve
from benchmarks.lab.workload import OnlineLoad
from xllm_scheduler.service.routing import Role
from xllm_scheduler.service.staged import least_loaded
from xllm_scheduler.simulate.cluster import Cluster
from xllm_scheduler.simulate.engine import ELASTIC, FCFS, Engine, EngineSpec
from xllm_scheduler.simulate.hardware import LINKS
from xllm_scheduler.simulate.measure import measure
from xllm_scheduler.simulate.members import ClusterSpec
from xllm_scheduler.simulate.outcomes import Outcome
from xllm_scheduler.simulate.outcomes import Run as Simulated
from xllm_scheduler.simulate.profiles import Profile, load_profile
from xllm_scheduler.simulate.workload import Ask, Slo, Stream

LIMIT = 0.15
KV_GIB = 2  # of the real server and of the simulated one
# Prompts are shorter than 512 tokens. A longer one alone costs more for each token than a step of
# several short ones does, which would go into the fit.
LENGTHS = (16, 32, 64, 128, 256, 512)
BATCHES = (1, 2, 4, 8, 16, 24)
SEED = 0
DRAIN_S = Load(OnlineLoad(1, 1.0), None).drain_s
SIMULATED = {"vllm-fcfs": FCFS, "xllm": ELASTIC}
PAIR = "prefill-decode"
PAIR_RATE = 0.2  # requests/s; each of the two has one core
SYSTEM_NAMES = (*SIMULATED, PAIR)


@dataclasses.dataclass(frozen=True)
class Figures:
    """What is compared."""

    ttft_p50_ms: float
    ttft_p90_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    output_tok_s: float

    def errors(self, simulated: Figures) -> dict[str, float]:
        """By how much each simulated figure is off, 0.1 for 10 % too much."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(simulated)
        return {name: theirs[name] / value - 1.0 for name, value in mine.items()}


def profiled(model: Path) -> Profile:
    """How long steps take, in ms, measured on a server with vLLM's own scheduler.

    They are the same with ours, which would compute the measured prompts at the pace of decodes.

    Raises:
        XllmError: the server does not answer as vLLM does.
    """
    with serve(model, args=SERVER_ARGS, env={"VLLM_CPU_KVCACHE_SPACE": str(KV_GIB)}) as server:
        _, found = asyncio.run(measure(server.url, server.model, LENGTHS, BATCHES))
    return found.profile(f"{cpu_name()}|SmolLM2-135M|tp1", "measured by this benchmark")


def measured(model: Path, system: str, requests: int) -> Run:
    """What a real server did under the load."""
    args = [*SERVER_ARGS, *SYSTEMS[system].server_args(DEFAULT_SLO)]
    with serve(model, args=args, env={"VLLM_CPU_KVCACHE_SPACE": str(KV_GIB)}) as server:
        fields = SYSTEMS[system].offline_fields
        run_load(server.url, server.model, WARM_UP, seed=-1, offline_fields=fields)
        load = Load(OnlineLoad(requests, 0.5), OFFLINE)
        meter = OthersMeter()
        run = run_load(server.url, server.model, load, seed=SEED, offline_fields=fields)
        return dataclasses.replace(run, others_cpu=meter.share())


def measured_pair(model: Path, requests: int) -> tuple[Profile, Run]:
    """Two real servers, one for prompts and one for answers; the profile is of the latter."""

    def one(core: int) -> AbstractContextManager[Server]:
        env = {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": str(core),
            **nixl_env(),
        }
        settings = json.dumps({"scheduler": {"mode": "off"}, **NIXL})
        args = [*SERVER_ARGS, "--plugins", "xllm", "--xllm-config", settings]
        return serve(model, args=args, env=env)

    with one(0) as prefill, one(1) as decode:
        _, found = asyncio.run(measure(decode.url, decode.model, LENGTHS, BATCHES))
        profile = found.profile(f"{cpu_name()}, one core|SmolLM2-135M|tp1", "this benchmark")
        # Two instances that have never met take a dozen seconds to connect.
        warm = dataclasses.replace(WARM_UP, offline=None, drain_s=45.0)
        for seed, load in ((-1, warm), (SEED, Load(OnlineLoad(requests, PAIR_RATE), None))):
            meter = OthersMeter()
            run = run_load(decode.url, decode.model, load, seed=seed, prefill_url=prefill.url)
        return profile, dataclasses.replace(run, others_cpu=meter.share())


def simulated(model: Path, system: str, profile: Profile, run: Run) -> Simulated:
    """The same arrivals and lengths on virtual servers."""
    settings = {"ttft_ms": DEFAULT_SLO.ttft_ms, "tpot_ms": DEFAULT_SLO.tpot_ms}
    spec = EngineSpec(
        str(model),
        "cpu",
        scheduler=SIMULATED.get(system, FCFS),
        settings=settings if system == "xllm" else {},
        vllm={"max_model_len": 4096, "dtype": fast_dtype()},
        kv_gib=KV_GIB,
    )
    pair = system == PAIR
    settle_s = 0.0 if pair else Load(OnlineLoad(1, 1.0), OFFLINE).settle_s
    online = [
        Ask(r.arrival_s + settle_s, r.prompt_tokens, r.output_tokens)
        for r in sorted(run.of(RequestClass.ONLINE), key=lambda r: r.arrival_s)
        if r.finished
    ]
    # The backlog goes on for as long as it is needed, with the lengths that it had.
    backlog = sorted(run.of(RequestClass.OFFLINE), key=lambda r: r.arrival_s)
    batch = [Ask(0.0, r.prompt_tokens, OFFLINE.max_tokens) for r in backlog if r.prompt_tokens]
    slo = Slo(DEFAULT_SLO.ttft_ms, DEFAULT_SLO.tpot_ms)
    streams = [
        Stream("online", True, slo, asks=online),
        Stream("offline", False, asks=batch * 4, outstanding=OFFLINE.clients),
    ]
    if pair:
        streams.pop()
    roles = [Role.PREFILL, Role.DECODE] if pair else [Role.MIXED]
    cluster = Cluster(ClusterSpec(roles, LINKS["tcp"]), Engine(spec), profile, least_loaded())
    return cluster.run(streams, seconds=settle_s + run.window_s + DRAIN_S)


def figures_of(run: Run) -> Figures:
    """A real run's."""
    summary = summarize([run], DEFAULT_SLO)
    ttft, tpot = summary.ttft_ms, summary.tpot_ms
    online = sum(output_tokens_in(r, run.window_s) for r in run.of(RequestClass.ONLINE))
    tok_s = online / run.window_s + summary.offline_output_tok_s
    return _figures(ttft.p50, ttft.p90, tpot.p50, tpot.p90, tok_s)


def figures_of_simulated(run: Simulated, window_s: float) -> Figures:
    """A virtual run's, in the same window."""
    online = [o for o in run.outcomes if o.online]
    ttft = percentiles(o.ttft_ms for o in online)
    tpot = percentiles(o.tpot_ms for o in online)
    start_s = run.seconds - DRAIN_S - window_s
    generated = sum(_tokens_in(o, start_s, start_s + window_s) for o in run.outcomes)
    return _figures(ttft.p50, ttft.p90, tpot.p50, tpot.p90, generated / window_s)


def _tokens_in(one: Outcome, start_s: float, end_s: float) -> float:
    """Tokens that came in between, were they evenly spread from the first to the last."""
    if one.first_s is None or one.last_s is None:
        return 0.0
    inside_s = min(one.last_s, end_s) - max(one.first_s, start_s)
    if inside_s <= 0.0:
        return 0.0
    return one.tokens * inside_s / (one.last_s - one.first_s)


def _figures(*values: float | None) -> Figures:
    if None in values:
        raise SystemExit("no online request was answered, so nothing can be compared")
    return Figures(*(float(value) for value in values if value is not None))


def table(results: Mapping[str, tuple[Figures, Figures]]) -> Table:
    """Measured and simulated side by side."""
    made = Table(title="Measured / simulated (error)")
    made.add_column("system")
    for name in dataclasses.fields(Figures):
        made.add_column(name.name, justify="right")
    for system, (real, virtual) in results.items():
        errors = real.errors(virtual)
        pairs = zip(dataclasses.astuple(real), dataclasses.astuple(virtual), strict=True)
        cells = [
            f"{mine:.1f} / {theirs:.1f} ({error:+.0%})"
            for (mine, theirs), error in zip(pairs, errors.values(), strict=True)
        ]
        made.add_row(system, *cells)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, simulates, prints; status 1 if the claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=200, help="online requests")
    parser.add_argument("--systems", nargs="+", choices=SYSTEM_NAMES, default=list(SYSTEM_NAMES))
    parser.add_argument("--profile", type=Path, help="a file; default: measured first")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "sim_fidelity.json"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    model = prepare_smollm2()
    # Of a server that has all cores, whichever scheduler it runs.
    whole = load_profile(options.profile) if options.profile else None
    results: dict[str, tuple[Figures, Figures]] = {}
    document = {}
    for system in options.systems:
        if system == PAIR:
            print(f"{system}: profiling and loading real servers", flush=True)
            profile, run = measured_pair(model, options.requests)
        else:
            if whole is None:
                print("profiling a real server", flush=True)
                whole = profiled(model)
            print(f"{system}: loading a real server", flush=True)
            profile, run = whole, measured(model, system, options.requests)
        print(f"{system}: simulating", flush=True)
        virtual = simulated(model, system, profile, run)
        results[system] = figures_of(run), figures_of_simulated(virtual, run.window_s)
        document[system] = {
            "profile": profile.document(),
            "others_cpu": run.others_cpu,
            "measured": dataclasses.asdict(results[system][0]),
            "simulated": dataclasses.asdict(results[system][1]),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 180).print(table(results))
    wrong = [
        f"{system}: {name} is off by {error:+.0%}; claim: {LIMIT:.0%}"
        for system, (real, virtual) in results.items()
        for name, error in real.errors(virtual).items()
        if abs(error) > LIMIT
    ]
    for line in wrong:
        print(f"not met: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

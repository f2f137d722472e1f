"""Claim: online requests keep their SLOs beside an offline batch that uses what they leave.

Real servers, one after the other, each with the same requests in a round:

    python -m benchmarks.colocation --requests 400 --rounds 4

and with speculation too, on text that repeats:

    python -m benchmarks.colocation --scenario tasks --systems xllm xllm-drafts
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.lab.load import Json, Load, Tick, run_load
from benchmarks.lab.machine import OthersMeter, cpu_name, fast_dtype
from benchmarks.lab.model import ROOT, prepare_smollm2
from benchmarks.lab.results import Record, RequestClass, Run, Slo, Summary, summarize
from benchmarks.lab.server import serve
from benchmarks.lab.workload import Bursts, OfflineLoad, OnlineLoad

SERVER_ARGS = ("--enforce-eager", "--max-model-len", "4096", "--enable-prompt-tokens-details")
OFFLINE = OfflineLoad(clients=16)
WARM_UP = Load(OnlineLoad(requests=8, rate=0.8), OFFLINE, settle_s=5.0, drain_s=10.0)
WARM_UP_SEED = -1
DEFAULT_SLO = Slo(ttft_ms=1500, tpot_ms=120)


@dataclass(frozen=True)
class Scenario:
    """What is asked of every system."""

    about: str
    slo: Slo = DEFAULT_SLO
    rate: float = 0.5
    words: tuple[int, int] = (40, 160)
    bursts: Bursts | None = None
    tasks: bool = False
    server_args: tuple[str, ...] = ()

    def load(self, requests: int, *, with_offline: bool) -> Load:
        """The measured load of one round."""
        online = OnlineLoad(requests, self.rate, self.words, bursts=self.bursts, tasks=self.tasks)
        return Load(online, OFFLINE if with_offline else None)


SCENARIOS = {
    "base": Scenario("chat at 0.5 requests/s"),
    "bursts": Scenario(
        "2 requests/s for 10 s of every 40 s, otherwise 0.5",
        bursts=Bursts(rate=2.0, length_s=10, period_s=40),
    ),
    "long-prompts": Scenario(
        "prompts of 2000 tokens, fewer of them, a TTFT that their prefill fits in",
        slo=Slo(ttft_ms=8000, tpot_ms=120),
        rate=0.1,
        words=(2000, 2000),
    ),
    "small-kv": Scenario(
        "a KV cache of 5632 tokens, less than the batch fills",
        server_args=("--num-gpu-blocks-override", "44"),
    ),
    "tight-slo": Scenario("TTFT 0.8 s, TPOT 80 ms", slo=Slo(ttft_ms=800, tpot_ms=80)),
    "tasks": Scenario("tasks of which some repeat their prompt, at 0.5 requests/s", tasks=True),
    "no-chunked": Scenario("whole prompts only", server_args=("--no-enable-chunked-prefill",)),
}


@dataclass(frozen=True)
class System:
    """One way to serve both classes."""

    server_args: Callable[[Slo], tuple[str, ...]]
    offline_fields: Json
    with_offline: bool = True


def _no_args(_slo: Slo) -> tuple[str, ...]:
    return ()


def _priority_args(_slo: Slo) -> tuple[str, ...]:
    return ("--scheduling-policy", "priority")


def _xllm_args(slo: Slo, **more: Json) -> tuple[str, ...]:
    config = {"scheduler": {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms}, **more}
    return ("--plugins", "xllm", "--xllm-config", json.dumps(config))


ALONE, FCFS, DRAFTS = "online-alone", "vllm-fcfs", "xllm-drafts"
OURS_OFFLINE = {"vllm_xargs": {"xllm_class": "offline"}}
SYSTEMS = {
    ALONE: System(_no_args, {}, with_offline=False),
    FCFS: System(_no_args, {}),
    "vllm-priority": System(_priority_args, {"priority": 1}),
    "xllm": System(_xllm_args, OURS_OFFLINE),
    DRAFTS: System(partial(_xllm_args, spec_decode={"mode": "auto"}), OURS_OFFLINE),
}
DEFAULT = [name for name in SYSTEMS if name != DRAFTS]


def measure(
    model: Path, system: System, scenario: Scenario, *, requests: int, seed: int, tick: Tick
) -> Run:
    """One round of one system: a fresh server, a warm-up, the measured window."""
    args = [*SERVER_ARGS, *scenario.server_args, *system.server_args(scenario.slo)]
    load = scenario.load(requests, with_offline=system.with_offline)
    with serve(model, args=args) as server:
        fields = system.offline_fields
        run_load(server.url, server.model, WARM_UP, seed=WARM_UP_SEED, offline_fields=fields)
        meter = OthersMeter()
        run = run_load(server.url, server.model, load, seed=seed, offline_fields=fields, tick=tick)
        return dataclasses.replace(run, others_cpu=meter.share())


def table(results: dict[str, list[Run]], slo: Slo) -> Table:
    """The claim in one table."""
    summaries = {name: summarize(runs, slo) for name, runs in results.items() if runs}
    alone = summaries[ALONE].attainment if ALONE in summaries else None
    fcfs_output = summaries[FCFS].offline_output_tok_s if FCFS in summaries else None
    fcfs_total = summaries[FCFS].offline_total_tok_s if FCFS in summaries else None
    made = Table(title=f"SLO: TTFT {slo.ttft_ms / 1e3:g} s, TPOT {slo.tpot_ms:g} ms")
    made.add_column("system")
    for heading in (
        "online n",
        "meets both [95 %]",
        "of alone",
        "TTFT p50 / p90, s",
        "TPOT p50 / p90, ms",
        "offline out tok/s",
        "of FCFS",
        "with prompts",
        "of FCFS",
        "longest wait, s",
        "others' CPU",
    ):
        made.add_column(heading, justify="right")
    for name, one in summaries.items():
        made.add_row(
            name,
            str(one.online_n),
            _share(one),
            _ratio(one.attainment, alone),
            f"{_number(one.ttft_ms.p50, 1e-3, 2)} / {_number(one.ttft_ms.p90, 1e-3, 2)}",
            f"{_number(one.tpot_ms.p50, 1, 0)} / {_number(one.tpot_ms.p90, 1, 0)}",
            f"{one.offline_output_tok_s:.1f}",
            _ratio(one.offline_output_tok_s, fcfs_output),
            f"{one.offline_total_tok_s:.1f}",
            _ratio(one.offline_total_tok_s, fcfs_total),
            f"{one.longest_offline_wait_s:.1f}",
            f"{one.others_cpu:.0%}",
        )
    return made


def write_json(
    path: Path, options: argparse.Namespace, scenario: Scenario, results: dict[str, list[Run]]
) -> None:
    """Everything that the table was made from, down to each online request."""
    document = {
        "scenario": options.scenario,
        "setting": dataclasses.asdict(scenario),
        "seed": options.seed,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "dtype": fast_dtype()},
        "versions": {name: version(name) for name in ("vllm", "torch", "xllm-plugins")},
        "systems": {
            name: {
                "pooled": dataclasses.asdict(summarize(runs, scenario.slo)),
                "rounds": [dataclasses.asdict(summarize([run], scenario.slo)) for run in runs],
                "online": [_row(record) for run in runs for record in run.of(RequestClass.ONLINE)],
            }
            for name, runs in results.items()
            if runs
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    options = _options(arguments)
    scenario = SCENARIOS[options.scenario]
    if options.ttft_ms or options.tpot_ms:
        slo = Slo(options.ttft_ms or scenario.slo.ttft_ms, options.tpot_ms or scenario.slo.tpot_ms)
        scenario = dataclasses.replace(scenario, slo=slo)
    path = options.json or ROOT / "benchmarks" / "results" / f"colocation-{options.scenario}.json"
    model = prepare_smollm2()
    results: dict[str, list[Run]] = {name: [] for name in options.systems}
    for number in range(options.rounds):
        requests = len(range(number, options.requests, options.rounds))
        shift = number % len(options.systems)  # no system always has the same neighbour
        for name in [*options.systems[shift:], *options.systems[:shift]]:
            label = f"round {number + 1}/{options.rounds} {name}"
            print(f"{label}: starting a server and warming up", flush=True)
            run = measure(
                model,
                SYSTEMS[name],
                scenario,
                requests=requests,
                seed=options.seed * 1000 + number,
                tick=_printer(label, scenario.slo),
            )
            results[name].append(run)
            write_json(path, options, scenario, results)
    print(f"scenario {options.scenario}: {scenario.about}; {fast_dtype()}; records in {path}")
    Console(width=None if sys.stdout.isatty() else 180).print(table(results, scenario.slo))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=400, help="online requests of each system")
    parser.add_argument("--rounds", type=int, default=4, help="rounds that they are spread over")
    parser.add_argument("--scenario", choices=SCENARIOS, default="base")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=DEFAULT)
    parser.add_argument("--ttft-ms", type=float, help="instead of the scenario's")
    parser.add_argument("--tpot-ms", type=float, help="instead of the scenario's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/colocation-SCENARIO")
    options = parser.parse_args(arguments)
    if not 0 < options.rounds <= options.requests:
        parser.error("--rounds must be between 1 and --requests")
    return options


def _printer(label: str, slo: Slo, every_s: float = 15.0) -> Tick:
    last = -every_s

    def tick(now_s: float, window_s: float, records: list[Record]) -> None:
        nonlocal last
        if time.monotonic() - last < every_s:
            return
        last = time.monotonic()
        online = [r for r in records if r.request_class is RequestClass.ONLINE]
        print(
            f"{label}: {now_s:.0f} of {window_s:.0f} s, online {len(online)} done, "
            f"{sum(record.meets(slo) for record in online)} within SLO, "
            f"offline {len(records) - len(online)} done",
            flush=True,
        )

    return tick


def _row(record: Record) -> dict[str, object]:
    return {
        "arrival_s": round(record.arrival_s, 4),
        "ttft_ms": record.ttft_ms,
        "tpot_ms": record.tpot_ms,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "finished": record.finished,
        "error": record.error,
    }


def _share(one: Summary) -> str:
    if one.attainment is None or one.attainment_low is None or one.attainment_high is None:
        return "-"
    return f"{one.attainment:.1%} [{one.attainment_low:.0%}, {one.attainment_high:.0%}]"


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value is not None and base else "-"


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f}"


if __name__ == "__main__":
    main()

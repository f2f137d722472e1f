"""``xllm simulate``: the command line of the virtual cluster."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_plugins.errors import ConfigError, NotAvailableError

if TYPE_CHECKING:
    from xllm_scheduler.simulate.outcomes import Run
    from xllm_scheduler.simulate.scenario import Scenario
    from xllm_scheduler.simulate.sweep import Point

_EVERY_S = 2.0
# Options that are fields of a scenario under the same name.
_FIELDS = (
    "model", "gpu", "tp", "instances", "scheduler", "kv_gib", "routing", "role_policy",
    "link", "seconds", "seed",
)  # fmt: skip


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``simulate``."""
    made = subparsers.add_parser(
        "simulate",
        help="simulate a cluster: attainment, latencies and throughput before it is rented",
        description="Runs vLLM's own scheduler, or ours, on a virtual clock. SCENARIO is a YAML "
        "file; options stand for its fields and count before it. See scheduler/README.md.",
    )
    made.set_defaults(run=run)
    add = made.add_argument
    add("scenario", nargs="?", type=Path, metavar="SCENARIO", help="a YAML file")
    add("--model", help="a directory with config.json, a shipped model or one of a hub")
    add("--gpu", help="a100, h100, h200 or b200")
    add("--tp", type=int, help="GPUs of an instance")
    add("--instances", type=int, help="how many")
    add("--roles", type=_pairs, metavar="ROLE=N,...", help="instances by role: prefill=2,decode=6")
    add("--scheduler", help="elastic, vllm-fcfs, vllm-priority, or the name of a class")
    add("--set", type=_pairs, default={}, metavar="NAME=VALUE,...", help="settings of elastic")
    add("--vllm", type=_pairs, default={}, metavar="NAME=VALUE,...", help="vLLM's arguments")
    add("--kv-gib", type=float, help="KV cache of each GPU; default: what the weights leave")
    add("--profile", type=Path, help="a step-time profile; default: the shipped one")
    add("--routing", help="a routing policy of the router's; default: least_loaded")
    add("--role-policy", help="what changes roles, such as dynamic; default: nothing")
    add("--link", help="nvlink, rdma-400g, ethernet-25g or tcp: what KV travels by")
    add("--trace", type=Path, help="online requests: Mooncake JSONL, Azure or lengths CSV")
    add("--slo", type=_pairs, metavar="ttft=MS,tpot=MS", help="what they are promised")
    add("--rate", type=float, default=1.0, help="times the trace's rate")
    add("--offline-trace", type=Path, help="lengths of an offline backlog")
    add("--outstanding", type=int, help="requests of the backlog at a time; default: 64/instance")
    add("--seconds", type=float, help="end then; default: when all are answered")
    add("--seed", type=int, help="for what is generated")
    add("--sweep", nargs="?", const="", metavar="FIELD=V1,V2,...",
        help="find the highest rate at the attainment, for each value of a field")  # fmt: skip
    add("--attainment", type=float, default=0.9, help="for --sweep")
    add("--compare", nargs=2, metavar=("A", "B"),
        help="two schedulers or two YAML files side by side, with ratios")  # fmt: skip
    add("--json", type=Path, help="write everything, down to each request")
    add("--html", type=Path, help="write a report with plots")


def run(args: argparse.Namespace) -> int:
    """Simulate what the arguments say; the exit status."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from xllm_scheduler.simulate.sweep import highest_rate
        from xllm_scheduler.simulate.table import as_text, ratios
    except ModuleNotFoundError as error:
        raise NotAvailableError(
            f"xllm simulate needs {error.name}; pip install 'xllm-plugins[simulate]' brings it."
        ) from error

    made = _variants(args)
    runs: dict[str, Run] = {}
    sweeps: dict[str, list[Point]] = {}
    for name, scenario in made.items():
        if args.sweep is None:
            runs[name] = scenario.run(_Printer(name, scenario))
            continue

        def summary(factor: float, name: str = name, scenario: Scenario = scenario) -> Any:
            printer = _Printer(f"{name}, rate x{factor:g}", scenario)
            runs[name] = scenario.at_rate(factor).run(printer)
            return runs[name].summary()

        best, sweeps[name] = highest_rate(summary, attainment=args.attainment)
        rates = {p.factor: p.summary.online / p.summary.seconds for p in sweeps[name]}
        print(
            f"{name}: {args.attainment:.0%} attainment up to x{best:.3g}"
            + (f", {rates[best]:.3f} requests/s" if best else "")
        )
    first = next(iter(made.values()))
    print(f"step times: {first.step_times().name}, {first.step_times().origin}")
    summaries = {name: one.summary() for name, one in runs.items()}
    print(as_text(summaries))
    if len(summaries) == 2:
        (name, before), (other, after) = summaries.items()
        for what, ratio in ratios(before, after).items():
            print(f"{what}: {other} has {ratio:.3f} times that of {name}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(_document(made, runs, sweeps), indent=1) + "\n", "utf-8")
    if args.html:
        from xllm_scheduler.simulate.report import page

        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(page(f"Simulation of {first.model}", runs, sweeps), "utf-8")
    return 0


def _variants(args: argparse.Namespace) -> dict[str, Scenario]:
    """What is simulated, by name."""
    if args.compare:
        return {name: _scenario(args, name) for name in args.compare}
    if args.sweep:
        field, _, values = args.sweep.partition("=")
        if not values:
            raise ConfigError(f"--sweep is {args.sweep!r}; allowed is FIELD=V1,V2,...")
        made = {}
        for text in values.split(","):
            fields: dict[str, Any] = {}
            part, _, name = field.rpartition(".")
            if part:
                fields[part] = {name: _value(text)}
            else:
                fields[name] = _value(text)
            made[f"{field}={text}"] = _scenario(args, fields=fields)
        return made
    scenario = _scenario(args)
    return {scenario.scheduler: scenario}


def _scenario(
    args: argparse.Namespace, variant: str = "", fields: Mapping[str, Any] | None = None
) -> Scenario:
    """From the file, if there is one, and the options."""
    import yaml

    from xllm_scheduler.simulate.scenario import parse_scenario

    path = args.scenario
    if variant.endswith((".yaml", ".yml")):
        path, variant = Path(variant), ""
    document: Any = {}
    if path is not None:
        try:
            document = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"The scenario {path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"The scenario {path} holds no fields.")
    for name in _FIELDS:
        if getattr(args, name) is not None:
            document[name] = getattr(args, name)
    if args.roles:
        document |= {"roles": args.roles, "instances": sum(args.roles.values())}
    if args.profile:
        document["profile"] = args.profile.absolute()
    if args.trace or args.offline_trace:
        document["streams"] = _streams(args, document)
    if variant:
        document["scheduler"] = variant
    document["settings"] = {**(document.get("settings") or {}), **args.set}
    document["vllm"] = {**(document.get("vllm") or {}), **args.vllm}
    for name, value in (fields or {}).items():
        document[name] = {**document[name], **value} if isinstance(value, dict) else value
    if document.get("scheduler", "elastic") != "elastic":
        document["settings"] = {}
    return parse_scenario(document, str(path or "xllm simulate"), path.parent if path else Path())


def _streams(args: argparse.Namespace, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    streams: list[dict[str, Any]] = []
    if args.trace:
        slo = args.slo or {}
        for name in slo:
            if name not in ("ttft", "tpot"):
                raise ConfigError(f"--slo names {name!r}; allowed are ttft and tpot.")
        if set(slo) != {"ttft", "tpot"}:
            raise ConfigError("--slo is missing or half; allowed is ttft=MS,tpot=MS.")
        streams.append(
            {
                "name": "online",
                "slo": {"ttft_ms": slo["ttft"], "tpot_ms": slo["tpot"]},
                "trace": str(args.trace.absolute()),
                "rate": args.rate,
            }
        )
    if args.offline_trace:
        streams.append(
            {
                "name": "offline",
                "class": "offline",
                "trace": str(args.offline_trace.absolute()),
                "outstanding": args.outstanding or 64 * int(document.get("instances", 1)),
            }
        )
    return streams


def _pairs(text: str) -> dict[str, Any]:
    made = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part!r} is not NAME=VALUE")
        made[name.strip()] = _value(value.strip())
    return made


def _value(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


class _Printer:
    """Says now and then how far a run is."""

    def __init__(self, name: str, scenario: Scenario) -> None:
        self._name, self._seconds = name, scenario.seconds
        self._last = time.monotonic()

    def __call__(self, now_s: float, finished: int) -> None:
        if time.monotonic() - self._last < _EVERY_S:
            return
        self._last = time.monotonic()
        of = f" of {self._seconds:g}" if self._seconds else ""
        print(f"{self._name}: {now_s:.0f}{of} s, {finished} requests done", file=sys.stderr)


def _document(
    made: Mapping[str, Scenario],
    runs: Mapping[str, Run],
    sweeps: Mapping[str, Sequence[Point]],
) -> Any:
    return _plain(
        {
            name: {
                "scenario": made[name].model_dump(mode="json", by_alias=True),
                "step_times": made[name].step_times().document(),
                "summary": dataclasses.asdict(run.summary()),
                "sweep": [dataclasses.asdict(point) for point in sweeps.get(name, ())],
                "run": dataclasses.asdict(run),
            }
            for name, run in runs.items()
        }
    )


def _plain(value: Any) -> Any:
    """JSON knows neither infinity nor NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

"""``xllm eplb``: loads of experts recorded from a server, planned again offline, and drawn."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xllm_eplb.config import EplbSection
from xllm_eplb.phases import PHASES
from xllm_eplb.replay import WANTED, Rule, Score, ours, replayed, untouched
from xllm_eplb.trace import Window, lines_of, read_trace
from xllm_plugins.config import Source, resolve
from xllm_plugins.errors import ConfigError, NotAvailableError

LOADS_PATH, WINDOWS_PATH = "/xllm/v1/eplb/loads", "/xllm/v1/eplb/windows"
_POLL_S = 2.0


def add_command(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``xllm eplb record``, ``replay`` and ``plot``."""
    made = subparsers.add_parser("eplb", help="loads of experts: record, replay, plot")
    actions = made.add_subparsers(title="actions", required=True, metavar="ACTION")
    record = actions.add_parser("record", help="write the loads that a server's EPLB plans from")
    record.add_argument("url", help="of the server, http://127.0.0.1:8000 for example")
    record.add_argument("file", type=Path, help="to append to")
    record.add_argument("--seconds", type=float, default=600.0, help="how long (%(default)s)")
    record.set_defaults(run=_record)
    replay = actions.add_parser("replay", help="plan recorded loads again, by several rules")
    replay.add_argument("file", type=Path)
    replay.add_argument(
        "--ours", action="append", default=[], metavar="KEY=VALUE,...",
        help="our policy with these settings of the section eplb; may be given several times",
    )  # fmt: skip
    replay.add_argument("--json", type=Path, help="where the figures go as well")
    replay.set_defaults(run=_replay)
    plot = actions.add_parser("plot", help="draw the load of devices, and moves against balance")
    plot.add_argument("file", type=Path)
    plot.add_argument("picture", type=Path, help="a file whose name ends with .svg, .png or .pdf")
    plot.set_defaults(run=_plot)


def _record(args: argparse.Namespace) -> int:
    after, end = 0, time.monotonic() + args.seconds
    with args.file.open("a", encoding="utf-8") as out:
        while True:
            windows = _fetched(args.url, after)
            out.writelines(lines_of(windows))
            out.flush()
            after = max((int(one["plan"]) for one in windows), default=after)
            if time.monotonic() + _POLL_S > end:
                break
            time.sleep(_POLL_S)
    print(f"{args.file}: up to plan {after}")
    return 0


def _fetched(url: str, after: int) -> list[Mapping[str, Any]]:
    address = f"{url.rstrip('/')}{WINDOWS_PATH}?after={after}"
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"The server is {url!r}; allowed is an address with http:// or https://.")
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:  # noqa: S310 - checked above
            found: list[Mapping[str, Any]] = json.load(answer)["windows"]
            return found
    except (OSError, urllib.error.HTTPError, ValueError, KeyError) as error:
        raise NotAvailableError(
            f"{address} gives no loads: {error}; it takes vllm serve --plugins xllm --enable-eplb."
        ) from error


def rules_of(windows: list[Window], variants: list[str]) -> dict[str, Rule]:
    """The rules to compare, by name; vLLM's own where it is installed.

    Raises:
        ConfigError: a variant has an unknown key, or a wrong value.
    """
    rules: dict[str, Rule] = {"none": untouched}
    if importlib.util.find_spec("vllm") is not None:
        from xllm_plugins.compat.eplb_policy import default_plan

        def default(window: Window, current: Any) -> Any:
            return default_plan(window.load, current, asdict(window.topology))

        rules["vllm's default"] = default
    for variant in ["", *variants]:
        section = _section(variant)
        rules[f"ours {variant}".rstrip()] = ours(section.rules(), windows[0], section.phase)
    return rules


def _section(variant: str) -> EplbSection:
    values: dict[str, Any] = {}
    for key, _, text in (pair.partition("=") for pair in variant.split(",") if pair):
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text  # a name
    source = Source("--ours", {"eplb": values})
    section: EplbSection = resolve({"eplb": EplbSection}, [source]).sections["eplb"]
    return section


def _replay(args: argparse.Namespace) -> int:
    windows = read_trace(args.file)
    rules = rules_of(windows, args.ours)
    found = {name: replayed(windows, rule, time.perf_counter) for name, rule in rules.items()}
    shape, topology = windows[0].load.shape, windows[0].topology
    print(
        f"{len(windows)} windows of {shape[0]} layers, {shape[1]} experts on "
        f"{topology.devices} devices with {topology.slots} slots; each plan on the next window:"
    )
    width = max(map(len, found))
    phases = [phase for phase in PHASES if phase.value in found["none"].phases]
    heads = "".join(f"  {phase.value:>8}" for phase in phases)
    print(f"{'rule':{width}}  max/mean{heads}  moved/plan  ms/plan")
    for name, one in found.items():
        apart = "".join(f"  {one.phases[phase.value]:8.4f}" for phase in phases)
        print(f"{name:{width}}  {one.balance:8.4f}{apart}  {one.moves:10.2%}  {one.plan_ms:7.1f}")
    if args.json:
        args.json.write_text(json.dumps({n: asdict(s) for n, s in found.items()}, indent=1) + "\n")
    return 0


def _plot(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise NotAvailableError("Pictures need matplotlib: pip install 'xllm-plugins[simulate]'.")
    from xllm_eplb.picture import draw

    windows = read_trace(args.file)
    frontier: dict[float, Score] = {
        wanted: replayed(
            windows, ours(EplbSection(wanted=wanted).rules(), windows[0]), time.perf_counter
        )
        for wanted in WANTED
    }
    others = {
        name: replayed(windows, rule, time.perf_counter)
        for name, rule in rules_of(windows, []).items()
        if name != "ours"
    }
    draw(windows, frontier, others, args.picture)
    print(args.picture)
    return 0

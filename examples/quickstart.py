"""Serves a small real model with the plugins, tries it, and goes on serving until Ctrl-C.

make run                 # or: make run ARGS="--once --seconds 30"
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.lab.load import Load, run_load
from benchmarks.lab.model import prepare_smollm2
from benchmarks.lab.results import Percentiles, Record, RequestClass, Slo, Summary, summarize
from benchmarks.lab.server import Server, free_port, log_tail, serve
from benchmarks.lab.workload import OfflineLoad, OnlineLoad

QUESTION = "What is the capital of France?"
ONLINE_RATE = 0.5
OFFLINE = {"vllm_xargs": {"xllm_class": "offline"}}
SLO = Slo(ttft_ms=1500, tpot_ms=120)
CONFIG = {"scheduler": {"ttft_ms": SLO.ttft_ms, "tpot_ms": SLO.tpot_ms}}
ARGS = ["--plugins", "xllm", "--xllm-config", json.dumps(CONFIG), "--enforce-eager"]

console = Console(highlight=False)


def main() -> None:
    """Runs the example."""
    options = _options()
    model = prepare_smollm2()
    port = options.port or free_port(preferred=8000)
    try:
        with console.status("starting") as status:
            show = _Display(status.update)
            with serve(
                model,
                args=[*ARGS, "--max-model-len", "4096"],
                port=port,
                progress=lambda elapsed_s, line: show(f"vllm serve: {elapsed_s:.0f} s  {line}"),
            ) as server:
                console.print(f"vllm serve --plugins xllm is up after {server.startup_s:.0f} s")
                console.print(f"[bold]{QUESTION}[/bold]  {server.ask(QUESTION)}")
                console.print(_table(_mix(server, options.seconds, show)))
                if not options.once:
                    status.stop()
                    _serve_on(server)
    except KeyboardInterrupt:
        console.print("stopped")


def _mix(server: Server, seconds: int, show: _Display) -> Summary:
    """Online chat and an offline batch together."""

    def tick(now_s: float, window_s: float, records: list[Record]) -> None:
        online = sum(record.request_class is RequestClass.ONLINE for record in records)
        show(
            f"online chat beside an offline batch: {min(max(now_s, 0), window_s):.0f} of "
            f"{window_s:.0f} s, "
            f"{online} online and {len(records) - online} offline answers"
        )

    chat = OnlineLoad(requests=max(1, round(seconds * ONLINE_RATE)), rate=ONLINE_RATE)
    load = Load(chat, OfflineLoad(clients=16), settle_s=10.0, drain_s=30.0)
    run = run_load(server.url, server.model, load, seed=0, offline_fields=OFFLINE, tick=tick)
    return summarize([run], SLO)


def _table(summary: Summary) -> Table:
    made = Table(title="online chat beside an offline batch", show_header=False)
    made.add_row("online requests", str(summary.online_n))
    made.add_row(
        f"met TTFT {SLO.ttft_ms / 1e3:g} s and TPOT {SLO.tpot_ms:g} ms",
        "-" if summary.attainment is None else f"{summary.attainment:.0%}",
    )
    made.add_row("time to first token, p50 / p90", _milliseconds(summary.ttft_ms))
    made.add_row("time of each further token, p50 / p90", _milliseconds(summary.tpot_ms))
    made.add_row("offline output", f"{summary.offline_output_tok_s:.1f} tokens/s")
    made.add_row("offline, prompts included", f"{summary.offline_total_tok_s:.1f} tokens/s")
    return made


def _milliseconds(values: Percentiles) -> str:
    if values.p50 is None or values.p90 is None:
        return "-"
    return f"{values.p50:.0f} / {values.p90:.0f} ms"


def _serve_on(server: Server) -> None:
    body = json.dumps(
        {"model": server.model, "messages": [{"role": "user", "content": QUESTION}], **OFFLINE}
    )
    console.print(f"serving on {server.url} until Ctrl-C; an offline request:\n")
    console.print(
        f"curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n",
        soft_wrap=True,
        markup=False,
    )
    while server.healthy():
        time.sleep(2)
    raise SystemExit(f"the server stopped; the end of its log:\n{log_tail(server.log_path)}")


class _Display:
    """One changing line on a terminal, elsewhere a line every ten seconds."""

    def __init__(self, update: Callable[[str], None]) -> None:
        self._update = update
        self._next_s = 0.0

    def __call__(self, text: str) -> None:
        if console.is_terminal:
            self._update(escape(text[: console.width - 4]))
        elif time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + 10
            console.print(text, markup=False, soft_wrap=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serves a small real model with the plugins.")
    parser.add_argument("--once", action="store_true", help="end after the measurement")
    parser.add_argument("--seconds", type=int, default=60, help="how long the load runs")
    parser.add_argument("--port", type=int, help="default: 8000, or a free one if that is taken")
    return parser.parse_args()


if __name__ == "__main__":
    main()

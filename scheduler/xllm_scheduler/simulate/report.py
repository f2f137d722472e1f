"""One HTML file with the plots of a simulation; it needs nothing but a browser."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.patches import Patch

from xllm_scheduler.simulate.outcomes import Run
from xllm_scheduler.simulate.sweep import Point
from xllm_scheduler.simulate.table import figures
from xllm_scheduler.simulate.workload import Slo

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "xllm",  # the same picture, the same bytes
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)
if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROLE_COLOURS = {"prefill": "#d95f02", "decode": "#1b9e77", "mixed": "#7570b3", "lost": "#bbbbbb"}
_MOST_INSTANCES = 16  # drawn
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem;
       color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; color: #555 }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5rem 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
"""


def page(title: str, runs: Mapping[str, Run], sweeps: Mapping[str, Sequence[Point]]) -> str:
    """The whole file.

    Args:
        title: what was simulated.
        runs: by name; those that are compared stand side by side.
        sweeps: rates that were tried, by name; empty without a sweep.
    """
    parts = [_table({name: figures(run.summary()) for name, run in runs.items()})]
    if any(len(points) > 1 for points in sweeps.values()):
        parts.append(_figure(_rates(sweeps), "Attainment and goodput against the rate"))
    if any(o.online for run in runs.values() for o in run.outcomes):
        parts.append(_figure(_latencies(runs), "TTFT and TPOT of online requests"))
    for name, run in runs.items():
        parts.append(_figure(_timelines(run), f"{name}: the instances over time"))
        if run.events:
            rows = "".join(
                f"<tr><td>{at_s:.3f}</td><td>{html.escape(what)}</td></tr>"
                for at_s, what in run.events
            )
            parts.append(f"<table><caption>{html.escape(name)}: events</caption>{rows}</table>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _table(columns: Mapping[str, Mapping[str, str]]) -> str:
    names = list(dict.fromkeys(name for shown in columns.values() for name in shown))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{shown.get(name, '-')}</td>" for shown in columns.values())
        + "</tr>"
        for name in names
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _figure(figure: Figure, caption: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    name = html.escape(caption)
    return f"<figure role='img' aria-label='{name}'>{svg}<figcaption>{name}</figcaption></figure>"


def _axes(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _rates(sweeps: Mapping[str, Sequence[Point]]) -> Figure:
    figure, axes = _axes(1, 2, 3.2)
    for name, points in sweeps.items():
        rates = [p.summary.online / p.summary.seconds for p in points]
        axes[0][0].plot(rates, [p.summary.attainment for p in points], "o-", label=name)
        axes[0][1].plot(rates, [p.summary.goodput_s for p in points], "o-", label=name)
    axes[0][0].set(xlabel="requests/s", ylabel="attainment", ylim=(0, 1.03))
    axes[0][1].set(xlabel="requests/s", ylabel="goodput, requests/s", ylim=(0, None))
    axes[0][0].legend()
    return figure


def _latencies(runs: Mapping[str, Run]) -> Figure:
    figure, axes = _axes(1, 2, 3.2)
    slos: set[Slo] = set()
    for name, run in runs.items():
        online = [o for o in run.outcomes if o.online]
        slos |= {o.slo for o in online}
        for axis, values in (
            (axes[0][0], [o.ttft_ms for o in online]),
            (axes[0][1], [o.tpot_ms for o in online]),
        ):
            there = sorted(v for v in values if v)
            share = np.arange(1, len(there) + 1) / max(1, len(values))
            axis.step(there, share, where="post", label=name)
    for axis, label, limits in (
        (axes[0][0], "TTFT, ms", [slo.ttft_ms for slo in slos]),
        (axes[0][1], "TPOT, ms", [slo.tpot_ms for slo in slos]),
    ):
        for limit in sorted(x for x in limits if x < math.inf):
            axis.axvline(limit, color="#999999", linestyle="--", linewidth=1)
        axis.set(xlabel=label, ylabel="share of requests", ylim=(0, 1.03))
        axis.set_xscale("log")
    axes[0][0].legend()
    return figure


def _timelines(run: Run) -> Figure:
    names = sorted({s.instance for s in run.samples}, key=lambda name: (len(name), name))
    names = names[:_MOST_INSTANCES]
    figure, axes = _axes(len(names), 3, 1.3 * len(names) + 0.6)
    for row, name in enumerate(names):
        samples = [s for s in run.samples if s.instance == name]
        at_s = [s.at_s for s in samples]
        queue, kv, share = axes[row]
        queue.plot(at_s, [s.running for s in samples], label="running", linewidth=1)
        queue.plot(at_s, [s.waiting for s in samples], label="waiting", linewidth=1)
        kv.fill_between(at_s, [s.kv_used for s in samples], step="post", alpha=0.5)
        share.fill_between(at_s, [s.offline_share for s in samples], step="post", alpha=0.5)
        for earlier, later in pairwise(samples):
            colour = _ROLE_COLOURS[earlier.role]
            queue.axvspan(earlier.at_s, later.at_s, color=colour, alpha=0.08, linewidth=0)
        queue.set_ylabel(name)
        kv.set_ylim(0, 1)
        share.set_ylim(0, 1)
    for axis, label in zip(
        axes[0],
        ("requests, and role", "KV cache used", "offline share of tokens"),
        strict=True,
    ):
        axis.set_title(label, fontsize=9)
    roles = [role for role in _ROLE_COLOURS if any(s.role == role for s in run.samples)]
    patches = [Patch(color=_ROLE_COLOURS[role], alpha=0.3, label=role) for role in roles]
    lines = axes[0][0].get_legend_handles_labels()[0]
    axes[0][0].legend(handles=[*lines, *patches], loc="upper right", fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("s")
    return figure

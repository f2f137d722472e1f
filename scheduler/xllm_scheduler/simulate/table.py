"""A run's figures as text."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xllm_scheduler.simulate.outcomes import Summary

_COMPARED = ("attainment", "goodput_s", "online_tokens_s", "offline_total_tokens_s")


def figures(summary: Summary) -> dict[str, str]:
    """A run's figures, by what they are."""
    shown = {}
    if summary.online:
        ttft, tpot = summary.ttft_ms, summary.tpot_ms
        shown = {
            "online requests": f"{summary.online}",
            "attainment": f"{summary.attainment:.1%}",
            "goodput, requests/s": f"{summary.goodput_s:.3f}",
            "TTFT p50 / p90 / p99, ms": f"{ttft.p50:.0f} / {ttft.p90:.0f} / {ttft.p99:.0f}",
            "TPOT p50 / p90 / p99, ms": f"{tpot.p50:.1f} / {tpot.p90:.1f} / {tpot.p99:.1f}",
            "online tokens/s": f"{summary.online_tokens_s:.1f}",
        }
    if summary.offline_total_tokens_s:
        shown |= {
            "offline requests finished": f"{summary.offline_finished}",
            "offline tokens/s": f"{summary.offline_tokens_s:.1f}",
            "offline tokens/s with prompts": f"{summary.offline_total_tokens_s:.1f}",
            "longest offline wait, s": f"{summary.longest_offline_wait_s:.1f}",
        }
    return shown | {
        "prompt tokens from caches": f"{summary.cached_share:.1%}",
        "virtual seconds": f"{summary.seconds:.1f}",
    }


def ratios(first: Summary, second: Summary) -> dict[str, float]:
    """The second's figures over the first's; those without a meaning are left out."""
    found = {}
    for name in _COMPARED:
        below, above = getattr(first, name), getattr(second, name)
        if below and not math.isnan(below):
            found[name.removesuffix("_s").replace("_", " ")] = above / below
    return found


def as_text(summaries: Mapping[str, Summary]) -> str:
    """A column for each run, aligned."""
    columns = {name: figures(summary) for name, summary in summaries.items()}
    rows = [["", *columns]]
    for name in dict.fromkeys(n for shown in columns.values() for n in shown):
        rows.append([name, *(shown.get(name, "-") for shown in columns.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    )

"""What the dashboard asks Prometheus for, and what servers export."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser

PATH = Path(__file__).resolve().parents[2] / "examples/deploy/grafana/dashboards/xllm.json"
DASHBOARD: dict[str, Any] = json.loads(PATH.read_text())
# What Grafana puts in place of its variables.
VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$ttft_slo": "2", "$tpot_slo": "0.1"}


class Asked(NamedTuple):
    """One metric of a query, with the labels that the query names beside it."""

    metric: str
    labels: frozenset[str]


def queries() -> list[str]:
    """Every query, as Prometheus gets it."""
    found = [t["expr"] for panel in DASHBOARD["panels"] for t in panel.get("targets", ())]
    for one in DASHBOARD["templating"]["list"]:
        if one["type"] == "query":
            name, label = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", one["query"]).groups()  # type: ignore[union-attr]
            found.append(f"sum by ({label}) ({name})")
    return [_filled(text) for text in found]


def _filled(text: str) -> str:
    for variable, value in VARIABLES.items():
        text = text.replace(variable, value)
    return text


def asked(query: str) -> Iterator[Asked]:
    """What one query reads.

    Raises:
        ValueError: it is not PromQL.
    """
    yield from _read(promql_parser.parse(query), frozenset())


def _read(expr: Any, labels: frozenset[str]) -> Iterator[Asked]:
    """What lies under an expression; ``labels`` are those that aggregations around it keep."""
    if isinstance(expr, promql_parser.VectorSelector):
        matched = {one.name for one in expr.matchers.matchers}
        yield Asked(str(expr.name), labels | matched)
    elif isinstance(expr, promql_parser.MatrixSelector):
        yield from _read(expr.vector_selector, labels)
    elif isinstance(expr, promql_parser.AggregateExpr):
        yield from _read(expr.expr, labels | set(expr.modifier.labels if expr.modifier else ()))
    elif isinstance(expr, promql_parser.BinaryExpr):
        yield from _read(expr.lhs, labels)
        yield from _read(expr.rhs, labels)
    elif isinstance(expr, promql_parser.Call):
        for argument in expr.args:
            yield from _read(argument, labels)
    elif isinstance(expr, promql_parser.ParenExpr):
        yield from _read(expr.expr, labels)
    else:
        assert isinstance(expr, promql_parser.NumberLiteral), type(expr)


def exported(exposition: str) -> set[str]:
    """The names of the series that a server's metrics have, or have once something is counted."""
    found: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", exposition, re.MULTILINE):
        parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found.update(name + part for part in parts)
    return found

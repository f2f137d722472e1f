"""The dashboard: its queries are PromQL over metrics that are declared, with labels that they have.

That servers really export them is looked at in tests/serve/test_router.py.
"""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
from prometheus_client import generate_latest

from tests.deploy.dashboard import DASHBOARD, PATH, VARIABLES, asked, exported, queries
from xllm_plugins.manager import registry
from xllm_plugins.metrics import PREFIX
from xllm_scheduler.service.seen import Seen

PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
ADDED = {"instance", "job"}  # by Prometheus; a metric's own become exported_instance


def declared() -> dict[str, set[str]]:
    """The labels of every metric of ours, by the name of its series."""
    found: dict[str, set[str]] = {}
    for feature in registry().features().values():
        for metric in feature.metrics:
            total = "_total" if metric.kind == "counter" else ""
            found[f"{PREFIX}{metric.name}{total}"] = {"engine", *metric.labels}
    seen = Seen()
    collectors: dict[str, Any] = seen.registry._names_to_collectors
    for name in exported(generate_latest(seen.registry).decode()):
        base = re.sub(r"_(total|bucket|sum|count|created)$", "", name)
        found[name] = {*collectors[base]._labelnames, *({"le"} if name.endswith("_bucket") else ())}
    return found


@pytest.mark.parametrize("query", queries())
def test_every_query_reads_metrics_and_labels_that_exist(query: str) -> None:
    known = declared()
    read = list(asked(query))
    assert read or query.startswith("vector(")
    for metric, labels in read:
        if metric.startswith("vllm:"):
            continue
        assert metric in known
        own = {f"exported_{label}" if label in ADDED else label for label in known[metric]}
        assert labels <= own | ADDED


def test_counters_are_read_as_rates_and_only_they() -> None:
    for query in queries():
        for metric, _ in asked(query):
            counts = metric.endswith(("_total", "_bucket")) or metric == "xllm:router_index_changes"
            rated = f"rate({metric}" in query or f"sum by (instance) ({metric})" in query
            assert rated == counts, query


def test_every_legend_names_labels_that_its_query_keeps() -> None:
    for panel in PANELS:
        for target in panel.get("targets", ()):
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in
                    re.split(r",\s*", group)}  # fmt: skip
            assert named <= (kept or ADDED), (panel["title"], target["legendFormat"])


def test_everything_that_was_asked_for_has_a_panel() -> None:
    text = " ".join(queries())
    for metric in (
        "router_ttft_seconds", "router_tpot_seconds", "router_slo_met", "router_instances",
        "scheduler_attainment_ratio", "scheduler_requests_waiting", "kv_won_tokens",
        "spec_decode_accepted", "eplb_measured", "router_refused", "router_failed", "router_moved",
    ):  # fmt: skip
        assert PREFIX + metric in text


def test_its_variables_are_those_that_are_used() -> None:
    used = {*re.findall(r"\$(?!__)\{?(\w+)", PATH.read_text())}
    assert used == {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert {name for name in VARIABLES if not name.startswith("$__")} | {"$datasource"} == {
        f"${name}" for name in used
    }


def test_panels_have_a_place_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y

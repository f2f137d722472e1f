"""Samples of engines become Prometheus metrics; status travels in plain types."""

from __future__ import annotations

import json

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from xllm_plugins import status
from xllm_plugins.errors import XllmError
from xllm_plugins.metrics import Exporter, Metric, Sample

METRICS = (
    Metric("loaves", "counter", "Loaves baked.", ("kind",)),
    Metric("heat", "gauge", "Degrees."),
)


@pytest.fixture
def collected() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def exporter(collected: CollectorRegistry) -> Exporter:
    return Exporter(METRICS, collected)


def loaves(collected: CollectorRegistry, engine: int, kind: str = "rye") -> float | None:
    return collected.get_sample_value("xllm:loaves_total", {"engine": str(engine), "kind": kind})


def test_a_counter_shows_the_engines_sum_however_often_it_is_read(
    exporter: Exporter, collected: CollectorRegistry
) -> None:
    for value in (3, 3, 5):
        exporter.update(0, [Sample("loaves", value, ("rye",))])
    assert loaves(collected, 0) == 5


def test_a_counter_goes_on_where_an_engine_restarts_from_zero(
    exporter: Exporter, collected: CollectorRegistry
) -> None:
    for value in (5, 2, 4):
        exporter.update(0, [Sample("loaves", value, ("rye",))])
    assert loaves(collected, 0) == 5 + 4


def test_engines_and_label_values_are_counted_apart(
    exporter: Exporter, collected: CollectorRegistry
) -> None:
    exporter.update(0, [Sample("loaves", 1, ("rye",)), Sample("loaves", 2, ("oat",))])
    exporter.update(1, [Sample("loaves", 4, ("rye",))])
    assert [loaves(collected, 0), loaves(collected, 0, "oat"), loaves(collected, 1)] == [1, 2, 4]


def test_a_gauge_shows_the_latest_value(exporter: Exporter, collected: CollectorRegistry) -> None:
    for value in (200.0, 180.0):
        exporter.update(0, [Sample("heat", value)])
    assert collected.get_sample_value("xllm:heat", {"engine": "0"}) == 180.0


def test_a_declared_metric_is_listed_before_its_first_sample(
    exporter: Exporter, collected: CollectorRegistry
) -> None:
    assert "# HELP xllm:loaves_total Loaves baked." in generate_latest(collected).decode()


def test_a_sample_of_no_declared_metric_is_an_error(exporter: Exporter) -> None:
    with pytest.raises(XllmError, match="'crumbs' belongs to no declared metric"):
        exporter.update(0, [Sample("crumbs", 1)])


def test_one_name_cannot_be_exported_twice(
    exporter: Exporter, collected: CollectorRegistry
) -> None:
    with pytest.raises(ValueError, match="Duplicated"):
        Exporter([Metric("loaves", "counter", "Again.")], collected)


@pytest.fixture
def _reporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_reporters", {})
    samples = (Sample("loaves", 2, ("rye",)), Sample("heat", 180.5))
    status.register_reporter("oven", lambda: status.Report(samples, {"door": "shut"}))
    status.register_reporter("hob", lambda: status.Report())


@pytest.mark.usefixtures("_reporter")
def test_status_survives_the_way_to_the_api_server() -> None:
    travelled = json.loads(json.dumps(status.engine_status()))
    assert travelled["oven"]["facts"] == {"door": "shut"}
    assert travelled["hob"] == {"samples": [], "facts": {}}
    assert status.samples_of(travelled) == [Sample("loaves", 2, ("rye",)), Sample("heat", 180.5)]

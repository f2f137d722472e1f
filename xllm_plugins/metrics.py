"""Metrics under ``xllm:`` on vLLM's own ``/metrics``: their declaration and their registration.

A feature declares its metrics as data. The engine process reports plain samples; one API server
process turns them into Prometheus metrics, so that several API servers never count twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from xllm_plugins.errors import XllmError

PREFIX = "xllm:"


@dataclass(frozen=True)
class Metric:
    """One metric: ``name`` without the prefix, what it counts, and its labels."""

    name: str
    kind: Literal["counter", "gauge"]
    doc: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """The value of one metric at one engine. A counter's value is the sum since start."""

    name: str
    value: float
    labels: tuple[str, ...] = ()


class Exporter:
    """Prometheus metrics for the declared ones, fed with samples by engine index."""

    def __init__(self, metrics: Iterable[Metric], registry: CollectorRegistry = REGISTRY) -> None:
        self._metrics: dict[str, Counter | Gauge] = {}
        self._seen: dict[tuple[int, str, tuple[str, ...]], float] = {}
        for metric in metrics:
            name, labels = PREFIX + metric.name, ("engine", *metric.labels)
            if metric.kind == "counter":
                self._metrics[metric.name] = Counter(name, metric.doc, labels, registry=registry)
            else:
                self._metrics[metric.name] = Gauge(
                    name, metric.doc, labels, registry=registry, multiprocess_mode="mostrecent"
                )

    def update(self, engine: int, samples: Iterable[Sample]) -> None:
        """Take the latest samples of one engine.

        Raises:
            XllmError: a sample of a metric that was not declared.
        """
        for sample in samples:
            metric = self._metrics.get(sample.name)
            if metric is None:
                raise XllmError(f"The sample {sample.name!r} belongs to no declared metric.")
            child = metric.labels(str(engine), *sample.labels)
            if isinstance(child, Gauge):
                child.set(sample.value)
                continue
            key = (engine, sample.name, sample.labels)
            # A value below the last one means that the engine restarted and counts from zero.
            last = self._seen.get(key, 0.0)
            child.inc(sample.value - last if sample.value >= last else sample.value)
            self._seen[key] = sample.value

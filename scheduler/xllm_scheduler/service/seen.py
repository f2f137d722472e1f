"""What the router saw happen: its metrics, and the recent latencies that the console shows."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from xllm_scheduler.classes import Service, ServiceClass
from xllm_scheduler.service.fleet import Fleet

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0)
_RECENT = 500
_PREFIX = "xllm:router_"


class Seen:
    """See the module.

    Attributes:
        registry: of Prometheus.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        kind = ("class",)
        self._finished = Counter(
            f"{_PREFIX}finished", "Requests answered in full.", kind, registry=own
        )
        self._met = Counter(
            f"{_PREFIX}slo_met", "Of online ones, in time by both SLOs.", registry=own
        )
        self._refused = Counter(f"{_PREFIX}refused", "Requests refused.", ("status",), registry=own)
        self._failed = Counter(
            f"{_PREFIX}failed", "Attempts that an instance failed.", ("instance",), registry=own
        )
        self._moved = Counter(f"{_PREFIX}moved", "Answers that went on elsewhere.", registry=own)
        self._gone = Counter(
            f"{_PREFIX}gone", "Clients that went before the end.", kind, registry=own
        )
        self._ttft = Histogram(
            f"{_PREFIX}ttft_seconds", "To the first token.", kind, buckets=_SECONDS, registry=own
        )
        self._tpot = Histogram(
            f"{_PREFIX}tpot_seconds",
            "Per token after it.",
            kind,
            buckets=_TOKEN_SECONDS,
            registry=own,
        )
        self._instances = Gauge(
            f"{_PREFIX}instances", "Instances.", ("role", "health"), registry=own
        )
        self._blocks = Gauge(f"{_PREFIX}index_blocks", "KV blocks in the index.", registry=own)
        self._index = Gauge(
            f"{_PREFIX}index_changes", "What became of blocks that events named.", ("what",),
            registry=own,
        )  # fmt: skip
        self._hits = Gauge(
            f"{_PREFIX}hit_ratio", "Share of prompts found in the index.", registry=own
        )
        self._hit_tokens = Gauge(
            f"{_PREFIX}hit_tokens",
            "Prompt tokens expected in a cache; of these not there; there and not expected.",
            ("what",), registry=own,
        )  # fmt: skip
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)  # for the console

    def refused(self, status: int) -> None:
        """A request got an error."""
        self._refused.labels(str(status)).inc()

    def failed(self, instance: str) -> None:
        """An instance has failed a request."""
        self._failed.labels(instance).inc()

    def moved(self) -> None:
        """An answer goes on elsewhere."""
        self._moved.inc()

    def gone(self, online: bool) -> None:
        """A client has gone."""
        kind = ServiceClass.ONLINE if online else ServiceClass.OFFLINE
        self._gone.labels(kind.value).inc()

    def finished(
        self, service: Service, began_s: float, first_s: float | None, tokens: int
    ) -> None:
        """A request was answered; without its first token's time only counted."""
        kind = service.kind.value
        self._finished.labels(kind).inc()
        if first_s is None:
            return
        ttft_s = first_s - began_s
        tpot_s = (time.monotonic() - first_s) / max(1, tokens - 1) if tokens > 1 else 0.0
        self._ttft.labels(kind).observe(ttft_s)
        if tokens > 1:
            self._tpot.labels(kind).observe(tpot_s)
        met = ttft_s * 1e3 <= service.ttft_ms and tpot_s * 1e3 <= service.tpot_ms
        if service.online and met:
            self._met.inc()
        made = {"at_s": time.time(), "class": kind, "ttft_s": ttft_s, "tpot_s": tpot_s, "met": met}
        if service.online:
            slos = {"ttft_slo_s": service.ttft_ms / 1e3, "tpot_slo_s": service.tpot_ms / 1e3}
            made |= slos
        self._recent.append(made)

    def recent(self) -> list[dict[str, Any]]:
        """The last answers, oldest first."""
        return list(self._recent)

    def exposition(self, fleet: Fleet) -> bytes:
        """All metrics in Prometheus' text form."""
        self._instances.clear()
        for member in fleet.registry.members.values():
            self._instances.labels(member.role.value, member.health.value).inc()
        self._blocks.set(len(fleet.index))
        for what, count in vars(fleet.index.counts).items():
            self._index.labels(what).set(count)
        tokens = sum(t.prompt_tokens for t in fleet.tally.values())
        hits = sum(t.expected_hits for t in fleet.tally.values())
        self._hits.set(hits / tokens if tokens else 0.0)
        for what, count in (
            ("expected", hits),
            ("stale", sum(t.stale for t in fleet.tally.values())),
            ("missed", sum(t.missed for t in fleet.tally.values())),
        ):
            self._hit_tokens.labels(what).set(count)
        return generate_latest(self.registry)

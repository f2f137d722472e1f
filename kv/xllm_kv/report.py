"""What the KV cache of one engine has done: metrics, and facts for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from xllm_kv.prices import Prices, TierCounts
from xllm_plugins.metrics import Metric, Sample
from xllm_plugins.status import Report

_COUNTERS = {
    "won_tokens": "tokens that were fetched, since that was predicted to beat computing them",
    "refused_tokens": "tokens that a tier held and that were computed all the same",
    "missed_tokens": "tokens that neither this tier nor one before it held",
    "late": "fetches that were given up because they took too long",
    "probes": "blocks that were fetched to see whether a slow tier has recovered",
    "prefetched_bytes": "bytes asked for before their request's turn had come",
    "fetched_bytes": "bytes fetched",
    "fetch_s": "seconds that fetches took",
    "stored_bytes": "bytes written",
    "store_s": "seconds that writing took",
    "skipped": "blocks that were not written, since the tier was away or behind with writing",
    "errors": "transfers that failed; what they would have brought was computed",
    "evicted": "blocks given up for others",
}
_ROOM = {
    "used_bytes": "bytes that lie there; in a remote store, what this engine knows of",
    "size_bytes": "bytes that may lie there; 0 where that is not known",
}
_NOW = {
    "under_way_bytes": "bytes that are being fetched",
    "fetch_mib_ms": "how long fetching 1 MiB takes, ms",
}
METRICS = (
    *(
        Metric(f"kv_{name}", "counter", f"KV tiers: {doc}.", ("tier",))
        for name, doc in _COUNTERS.items()
    ),
    *(
        Metric(f"kv_{name}", "gauge", f"KV tiers: {doc}.", ("tier",))
        for name, doc in (_ROOM | _NOW).items()
    ),
)


class Room(NamedTuple):
    """A tier's room, in bytes.

    Attributes:
        used_bytes: of what lies there.
        size_bytes: of what may; 0 where that is not known.
    """

    used_bytes: int
    size_bytes: int


def report_of(engine_core: Any) -> Report:
    """The state of an engine core's KV cache."""
    connector = engine_core.scheduler.connector
    for child in getattr(connector, "sub_connectors", ()):
        prices = getattr(child, "prices", None)
        if prices is not None:
            return _report(prices, child.rooms)
    return Report()


def _report(prices: Prices, rooms: Mapping[str, Room]) -> Report:
    samples, facts = [], {}
    for tier, counts in prices.counts.items():
        samples += [Sample(f"kv_{n}", float(getattr(counts, n)), (tier,)) for n in _COUNTERS]
        moving = prices.under_way(tier), prices.fetch_ms(tier, 1 << 20)
        gauges = {**rooms[tier]._asdict(), **dict(zip(_NOW, moving, strict=True))}
        samples += [Sample(f"kv_{name}", float(value), (tier,)) for name, value in gauges.items()]
        facts[tier] = {**_plain(counts), **gauges}
    return Report(samples, {"tiers": facts})


def _plain(counts: TierCounts) -> dict[str, float]:
    return {name: getattr(counts, name) for name in _COUNTERS}

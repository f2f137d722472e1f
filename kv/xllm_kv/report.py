"""What the KV cache of one engine has done: metrics, and facts for people."""

from __future__ import annotations

from typing import Any

from xllm_kv.prices import Prices, TierCounts
from xllm_plugins.metrics import Metric, Sample
from xllm_plugins.status import Report

_COUNTERS = {
    "won_tokens": "tokens that were fetched, since that was predicted to beat computing them",
    "refused_tokens": "tokens that a tier held and that were computed all the same",
    "late": "fetches that were given up because they took too long",
    "probes": "blocks that were fetched to see whether a slow tier has recovered",
    "fetched_bytes": "bytes fetched",
    "fetch_s": "seconds that fetches took",
    "stored_bytes": "bytes written",
    "store_s": "seconds that writing took",
    "skipped": "blocks that were not written, since the tier was away or behind with writing",
    "errors": "transfers that failed; what they would have brought was computed",
    "evicted": "blocks given up for others",
}
METRICS = (
    *(
        Metric(f"kv_{name}", "counter", f"KV tiers: {doc}.", ("tier",))
        for name, doc in _COUNTERS.items()
    ),
    Metric("kv_fetch_mib_ms", "gauge", "KV tiers: how long fetching 1 MiB takes, ms.", ("tier",)),
)


def report_of(engine_core: Any) -> Report:
    """The state of an engine core's KV cache."""
    connector = engine_core.scheduler.connector
    for child in getattr(connector, "sub_connectors", ()):
        prices = getattr(child, "prices", None)
        if prices is not None:
            return _report(prices)
    return Report()


def _report(prices: Prices) -> Report:
    samples, facts = [], {}
    for tier, counts in prices.counts.items():
        fetch_ms = prices.fetch_ms(tier, 1 << 20)
        samples += [Sample(f"kv_{n}", float(getattr(counts, n)), (tier,)) for n in _COUNTERS]
        samples.append(Sample("kv_fetch_mib_ms", fetch_ms, (tier,)))
        facts[tier] = {**_plain(counts), "fetch_mib_ms": fetch_ms}
    return Report(samples, {"tiers": facts})


def _plain(counts: TierCounts) -> dict[str, float]:
    return {name: getattr(counts, name) for name in _COUNTERS}

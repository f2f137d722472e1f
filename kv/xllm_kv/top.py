"""What a server says of its KV tiers, as rows for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

HEADINGS = (
    "server", "tier", "size", "used", "hits, tokens", "refused", "missed", "late", "fetched", "at",
    "stored", "at", "skipped", "evicted", "errors",
)  # fmt: skip
_LOOKED_FOR = ("won_tokens", "refused_tokens", "missed_tokens", "late")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_NONE = "-"


class Server(NamedTuple):
    """What one server answered.

    Attributes:
        name: of it.
        status: of ``/xllm/v1/status``; None where it has none.
        metrics: of ``/metrics``; None where the server does not answer.
    """

    name: str
    status: Mapping[str, Any] | None = None
    metrics: str | None = None


def rows(servers: Iterable[Server]) -> list[tuple[str, ...]]:
    """A row for each tier of each engine, cells as in :data:`HEADINGS`."""
    found = []
    for server in servers:
        if server.metrics is None:
            found.append(_padded(server.name, "does not answer"))
            continue
        engines = (server.status or {}).get("engines", ())
        devices = _devices(server.metrics)
        for number in range(max(len(engines), len(devices))):
            name = server.name if number == 0 else f"{server.name} #{number}"
            found.append(_device(name, devices.get(str(number), {})))
            kv = engines[number].get("kv", {}) if number < len(engines) else {}
            found += [_tier(tier, counts) for tier, counts in kv.get("tiers", {}).items()]
    return found


def _devices(metrics: str) -> dict[str, dict[str, float]]:
    """By engine, what vLLM counts of the KV that lies on its device."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                blocks, tokens = sample.labels["num_gpu_blocks"], sample.labels["block_size"]
                if blocks.isdigit() and tokens.isdigit():
                    device = found.setdefault(sample.labels.get("engine", "0"), {})
                    device["tokens"] = int(blocks) * int(tokens)
            elif sample.name in ("vllm:kv_cache_usage_perc", "vllm:prefix_cache_hits_total"):
                device = found.setdefault(sample.labels.get("engine", "0"), {})
                device[sample.name] = sample.value
    return found


def _device(name: str, device: Mapping[str, float]) -> tuple[str, ...]:
    size, share = device.get("tokens"), device.get("vllm:kv_cache_usage_perc")
    return _padded(
        name,
        "device",
        _NONE if size is None else f"{size:,.0f} tokens",
        _NONE if share is None else f"{share:.0%}",
        f"{device.get('vllm:prefix_cache_hits_total', 0):,.0f}",
    )


def _tier(tier: str, counts: Mapping[str, float]) -> tuple[str, ...]:
    size, used = counts.get("size_bytes", 0), counts.get("used_bytes", 0)
    return (
        "",
        tier,
        _bytes(size) if size else _NONE,
        f"{_bytes(used)}, {used / size:.0%}" if size else _bytes(used),
        *(f"{counts[name]:,.0f}" for name in _LOOKED_FOR),
        _bytes(counts["fetched_bytes"]),
        _speed(counts["fetched_bytes"], counts["fetch_s"]),
        _bytes(counts["stored_bytes"]),
        _speed(counts["stored_bytes"], counts["store_s"]),
        *(f"{counts[name]:,.0f}" for name in ("skipped", "evicted", "errors")),
    )


def _padded(*cells: str) -> tuple[str, ...]:
    return (*cells, *("" for _ in HEADINGS[len(cells) :]))


def _bytes(number: float) -> str:
    unit = 0
    while number >= 1024 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.1f} {_UNITS[unit]}" if unit else f"{number:.0f} B"


def _speed(moved: float, seconds: float) -> str:
    return f"{_bytes(moved / seconds)}/s" if seconds else _NONE


def instances(status: Mapping[str, Any]) -> Sequence[tuple[str, str]] | None:
    """Names and addresses of the instances of which a router's status tells; None for a server."""
    if "instances" not in status:
        return None
    return [(one["name"], one["url"]) for one in status["instances"]]

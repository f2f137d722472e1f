"""What the features of one engine process report: facts for people, samples for metrics."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xllm_plugins.metrics import Sample


@dataclass(frozen=True)
class Report:
    """One feature's state now. ``facts`` holds plain JSON types only."""

    samples: Sequence[Sample] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


_reporters: dict[str, Callable[[], Report]] = {}
_WORKERS_EVERY_S = 10.0  # they answer between steps


def now_and_then(
    make: Callable[[Any], Report], clock: Callable[[], float] = time.monotonic
) -> Callable[[Any], Report]:
    """A report for which a worker has to be asked: made anew every ten seconds at most.

    Args:
        make: makes the report of an engine core.
        clock: seconds, monotonic.
    """
    last: tuple[float, Report] | None = None

    @functools.wraps(make)
    def report(engine_core: Any) -> Report:
        nonlocal last
        if last is None or clock() - last[0] >= _WORKERS_EVERY_S:
            last = (clock(), make(engine_core))
        return last[1]

    return report


def register_reporter(feature: str, reporter: Callable[[], Report]) -> None:
    """Let a feature that runs in this process be asked for its state."""
    _reporters[feature] = reporter


def engine_status() -> dict[str, Any]:
    """The state in plain types, to travel between processes, of every feature that registered."""
    return {name: plain(reporter()) for name, reporter in _reporters.items()}


def plain(report: Report) -> dict[str, Any]:
    """A report in plain types."""
    return {
        "samples": [[s.name, s.value, list(s.labels)] for s in report.samples],
        "facts": dict(report.facts),
    }


def samples_of(status: Mapping[str, Any]) -> list[Sample]:
    """The samples of all features out of what :func:`engine_status` returned."""
    return [
        Sample(name, value, tuple(labels))
        for feature in status.values()
        for name, value, labels in feature["samples"]
    ]

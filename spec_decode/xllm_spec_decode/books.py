"""What was drafted and what came of it, as metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_plugins.metrics import Metric, Sample
from xllm_plugins.status import Report

COUNTERS = {
    "drafts": "Drafts that were verified.",
    "drafted": "Their tokens.",
    "accepted": "Of those the ones that the model said too.",
}
METRICS = (
    Metric("spec_decode_steps", "counter", "Engine steps that said something."),
    Metric("spec_decode_drafting_steps", "counter", "Of those the ones that verified drafts."),
    *(
        Metric(f"spec_decode_{name}", "counter", doc, ("drafter",))
        for name, doc in COUNTERS.items()
    ),
    Metric(
        "spec_decode_acceptance",
        "gauge",
        "Chance of a draft's first token, used or not.",
        ("drafter",),
    ),
    Metric("spec_decode_token_ms", "gauge", "What one more drafted token adds to a step, ms."),
)


def report_of(facts: Mapping[str, Any]) -> Report:
    """A worker's facts as samples and facts."""
    samples = [
        Sample("spec_decode_steps", facts["steps"]),
        Sample("spec_decode_drafting_steps", facts["drafting_steps"]),
        Sample("spec_decode_token_ms", facts["step_ms"]["drafted_token"]),
    ]
    samples += [
        Sample(f"spec_decode_{name}", value, (drafter,))
        for name in (*COUNTERS, "acceptance")
        for drafter, value in facts[name].items()
    ]
    return Report(samples, facts)

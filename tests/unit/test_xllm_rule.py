"""The baseline of the simulated co-location: xLLM's roofline, held against its own figures."""

from __future__ import annotations

import pytest

from benchmarks.lab.xllm_rule import ASCEND_910B, BottleneckPolicy, Roofline, Thresholds
from xllm_plugins.latency import StepShape, StepTime
from xllm_scheduler.engine.policy import OfflineDecodes, OnlineDecodes, PrefillView, StepView

QWEN25_7B = Roofline(ASCEND_910B, 3584, 18944, 28, 28, 4, 152064)
QWEN3_8B = Roofline(ASCEND_910B, 4096, 12288, 36, 32, 8, 151936)


def test_the_saturation_batches_are_xllms() -> None:
    assert (QWEN25_7B.saturation_batch, QWEN3_8B.saturation_batch) == (340, 333)


@pytest.mark.parametrize(
    ("batch", "context", "expected_ms"), [(32, 1024, 18.51), (128, 1024, 28.34), (256, 2048, 66.21)]
)
def test_decode_times_are_xllms(batch: int, context: int, expected_ms: float) -> None:
    found_ms = QWEN25_7B.decode_s([context] * batch) * 1e3
    assert found_ms == pytest.approx(expected_ms, rel=2e-3)


def test_the_prefill_time_is_xllms() -> None:
    assert QWEN25_7B.prefill_s(2048) * 1e3 == pytest.approx(109.15, abs=0.01)


def view(offline: int, waiting: int = 0) -> StepView:
    online = OnlineDecodes([9.0], [5], [50.0], StepShape(decodes=1, decode_context=1000), 1)
    ids = [f"off{i}" for i in range(offline)]
    queue = [PrefillView(f"new{i}", False, False, float("inf"), 1000) for i in range(waiting)]
    decodes = OfflineDecodes(ids, [1000] * offline, [1] * offline)
    return StepView(1.0, 4096, StepTime(), online, decodes, waiting=queue)


@pytest.mark.parametrize(("share", "some"), [(0.98, False), (0.5, True)])
def test_decodes_beyond_the_latency_threshold_are_held(share: float, some: bool) -> None:
    policy = BottleneckPolicy(QWEN25_7B, 50.0, Thresholds(latency=share))
    plan = policy.plan(view(offline=150))
    taken = 1 + 150 - len(plan.held)
    assert (taken < 151) is some
    assert QWEN25_7B.decode_s([1000] * taken) <= share * 0.050
    if some:
        assert QWEN25_7B.decode_s([1000] * (taken + 1)) > share * 0.050


def test_offline_requests_are_taken_in_below_the_saturation_threshold_only() -> None:
    policy = BottleneckPolicy(QWEN25_7B, 500.0, Thresholds(saturation=0.1))
    assert policy.plan(view(offline=20, waiting=1)).admit_offline
    assert not policy.plan(view(offline=34, waiting=1)).admit_offline

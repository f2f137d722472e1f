"""Routers are told of a tier's blocks as of the device's: by salt and adapter, not tokens alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xllm_plugins.compat import inspect_seam

if not inspect_seam("kv_tiers").holds:
    pytest.skip(inspect_seam("kv_tiers").reason, allow_module_level=True)

from vllm.config import KVEventsConfig, KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from benchmarks.lab import engine as lab
from tests.contract.engine import BLOCK, Engine, build, request
from tests.contract.worker import Worker
from xllm_kv.config import KvSection
from xllm_kv.index import KvIndex, Prompt, Tier
from xllm_kv.plugin import _tiers

pytestmark = pytest.mark.vllm
TOKENS = list(range(16))


class Copies(Worker):
    """A worker that says of every copy that it is done."""

    def execute(self, output: Any) -> ModelRunnerOutput:
        """See the class above."""
        result = super().execute(output)
        jobs = dict.fromkeys(output.kv_connector_metadata.store_jobs, 1)
        done = OffloadingWorkerMetadata(completed_jobs=jobs)
        result.kv_connector_output = KVConnectorOutput(kv_connector_worker_meta=done)
        return result


class Told:
    """A publisher of events whose only reader is a router's index."""

    def __init__(self) -> None:
        self.index = KvIndex()
        self.index.add("here", "m", BLOCK)

    def publish(self, batch: Any) -> None:
        self.index.apply("here", batch.events)

    def shutdown(self) -> None: ...

    def of(self, salt: str = "", lora: str = "") -> tuple[int, ...]:
        """Tokens of the prompt by tier."""
        found = self.index.match(Prompt("m", TOKENS, lora, salt))
        return tuple(found["here"].tokens) if found else (0, 0, 0, 0)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """vLLM's scheduler with tiers, whose events go to an index."""
    config = functools.partial(
        VllmConfig,
        kv_transfer_config=KVTransferConfig(**_tiers(KvSection(host_gib=0.01, disk=str(tmp_path)))),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )
    monkeypatch.setattr(lab, "VllmConfig", config)
    made = Engine(build(Scheduler))
    made._worker = Copies(BLOCK)
    made.scheduler.kv_event_publisher = Told()
    yield made
    made.scheduler.shutdown()


def run(engine: Engine) -> None:
    """Step until nothing is left to do; while threads write there is nothing to compute."""
    until_s = time.monotonic() + 60.0
    while engine.scheduler.has_requests():
        assert time.monotonic() < until_s
        if not engine.step():
            time.sleep(0.001)


def computed(engine: Engine, *, salt: str = "", lora: int = 0) -> Told:
    """A request has ended, its KV lies in all tiers, and then the device gives up all it has."""
    one = request("a", TOKENS, max_tokens=1, lora=lora, salt=salt)
    engine.add(one)
    run(engine)
    told: Told = engine.scheduler.kv_event_publisher
    until_s = time.monotonic() + 60.0
    while told.index.facts()["instances"]["here"]["disk"] < len(TOKENS) // BLOCK:
        assert time.monotonic() < until_s, told.index.facts()
        engine.add(request("b", 1, max_tokens=1))  # events come with steps
        run(engine)
    told.index.clear("here", Tier.DEVICE)
    return told


@pytest.mark.parametrize(
    ("made", "asked", "others"),
    [
        ({}, {}, ({"salt": "a"}, {"lora": "adapter-1"})),
        ({"salt": "a"}, {"salt": "a"}, ({}, {"salt": "b"})),
        ({"lora": 1}, {"lora": "adapter-1"}, ({}, {"lora": "adapter-2"})),
        ({"salt": "a", "lora": 1}, {"salt": "a", "lora": "adapter-1"}, ({}, {"salt": "a"})),
    ],
)
def test_a_tiers_blocks_are_found_by_who_may_use_them_and_by_nobody_else(
    engine: Engine, made: dict[str, Any], asked: dict[str, str], others: tuple[dict[str, str], ...]
) -> None:
    told = computed(engine, **made)
    assert told.of(**asked) == (0, 16, 0, 0)
    assert [told.of(**other) for other in others] == [(0, 0, 0, 0)] * 2
    told.index.clear("here", Tier.HOST)
    assert told.of(**asked) == (0, 0, 16, 0)

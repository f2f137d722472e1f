"""Many random faults on disk and in a store: what is fetched is what was kept."""

from __future__ import annotations

import random
import shutil
from itertools import takewhile
from pathlib import Path

import pytest

from xllm_plugins.compat import inspect_seam

if not inspect_seam("kv_tiers").holds:
    pytest.skip(inspect_seam("kv_tiers").reason, allow_module_level=True)
pytest.importorskip("redis")

from benchmarks.lab.damage import Faults
from benchmarks.lab.redis_server import redis_server
from tests.contract.xllm_kv.harness import CHUNK, HIT, Engine
from xllm_kv.tiers import redis_store, remote

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server"),
]
PROMPTS = [[first, first + 1, first + 2] for first in (1, 4, 7, 10, 13)]
FAULTS, RESTARTED_EVERY, DISK_CHUNKS = 150, 50, 9
SCRATCH = 0  # a place on the device that is no block's own


def test_whatever_is_damaged_no_wrong_block_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "_ANSWER_S", 0.02)
    monkeypatch.setattr(remote, "_REST_S", 0.01)
    rng, fetched = random.Random(0), 0
    with redis_server() as store:
        monkeypatch.setenv("XLLM_KV_REMOTE", store.url)
        tiers = [
            {"type": "DiskTier", "module_path": "xllm_kv.tiers.disk", "folder": str(tmp_path),
             "capacity": DISK_CHUNKS * CHUNK},
            {"type": "RemoteTier", "module_path": "xllm_kv.tiers.remote", "expiry_s": 60.0},
        ]  # fmt: skip
        faults = Faults(tmp_path, False, store, rng)
        for start in range(FAULTS // RESTARTED_EVERY):
            engine = Engine(f"damage-{start}", secondary_tiers=tiers)
            for number in range(RESTARTED_EVERY):
                faults.inject()
                fetched += asked(engine, f"{start}-{number}", rng.choice(PROMPTS))
            faults.mend()
            engine.settled()
            errors = [engine.manager.prices.counts[t].errors for t in ("DiskTier", "RemoteTier")]
            assert min(errors) > 0
            engine.closes()
    assert fetched > FAULTS  # of three for each
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.startswith(".")]
    assert len(files) <= DISK_CHUNKS


def asked(engine: Engine, name: str, prompt: list[int]) -> int:
    """Fetch of a prompt what there is, compare it, and keep the rest; how many were fetched."""
    context = engine.request(name, prompt)
    found = engine.found(context, *prompt)
    there = len(list(takewhile(lambda one: one is HIT, found)))
    for number in prompt[:there]:
        engine.device[SCRATCH] = 0
        engine.fetched(context, [number], [SCRATCH])
        assert set(engine.device[SCRATCH].tolist()) == {number}
    engine.keeps(context, prompt[there:])
    engine.settled()
    engine.ends(context)
    return there

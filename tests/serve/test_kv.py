"""Tiers of a real server: what the device gave up comes back, from memory, disk and other lives."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab.redis_server import redis_server
from benchmarks.lab.server import Server
from tests.serve.conftest import SHARED_GIB, Start

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(SHARED_GIB < 1.0, reason="/dev/shm has no room for a tier"),
]

# A device for little more than one of three prompts of about 1,400 tokens.
PROMPTS = [" ".join(f"{name}{n}" for n in range(350)) for name in ("river", "stone", "cloud")]
DEVICE = ("--num-gpu-blocks-override", "17")


def answer(server: Server, prompt: str) -> str:
    body = {"model": server.model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
    text: str = server.request("POST", "/v1/completions", body)["choices"][0]["text"]
    return text


def tiers(server: Server) -> dict[str, Any]:
    (engine,) = server.request("GET", "/xllm/v1/status")["engines"]
    found: dict[str, Any] = engine["kv"]["tiers"]
    return found


def test_what_the_device_gives_up_comes_back_also_after_a_restart(
    start: Start, tmp_path: Path
) -> None:
    settings = json.dumps({"kv": {"host_gib": 0.5, "disk": str(tmp_path)}})
    args = (*DEVICE, "--plugins", "xllm.kv", "--xllm-config", settings)
    with start(*args) as server:
        first = [answer(server, prompt) for prompt in PROMPTS]
        assert tiers(server)["host"]["fetched_bytes"] == 0
        again = [answer(server, prompt) for prompt in PROMPTS]
        host = tiers(server)["host"]
        assert host["won_tokens"] >= 3 * 1024
        assert host["fetched_bytes"] > 0
        assert host["stored_bytes"] > 0
        assert again == first
    with start(*args) as server:
        assert [answer(server, prompt) for prompt in PROMPTS] == first
        disk = tiers(server)["DiskTier"]
        assert disk["won_tokens"] >= 3 * 1024
        assert disk["fetched_bytes"] > 0
        assert disk["errors"] == 0


@pytest.mark.skipif(
    shutil.which("redis-server") is None or importlib.util.find_spec("redis") is None,
    reason="needs redis-server and redis",
)
def test_what_one_instance_computed_another_fetches(start: Start) -> None:
    with redis_server() as store:
        settings = json.dumps({"kv": {"host_gib": 0.3, "remote": store.url}})
        args = (*DEVICE, "--plugins", "xllm.kv", "--xllm-config", settings)
        with start(*args) as server:
            first = [answer(server, prompt) for prompt in PROMPTS]
            assert tiers(server)["RemoteTier"]["stored_bytes"] > 0
        with start(*args) as server:
            assert [answer(server, prompt) for prompt in PROMPTS] == first
            remote = tiers(server)["RemoteTier"]
    assert remote["won_tokens"] >= 3 * 1024
    assert remote["fetched_bytes"] > 0
    assert remote["errors"] == 0

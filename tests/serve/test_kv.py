"""Tiers of a real server: what the device gave up comes back, from memory, disk and other lives."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks.lab.redis_server import redis_server
from benchmarks.lab.server import Server
from tests.serve.conftest import SHARED_GIB, Start

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(SHARED_GIB < 1.0, reason="/dev/shm has no room for a tier"),
]
REDIS = shutil.which("redis-server") and importlib.util.find_spec("redis")
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


@dataclass(frozen=True)
class Kept:
    """What a server has left behind."""

    answers: list[str]
    disk: str
    remote: str
    """Address of the store; "" without Redis."""


@pytest.fixture(scope="module")
def kept(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    disk = str(tmp_path_factory.mktemp("disk"))
    with redis_server() if REDIS else contextlib.nullcontext() as store:
        remote = store.url if store else ""
        with with_tiers(start, disk=disk, remote=remote) as server:
            first = [answer(server, prompt) for prompt in PROMPTS]
            assert tiers(server)["host"]["fetched_bytes"] == 0
            assert [answer(server, prompt) for prompt in PROMPTS] == first
            assert came_back(server, "host")["stored_bytes"] > 0
        yield Kept(first, disk, remote)


def test_what_the_device_gave_up_comes_back_after_a_restart(start: Start, kept: Kept) -> None:
    with with_tiers(start, disk=kept.disk) as server:
        assert [answer(server, prompt) for prompt in PROMPTS] == kept.answers
        assert came_back(server, "DiskTier")["errors"] == 0


@pytest.mark.skipif(not REDIS, reason="needs redis-server and redis")
def test_what_one_instance_computed_another_fetches(start: Start, kept: Kept) -> None:
    with with_tiers(start, remote=kept.remote) as server:
        assert [answer(server, prompt) for prompt in PROMPTS] == kept.answers
        assert came_back(server, "RemoteTier")["errors"] == 0


def with_tiers(start: Start, **settings: str) -> AbstractContextManager[Server]:
    config = json.dumps({"kv": {"host_gib": 0.5, **settings}})
    return start(*DEVICE, "--plugins", "xllm.kv", "--xllm-config", config)


def came_back(server: Server, tier: str) -> dict[str, Any]:
    """What a tier says of itself, from which all the prompts have come."""
    found: dict[str, Any] = tiers(server)[tier]
    assert found["won_tokens"] >= 3 * 1024
    assert found["fetched_bytes"] > 0
    return found

"""Whatever is sent to a router, it answers, says what is wrong, and serves on."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

from tests.service.conftest import MODEL, TOKEN, WAIT_S

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
         "/v1/embeddings")  # fmt: skip
ADMIN = (
    ("POST", "/xllm/v1/instances"), ("DELETE", "/xllm/v1/instances/{name}"),
    ("POST", "/xllm/v1/instances/{name}/drain"), ("POST", "/xllm/v1/instances/{name}/beat"),
    ("PUT", "/xllm/v1/instances/{name}/role"), ("GET", "/xllm/v1/requests/{name}"),
    ("PUT", "/xllm/v1/settings"), ("GET", "/xllm/v1/status"), ("POST", "/v1/batches"),
    ("GET", "/v1/batches"), ("GET", "/v1/batches/{name}"), ("POST", "/v1/batches/{name}/cancel"),
    ("GET", "/v1/files/{name}"), ("DELETE", "/v1/files/{name}"), ("POST", "/v1/files"),
    ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/health"), ("PATCH", "/v1/models"),
)  # fmt: skip
FIELDS = (
    "model", "stream", "messages", "prompt", "max_tokens", "max_completion_tokens", "n", "priority",
    "service_tier", "vllm_xargs", "cache_salt", "session_id", "user", "tools", "stream_options",
    "kv_transfer_params", "return_token_ids", "url", "name", "role", "models", "incarnation",
    "waiting", "running", "kv_used", "step_time", "routing", "ttft_ms", "roles", "endpoint",
    "input_file_id", "completion_window", "metadata", "block_tokens", "dp_size", "kv_events",
)  # fmt: skip
HEADERS = (
    "x-request-id", "x-session-id", "authorization", "x-llm-d-slo-ttft-ms", "traceparent",
    "x-llm-d-inference-objective", "content-type", "x-api-key", "x-data-parallel-rank",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, 1e308, float("nan"), "", "x", "\x00", "é" * 50, "a" * 5000,
    [], {}, [None], [[]], {"a": None}, [{"role": "user", "content": None}], MODEL, "flex",
    [{"role": "user", "content": [{"type": "image_url"}]}], [1, 2, 3], {"xllm_class": "x"},
    {"xllm_ttft_ms": "soon"}, {"base": "x"}, "http://127.0.0.1:1", "../../etc/passwd", "%00",
)  # fmt: skip


def value(rng: random.Random, depth: int = 0) -> Any:
    if depth < 3 and rng.random() < 0.3:
        return {rng.choice(FIELDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(ODD)


def body(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(rng.randrange(200))
    if kind < 0.2:
        return json.dumps(value(rng)).encode()
    made = {rng.choice(FIELDS): value(rng) for _ in range(rng.randrange(8))}
    if kind < 0.7:  # nearly right
        made |= {"model": MODEL, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    text = json.dumps(made).encode()
    return text[: rng.randrange(len(text))] if kind > 0.95 else text


def headers(rng: random.Random) -> dict[str, str]:
    odd = (
        "",
        "x",
        "-1",
        "1e9",
        "nan",
        "Bearer ",
        f"Bearer {TOKEN}",
        "a" * 3000,
        "application/json",
    )
    return {rng.choice(HEADERS): rng.choice(odd) for _ in range(rng.randrange(4))}


async def test_nothing_that_is_sent_breaks_it(stub: Any, router: Any, tmp_path: Any) -> None:
    one = await stub()
    url = await router(one, routing="slo_aware", tokenizers="off", data=str(tmp_path), queue_s=0.1)
    rng = random.Random(1)
    wrong: list[tuple[str, str, int]] = []
    for number in range(600):
        if rng.random() < 0.5:
            method, path = "POST", rng.choice(PATHS)
        else:
            method, path = rng.choice(ADMIN)
        names = ("x", "..", "%2e%2e", "a" * 300, "file-1", "batch_1", "127.0.0.1:1")
        path = path.replace("{name}", rng.choice(names))
        sent = headers(rng)
        if path.startswith("/xllm/") and rng.random() < 0.7:
            sent["authorization"] = f"Bearer {TOKEN}"
        call = url.session.request(method, url.url + path, data=body(rng), headers=sent)
        async with asyncio.timeout(WAIT_S):
            async with call as answer:
                await answer.read()
        # 502 and 503 say that what was asked for is not there; they are no fault.
        if answer.status >= 500 and answer.status not in (502, 503):
            wrong.append((method, path, answer.status))
        if number % 100 == 99:  # what was changed is put right again
            for name in (await url.status())["instances"]:
                await url.admin("DELETE", f"/instances/{name['name']}")
            await url.admin("PUT", "/settings", json={"routing": "slo_aware", "roles": ""})
            await url.admin("POST", "/instances", json={"url": one.url})
    assert wrong == []
    answer = await url.ask("/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 3})
    assert answer["choices"]

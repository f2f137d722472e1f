"""Experts really move on two ranks while requests run, and no answer changes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.lab.moe import prepare_smollm2_moe
from benchmarks.lab.server import Server, serve
from tests.serve.conftest import SERVER_ARGS, SHARED_GIB

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(SHARED_GIB < 0.5, reason="/dev/shm has no room for two ranks"),
]

PROSE = [f"Once upon a time there was a {who} who lived by the" for who in ("king", "cat", "boy")]
NUMBERS = [f"{n}, {n + 1}, {n + 2}, {n + 3}, {n + 4}, {n + 5}," for n in (1, 30, 200)]
INTERVAL = 50  # steps between plans
SETTINGS = {
    # Sized so that moves pay on a toy: the machine of the defaults would call this low batch.
    "on_cpu": True, "device_tflops": 0.05, "memory_gb_s": 1e5, "link_gb_s": 1.0,
    "horizon_steps": 1000,
}  # fmt: skip
EXPERTS = (
    "--tensor-parallel-size", "2", "--enable-expert-parallel", "--enable-eplb",
    "--eplb-config", json.dumps({
        "num_redundant_experts": 2, "step_interval": INTERVAL, "window_size": INTERVAL,
    }),
    "--plugins", "xllm.eplb", "--xllm-config", json.dumps({"eplb": SETTINGS}),
)  # fmt: skip


def answer(server: Server, prompt: str) -> str:
    body = {"model": server.model, "prompt": prompt, "max_tokens": 40, "temperature": 0}
    text: str = server.request("POST", "/v1/completions", body)["choices"][0]["text"]
    return text


def answers(server: Server, prompts: list[str]) -> list[str]:
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: answer(server, prompt), prompts))


def books(server: Server) -> dict[str, Any]:
    (engine,) = server.request("GET", "/xllm/v1/status")["engines"]
    found: dict[str, Any] = engine["eplb"]
    return found


def test_experts_follow_the_topic_and_no_answer_changes(tmp_path: Any) -> None:
    model = prepare_smollm2_moe()
    with serve(model, args=SERVER_ARGS, log_path=tmp_path / "plain") as server:
        plain = {tuple(topic): answers(server, topic) for topic in (PROSE, NUMBERS)}
    with serve(
        model,
        args=[*SERVER_ARGS, *EXPERTS],
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_LOGGING_LEVEL": "INFO"},
        log_path=tmp_path / "experts",
    ) as server:
        for topic in (PROSE, NUMBERS):
            for _ in range(5):
                assert answers(server, topic) == plain[tuple(topic)]
                print(books(server))

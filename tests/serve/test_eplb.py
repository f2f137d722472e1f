"""Experts really move between two ranks while requests run, and no answer changes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.lab.moe import (
    NUMBERS_PROMPTS,
    ONE_CORE_A_RANK,
    PROSE_PROMPTS,
    prepare_smollm2_moe,
    two_ranks,
)
from benchmarks.lab.server import Server, serve
from tests.serve.conftest import SERVER_ARGS, SHARED_GIB
from xllm_eplb.placement import imbalance
from xllm_eplb.trace import window_of

pytestmark = [
    pytest.mark.serve,
    pytest.mark.timeout(1800),  # two servers, of which one has two ranks on the same cores
    pytest.mark.skipif(SHARED_GIB < 0.5, reason="/dev/shm has no room for two ranks"),
]
TOPICS = (PROSE_PROMPTS, NUMBERS_PROMPTS)
TOKENS, ROUNDS = 20, 4  # about as many steps each as there are between two plans


def answers(server: Server, prompts: Sequence[str]) -> list[str]:
    def answer(prompt: str) -> str:
        body = {"model": server.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        text: str = server.request("POST", "/v1/completions", body)["choices"][0]["text"]
        return text

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(answer, prompts))


def test_experts_follow_the_topic_and_no_answer_changes(tmp_path: Path) -> None:
    model = prepare_smollm2_moe()
    loud = {**ONE_CORE_A_RANK, "VLLM_LOGGING_LEVEL": "INFO"}
    with serve(model, args=SERVER_ARGS, log_path=tmp_path / "one-rank") as server:
        plain = [answers(server, prompts) for prompts in TOPICS]
    args = [*SERVER_ARGS, *two_ranks(TOKENS, TOKENS)]
    with serve(model, args=args, env=loud, log_path=tmp_path / "two-ranks") as server:
        for prompts, expected in zip(TOPICS, plain, strict=True):
            for _ in range(ROUNDS):
                assert answers(server, prompts) == expected
        found = server.request("GET", "/xllm/v1/eplb/windows?after=0")["windows"]

    windows = [window_of(one) for one in found]
    first = windows[0].placement
    now = [imbalance(one.load, one.placement, 2).mean() for one in windows]
    untouched = [imbalance(one.load, first, 2).mean() for one in windows]
    moved = [(a.placement != b.placement).any() for a, b in itertools.pairwise(windows)]
    assert any(moved[: ROUNDS - 1])
    assert any(moved[ROUNDS - 1 :])  # the other topic moved them again
    assert now[0] == untouched[0] > 1.3
    assert now[-1] < 1.0 + 0.5 * (untouched[-1] - 1.0)

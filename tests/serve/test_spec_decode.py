"""Drafts on a real server change nothing that it says, whatever a request asks for beside them."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.lab.early_exit import prepare_early_exit
from benchmarks.lab.server import Server
from tests.serve.conftest import PROMPTS, Start, texts

pytestmark = pytest.mark.serve

FILE = "".join(
    f"def {name}(width, height):\n    return width {sign} height\n\n"
    for name, sign in (("area", "*"), ("total", "+"), ("ratio", "/"), ("rest", "-"))
)
COPY = f"Repeat this file:\n\n{FILE}"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": [1, 2, 3]}},
    "required": ["name", "size"],
}


def asked(server: Server, **fields: object) -> Any:
    """The choices of an answer to the copying prompt: its texts and the ids of its tokens."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": COPY}],
        "max_tokens": 60,
        "temperature": 0,
        **fields,
    }
    choices = server.request("POST", "/v1/chat/completions", body)["choices"]
    return [
        (
            choice["message"]["content"],
            [one["token"] for one in (choice["logprobs"] or {"content": []})["content"]],
        )
        for choice in choices
    ]


def everything(server: Server) -> list[Any]:
    """Answers to requests of all kinds, one after the other and some side by side."""
    schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    found: list[Any] = [
        asked(server),
        asked(server, logprobs=True, top_logprobs=2),
        asked(server, n=3, temperature=1.0, top_k=1),  # one choice, since vLLM refuses n > 1 at 0
        asked(server, response_format=schema),
        texts(server, PROMPTS),
    ]
    with ThreadPoolExecutor() as clients:
        beside = list(clients.map(lambda i: asked(server, max_tokens=30 + i), range(4)))
    return [*found, beside]


def facts(server: Server) -> dict[str, Any]:
    (engine,) = server.request("GET", "/xllm/v1/status")["engines"]
    found: dict[str, Any] = engine["spec_decode"]
    return found


MODEL = {"method": "draft_model", "num_speculative_tokens": 4}


@pytest.mark.parametrize("drafting_model", [False, True], ids=["texts", "texts and a model"])
def test_greedy_answers_are_those_without_drafts(
    start: Start, plain_answers: tuple[list[str], Server], drafting_model: bool
) -> None:
    _, plain = plain_answers
    expected = everything(plain)
    options = ["--plugins", "xllm.spec_decode"]
    options += [
        "--xllm-config",
        json.dumps({"spec_decode": {"mode": "on" if drafting_model else "auto"}}),
    ]
    if drafting_model:
        drafting = {**MODEL, "model": str(prepare_early_exit(24))}
        options += ["--speculative-config", json.dumps(drafting)]
    with start(*options) as server:
        assert everything(server) == expected
        for _ in range(30):  # the worker is asked now and then
            found = facts(server)
            if sum(found.get("accepted", {"": 0}).values()):
                break
            time.sleep(1.0)
        assert sum(found["accepted"].values()) > 20
        assert ("draft_model" in found["accepted"]) == drafting_model
        assert found["failed"] == {}
        assert found["stands_back"] == ""

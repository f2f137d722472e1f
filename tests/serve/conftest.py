"""Whole servers: a real ``vllm serve`` on CPU with a real small model, each started once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import pytest

from benchmarks.lab.model import prepare_smollm2
from benchmarks.lab.server import Server, serve

SHARED_GIB = shutil.disk_usage("/dev/shm").free / 2**30  # a container may have 64 MiB
SERVER_ARGS = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32")


class Start(Protocol):
    """Starts a server of the shared model with some more options."""

    def __call__(
        self, *args: str, env: Mapping[str, str | None] | None = None
    ) -> AbstractContextManager[Server]: ...


@pytest.fixture(scope="session")
def model() -> Path:
    return prepare_smollm2()


@pytest.fixture(scope="session")
def start(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    def start(
        *args: str, env: Mapping[str, str | None] | None = None
    ) -> AbstractContextManager[Server]:
        log = tmp_path_factory.mktemp("serve") / "log"
        print(f"starting vllm serve {' '.join(args)}", file=sys.stderr)
        # Contract tests make vLLM quiet in this process, whose environment servers inherit.
        loud = {"VLLM_LOGGING_LEVEL": "INFO", **(env or {})}
        return serve(model, args=[*SERVER_ARGS, *args], env=loud, log_path=log)

    return start


def texts(server: Server, prompts: Sequence[str], **fields: object) -> list[str]:
    """The greedy answers to some prompts."""
    return [server.ask(prompt, max_tokens=24, **fields) for prompt in prompts]


@pytest.fixture(scope="session")
def plain_answers(start: Start) -> Iterator[tuple[list[str], Server]]:
    """What an installed but unchosen xllm answers, and the server that did."""
    with start() as server:
        yield texts(server, PROMPTS), server


PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to ten.",
    "Why is the sky blue?",
)

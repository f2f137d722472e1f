"""Instances that are killed and come again at the same address, and clients of their streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.lab.model import prepare_smollm2
from benchmarks.lab.server import LOGS, cpu_environment, free_port

MODEL = "smol"
START_S, STOP_S = 900.0, 30.0


@dataclass
class Instance:
    """A process that can be killed and started again at the same address.

    Attributes:
        port: its.
        command: what runs it.
        env: of it.
        kills: how often it was killed.
    """

    port: int
    command: Sequence[str]
    env: dict[str, str]
    kills: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; it takes a while to answer."""
        log = LOGS / f"faults-{self.port}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """End it and all of its processes at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.kills += 1

    def stop(self) -> None:
        """End it as its user would, so that it leaves nothing behind; at once after a while."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        self.kill()

    def pause(self, seconds: float) -> None:
        """Stop all of its processes for so long; returns afterwards."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.killpg(self.process.pid, signal.SIGCONT)

    async def answers(self, session: aiohttp.ClientSession) -> bool:
        """Whether it does."""
        try:
            async with session.get(self.url + "/health") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    async def up(self, session: aiohttp.ClientSession) -> None:
        """Wait until it answers.

        Raises:
            SystemExit: it does not.
        """
        until_s = time.monotonic() + START_S
        while not await self.answers(session):
            if time.monotonic() > until_s:
                raise SystemExit(f"{self.url} does not answer; see {LOGS}")
            await asyncio.sleep(0.1)


def vllm_instance(
    core: int, args: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Instance:
    """A real vLLM server of SmolLM2 on one core, float32; not started yet."""
    model, port = prepare_smollm2(), free_port()
    script = str(Path(sys.executable).with_name("vllm"))
    command = [script, "serve", str(model), "--host", "127.0.0.1", "--port", str(port),
               "--served-model-name", MODEL, "--enforce-eager", "--max-model-len", "2048",
               "--dtype", "float32", *args]  # fmt: skip
    pinned = {"VLLM_CPU_OMP_THREADS_BIND": str(core), "VLLM_CPU_KVCACHE_SPACE": "1"}
    return Instance(port, command, {**cpu_environment(), **pinned, **(env or {})})


async def streamed(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    piece: Callable[[int], None] = lambda count: None,
) -> str:
    """The text of an answer.

    Args:
        session: to send with.
        url: of a server or a router.
        body: what is asked, for ``/v1/completions``.
        piece: is told after each event how many there were.

    Raises:
        ValueError: it ended in an error, or without its end.
    """
    pieces: list[str] = []
    done = False
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status != 200:
            raise ValueError(f"status {answer.status}: {await answer.text()}")
        async for line in answer.content:
            data = line.removeprefix(b"data: ").strip()
            if not data:
                continue
            if data == b"[DONE]":
                done = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            pieces += [choice["text"] for choice in chunk["choices"]]
            piece(len(pieces))
    if not done:
        raise ValueError("the stream ended without its end")
    return "".join(pieces)


@contextlib.asynccontextmanager
async def session_of() -> AsyncIterator[aiohttp.ClientSession]:
    """A client without limits."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield session

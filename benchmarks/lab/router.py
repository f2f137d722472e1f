"""One real `xllm router` process, started and ended as a context."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lab.server import LOGS, ServerError, free_port, log_tail

_START_S, _STOP_S = 180.0, 10.0
TOKEN = "admin"


@dataclass(frozen=True)
class RouterProcess:
    """A router that answers."""

    port: int
    pid: int
    log_path: Path

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float = 300.0) -> Any:
        """The JSON that it answers with; admin paths get the token.

        Raises:
            ServerError: its status was not 200.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        headers = {"content-type": "application/json"}
        if path.startswith("/xllm/"):
            headers["authorization"] = f"Bearer {TOKEN}"
        with closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        if answer.status != 200:
            raise ServerError(f"{method} {path}: status {answer.status}: {text}")
        return json.loads(text) if text else None

    def instances(self) -> dict[str, dict[str, Any]]:
        """What it knows of instances, by name."""
        return {one["name"]: one for one in self.call("GET", "/xllm/v1/status")["instances"]}

    def await_instances(self, count: int, timeout_s: float = 900.0) -> None:
        """Wait until so many accept requests.

        Raises:
            ServerError: they do not within the time.
        """
        until_s = time.monotonic() + timeout_s
        while sum(one["accepts"] for one in self.instances().values()) < count:
            if time.monotonic() > until_s:
                raise ServerError(f"fewer than {count} instances: {self.instances()}")
            time.sleep(0.2)


@contextmanager
def route(*args: str, port: int = 0, log_path: Path | None = None) -> Iterator[RouterProcess]:
    """Runs ``xllm router`` until the block ends.

    Args:
        args: its options; the admin token is set.
        port: a free one if 0.
        log_path: where its output goes; under ``.cache/logs`` if None.

    Raises:
        ServerError: it ended or did not answer in time.
    """
    port = port or free_port()
    log_path = log_path or LOGS / f"router-{port}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command(port, args), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        made = RouterProcess(port, process.pid, log_path)
        try:
            _await(process, made)
            yield made
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def command(port: int, args: Sequence[str]) -> list[str]:
    """What runs it."""
    main = [sys.executable, "-m", "xllm_plugins.cli", "router"]
    return [*main, "--port", str(port), "--admin-token", TOKEN, *args]


def _await(process: subprocess.Popen[bytes], made: RouterProcess) -> None:
    until_s = time.monotonic() + _START_S
    while True:
        try:
            made.call("GET", "/health", timeout_s=2.0)
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until_s:
                tail = log_tail(made.log_path)
                raise ServerError(f"the router did not start; its log ends:\n{tail}") from None
            time.sleep(0.1)


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))

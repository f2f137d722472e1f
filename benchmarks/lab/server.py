"""One real `vllm serve` process tree on this machine's CPU, started and ended as a context."""

from __future__ import annotations

import ctypes.util
import http
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from benchmarks.lab.machine import fast_dtype
from benchmarks.lab.model import ROOT

_PORTS = range(10_000, 20_000)
_GIVEN: set[int] = set()  # ports of this process; what has one may not listen yet, or not just now
LOGS = ROOT / ".cache" / "logs"
STOP_GRACE_S, KILL_GRACE_S = 10.0, 60.0  # a killed worker first gives back gigabytes of memory

Progress = Callable[[float, str], None]
"""Called about once a second during start-up with the seconds so far and the last log line."""


class ServerError(Exception):
    """The server ended, or did not answer in time; the message holds the end of its log."""


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    host: str
    port: int
    model: str
    log_path: Path
    pid: int
    """Leader of the process group of everything the server started."""
    startup_s: float

    @property
    def url(self) -> str:
        """The address that the API's paths are appended to."""
        return f"http://{self.host}:{self.port}"

    def healthy(self) -> bool:
        """True if it answers and says that its engine is alive."""
        return _healthy(self.host, self.port)

    def ask(self, question: str, **fields: object) -> str:
        """The answer to one chat message; `fields` are put into the request's body."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 64,
            "temperature": 0,
            **fields,
        }
        answer = self.request("POST", "/v1/chat/completions", body)
        content: str = answer["choices"][0]["message"]["content"]
        return content

    def request(self, method: str, path: str, body: object = None) -> Any:
        """The JSON that the server answers with.

        Raises:
            ServerError: its status was not 200.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=300)
        with closing(connection):
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        if response.status != http.HTTPStatus.OK:
            raise ServerError(f"{method} {path}: status {response.status}: {text}")
        return json.loads(text)


@contextmanager
def serve(
    model: Path,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str | None] | None = None,
    port: int | None = None,
    log_path: Path | None = None,
    progress: Progress | None = None,
    timeout_s: float = 1500.0,
) -> Iterator[Server]:
    """Runs `vllm serve model *args` until the block ends.

    Args:
        model: folder of the model.
        args: options of `vllm serve`; `--dtype` is `fast_dtype()` unless given.
        env: added to `cpu_environment()`; None removes a variable.
        port: a free one if None.
        log_path: where the server's output goes; under `.cache/logs` if None.
        progress: told how start-up goes.
        timeout_s: how long start-up may take.

    Raises:
        ServerError: the server ended or did not become healthy in time.
    """
    host = "127.0.0.1"
    port = port or free_port()
    log_path = log_path or LOGS / f"serve-{port}.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    script = Path(sys.executable).with_name("vllm")
    command = [str(script), "serve", str(model), "--host", host, "--port", str(port), *args]
    if "--dtype" not in args:
        command += ["--dtype", fast_dtype()]
    with _sigterm_as_exit(), log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            env=_merged(cpu_environment(), env or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            startup_s = _await_health(process, host, port, log_path, progress, timeout_s)
            yield Server(host, port, str(model), log_path, process.pid, startup_s)
        finally:
            _stop_group(process)


def cpu_environment() -> dict[str, str]:
    """This process's environment plus what vLLM wants on a CPU: all cores and fast libraries."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": " ".join(preloads()),
        "PYTHONUNBUFFERED": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
    }


def own_modules() -> dict[str, str]:
    """Environment in which a server can import ``benchmarks``."""
    root = str(Path(__file__).parents[2])
    return {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def preloads() -> list[str]:
    """Libraries to preload: the caller's own, then tcmalloc and Intel's OpenMP where found."""
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal")
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    own = os.environ.get("LD_PRELOAD", "").split()
    if openmp.exists():
        # vLLM refuses two OpenMP runtimes, and adds GNU's to a process that has imported it.
        own = [library for library in own if "libgomp" not in library]
    found = [*own, tcmalloc, openmp.exists() and str(openmp)]
    return list(dict.fromkeys(library for library in found if library))


def free_port(preferred: int = 0) -> int:
    """A TCP port of the loopback interface that nobody listens on.

    Not one of those that the system gives to outgoing connections: what takes it may come late.
    """
    while True:
        port = preferred or _PORTS.start + secrets.randbelow(len(_PORTS))
        if port in _GIVEN and not preferred:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                preferred = 0
                continue
            _GIVEN.add(port)
            return port


def log_tail(log_path: Path, lines: int = 30) -> str:
    """The last lines of a log."""
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-lines:])


def _merged(base: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in {**base, **changes}.items() if value is not None}


def _await_health(
    process: subprocess.Popen[bytes],
    host: str,
    port: int,
    log_path: Path,
    progress: Progress | None,
    timeout_s: float,
) -> float:
    start = time.monotonic()
    while not _healthy(host, port):
        elapsed = time.monotonic() - start
        if process.poll() is not None:
            raise ServerError(
                f"vllm serve exited with status {process.returncode} after {elapsed:.0f} s; "
                f"the end of {log_path}:\n{log_tail(log_path)}"
            )
        if elapsed > timeout_s:
            raise ServerError(
                f"vllm serve did not answer within {timeout_s:.0f} s; "
                f"the end of {log_path}:\n{log_tail(log_path)}"
            )
        if progress:
            progress(elapsed, log_tail(log_path, 1))
        time.sleep(1)
    return time.monotonic() - start


def _healthy(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    with closing(connection):
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False  # nobody listens, or not any more


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    try:
        _signal_and_wait(process, signal.SIGTERM, STOP_GRACE_S)
    finally:  # also when a second Ctrl-C ends the waiting
        if not _signal_and_wait(process, signal.SIGKILL, KILL_GRACE_S):
            raise ServerError(f"process group {process.pid} survived SIGKILL")


def _signal_and_wait(
    process: subprocess.Popen[bytes], signum: signal.Signals, grace_s: float
) -> bool:
    """Signals the group and waits a while; True if none of it is left."""
    deadline = time.monotonic() + grace_s
    with suppress(ProcessLookupError):  # all of them are gone
        os.killpg(process.pid, signum)
    while _group_alive(process.pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        process.poll()  # reaps the leader
    return True


def _group_alive(group: int) -> bool:
    # Zombies do not count: an orphan's new parent may never reap it.
    for process in psutil.process_iter(["status"]):
        try:
            member = os.getpgid(process.pid) == group
        except ProcessLookupError:
            continue
        if member and process.info["status"] != psutil.STATUS_ZOMBIE:
            return True
    return False


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, so that the server is stopped; the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, _frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

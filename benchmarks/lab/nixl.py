"""How servers on this machine fetch KV from each other: NIXL over shared memory or TCP."""

from __future__ import annotations

import json
import os
import time

import psutil

from benchmarks.lab.server import free_port

_CONFIG = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
_WATCH_S = 1.0
_BUSY = 0.25  # of a core, while the server is idle; three servers may share one
_NICE = 10  # a tenth of a core when computing threads want it too


def nixl_args() -> list[str]:
    """Options of ``vllm serve``."""
    return ["--kv-transfer-config", json.dumps(_CONFIG)]


def nixl_env() -> dict[str, str]:
    """Environment of one server; each has a port of its own."""
    return {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "UCX_TLS": "tcp,shm,self"}


def calm(pid: int, core: int) -> int:
    """Gives a server's computing thread its core back, which NIXL takes in two ways.

    vLLM's connector on CPUs binds the thread to the machine's last core, where all servers with one
    core each would then compute; and NIXL's progress thread polls without end beside it.

    Args:
        pid: of a server that has nothing to do.
        core: what ``VLLM_CPU_OMP_THREADS_BIND`` says.

    Returns:
        How many threads there are that poll.
    """
    before = _busy_s(pid)
    time.sleep(_WATCH_S)
    polling = [
        thread
        for thread, busy_s in _busy_s(pid).items()
        if busy_s - before.get(thread, busy_s) > _BUSY * _WATCH_S
    ]
    for process, thread in polling:
        os.setpriority(os.PRIO_PROCESS, thread, _NICE)
        os.sched_setaffinity(process, {core})  # its main thread, which computes
    return len(polling)


def _busy_s(pid: int) -> dict[tuple[int, int], float]:
    """For how long each worker's threads have computed, in seconds, by process and thread."""
    return {
        (process.pid, thread.id): thread.user_time + thread.system_time
        for process in psutil.Process(pid).children(recursive=True)
        if process.name().startswith("VLLM::Worker")
        for thread in process.threads()
    }
